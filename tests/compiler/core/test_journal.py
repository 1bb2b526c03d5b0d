"""The memory of a long pass survives a kill at any byte."""

import math

from effc.compiler.core.journal import Journal
from hypothesis import given
from hypothesis import strategies as st

values = st.floats(allow_nan=False) | st.integers() | st.text() | st.lists(st.floats(allow_nan=False), max_size=3)


@given(answers=st.dictionaries(st.text(max_size=8), values, min_size=1, max_size=8), cut=st.integers(0, 400))
def test_a_journal_cut_anywhere_keeps_its_whole_lines_and_goes_on(tmp_path_factory, answers, cut):
    path = tmp_path_factory.mktemp("journal") / "scores.jsonl"
    first = Journal(path)
    for key, value in answers.items():
        first.get_or_compute(key, lambda value=value: value)
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole))])
    computed = []
    second = Journal(path)
    for key, value in answers.items():
        assert second.get_or_compute(key, lambda key=key, value=value: computed.append(key) or value) == value
    assert len(computed) + second.replayed == len(answers)
    assert path.read_bytes() == whole


def test_garbage_in_a_journal_is_dropped(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_bytes(b"\xff\xfe not a line\n")
    assert Journal(path).get_or_compute("a", lambda: 1) == 1
    assert Journal(path).known == {"a": 1}


def test_scores_that_are_no_numbers_are_remembered_too(tmp_path):
    path = tmp_path / "scores.jsonl"
    assert math.isnan(Journal(path).get_or_compute("a", lambda: math.nan))
    assert math.isnan(Journal(path).get_or_compute("a", lambda: 1.0))
