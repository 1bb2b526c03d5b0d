"""Texts are cut into tokens in a process of its own: what takes too much there is refused, and the next text is cut."""

import os
import signal
import subprocess
import sys

import pytest
from effc.compiler.models.checkpoints import text_process
from effc.compiler.models.checkpoints.tokenizer import load_checked_tokenizer
from effc.dsl.syntax.diagnostics import Reject
from transformers import AutoTokenizer

from tests.hostile.test_tokenizers import BACKTRACKS, changed, several
from tests.worlds import tokenizer

SLOW = {"pre_tokenizer": {"type": "Split", "pattern": BACKTRACKS, "behavior": "Isolated", "invert": False}}
LARGE = several(
    "normalizer",
    "normalizers",
    [{"type": "Replace", "pattern": {"String": old}, "content": new * 12} for old, new in (("a", "b"), ("b", "c"))],
)


@pytest.fixture
def folder(tmp_path):
    tokenizer(tmp_path / "t")
    return tmp_path / "t"


@pytest.fixture
def other(tmp_path):
    tokenizer(tmp_path / "other")
    return load_checked_tokenizer(tmp_path / "other", "other")


def test_a_text_that_takes_too_long_is_refused_and_the_next_is_cut(folder, other, monkeypatch):
    monkeypatch.setattr(text_process, "SECONDS", 0.3)
    changed(folder, SLOW)
    slow = load_checked_tokenizer(folder, "m")
    with pytest.raises(Reject, match="takes more time or memory at a text"):
        slow(("a" * 20 + "b ") * 1000)
    assert len(slow("b")["input_ids"]) == 2 and len(other("and")["input_ids"]) == 4


def test_a_text_that_takes_too_much_memory_is_refused_and_the_next_is_cut(folder, other, monkeypatch):
    monkeypatch.setattr(text_process, "MEMORY", 64 << 20)
    changed(folder, LARGE)
    large = load_checked_tokenizer(folder, "m")
    assert len(large("a")["input_ids"]) == 145
    with pytest.raises(Reject, match=r"(takes more time or memory|breaks) at a text"):
        large("a" * 100_000)
    assert len(other("and")["input_ids"]) == 4


TEXTS = {
    "one": {"text": "and it came to pass 🙂"},
    "a pair": {"text": "and", "text_pair": "it came"},
    "several": {"text": ["and it", "", "came to pass"]},
    "pairs": {"text": ["and", "it"], "text_pair": ["came", "to"]},
    "words": {"text": ["and", "it"], "is_split_into_words": True},
    "words of several": {"text": [["and", "it"], ["came"]], "is_split_into_words": True},
    "filled up": {"text": ["and it", "came to pass"], "padding": True, "return_tensors": "pt"},
    "cut": {"text": "and it came to pass", "truncation": True, "max_length": 5},
    "cut into pieces": {
        "text": "and it came to pass",
        "truncation": True,
        "max_length": 7,
        "stride": 2,
        "return_overflowing_tokens": True,
    },
    "with all that is known": {
        "text": ["and it", "came"],
        "return_offsets_mapping": True,
        "return_special_tokens_mask": True,
        "return_token_type_ids": True,
        "return_length": True,
    },
    "without special tokens": {"text": "</s> and", "add_special_tokens": False, "split_special_tokens": True},
}


@pytest.mark.parametrize("name", TEXTS)
def test_tokens_are_those_of_the_library(folder, name):
    plain, limited = AutoTokenizer.from_pretrained(folder), load_checked_tokenizer(folder, "m")
    plain.pad_token = limited.pad_token = "</s>"
    for _ in range(2):
        expected, actual = plain(**TEXTS[name]), limited(**TEXTS[name])
        assert expected.keys() == actual.keys()
        for key, value in expected.items():
            assert (actual[key] == value).all() if hasattr(value, "all") else actual[key] == value, key
        if "return_tensors" not in TEXTS[name]:
            assert actual.tokens() == expected.tokens()
            assert places(actual) == places(expected)


def places(encoding):
    """Whatever transformers says of words, characters and sequences of the first tokens."""
    tokens = range(len(encoding.tokens()))
    words = {w for w, s in zip(encoding.word_ids(), encoding.sequence_ids(), strict=True) if w is not None and s == 0}
    return [
        encoding.word_ids(),
        encoding.sequence_ids(),
        [encoding.token_to_sequence(0, t) for t in tokens],
        [(encoding.token_to_word(0, t), encoding.token_to_chars(0, t)) for t in tokens],
        [(encoding.word_to_tokens(0, w), encoding.word_to_chars(0, w)) for w in words],
        [(encoding.char_to_token(0, c, s), c) for c in range(9) for s in range(2)],
    ]


def test_what_is_no_text_is_a_type_error_as_of_the_library(folder):
    limited = load_checked_tokenizer(folder, "m")
    with pytest.raises(TypeError):
        limited("\ud800")
    assert limited("and")["input_ids"]


def test_bytes_are_a_type_error_and_not_cut_as_python_spells_them(folder):
    with pytest.raises(TypeError):
        load_checked_tokenizer(folder, "m")._tokenizer.encode_batch([b"and"])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_somebody_ended_between_two_texts_costs_none(folder, number):
    limited = load_checked_tokenizer(folder, "m")
    expected = limited("and")["input_ids"]
    child = text_process.text_process(0)._process
    child.send_signal(number)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert limited("and")["input_ids"] == expected


@pytest.mark.parametrize("executable", [None, "", "/bin/false", "/bin/true", "/nowhere/python"])
def test_a_python_that_cannot_start_is_not_the_fault_of_a_tokenizer(folder, monkeypatch, executable):
    limited = load_checked_tokenizer(folder, "m")
    monkeypatch.setattr(text_process, "_processes", {})
    monkeypatch.setattr(text_process.sys, "executable", executable)
    with pytest.raises(Reject) as refused:
        limited("and")
    assert refused.value.diagnostics[0].slug == "no-text-process"


@pytest.mark.parametrize(
    "start",
    [
        "import nothing_of_that_name",
        "import os, time; os.close(1); time.sleep(0.5); import nothing_of_that_name",  # as libraries take down theirs
        "import sys; sys.stderr.write('warning' * 100_000); import nothing_of_that_name",  # more than a pipe holds
    ],
)
def test_what_keeps_the_process_of_texts_from_starting_is_said(start, folder, monkeypatch):
    limited = load_checked_tokenizer(folder, "m")
    monkeypatch.setattr(text_process, "_processes", {})
    monkeypatch.setattr(text_process, "CHILD", folder / "child.py")
    (folder / "child.py").write_text(start)
    with pytest.raises(Reject, match="nothing_of_that_name"):
        limited("and")


def test_tokens_that_are_added_later_are_known(folder):
    limited = load_checked_tokenizer(folder, "m")
    limited("and")
    limited.add_tokens(["<new>"])
    assert limited("<new>")["input_ids"][-1] == limited.convert_tokens_to_ids("<new>") == len(limited) - 1


@pytest.mark.slow
def test_a_long_text_is_cut_anew_where_its_tokenizer_or_a_setting_is_another(folder, other):
    text = "and it came to pass " * 5_000
    ours, library = load_checked_tokenizer(folder, "m"), AutoTokenizer.from_pretrained(folder)

    def equal() -> bool:
        settings = ({}, {"add_special_tokens": False}, {"truncation": True, "max_length": 9}, {})
        return all(ours(text, **more)["input_ids"] == library(text, **more)["input_ids"] for more in settings)

    assert equal() and equal() and other(text)["input_ids"] == library(text)["input_ids"]
    for each in (ours, library):
        each.add_tokens(["came to"])
    assert equal() and ours(text)["input_ids"] != other(text)["input_ids"]
    assert ours(text + "it")["input_ids"] == library(text + "it")["input_ids"]


@pytest.mark.slow
def test_no_variable_of_a_template_changes_its_limits(tmp_path, monkeypatch):
    from effc.compiler.models.rows.chat_template import TooLong, render_template

    monkeypatch.setattr(text_process, "SECONDS", 0.3)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = a %}{% endfor %}{% endfor %}"
    told = {"seconds": 1e9, "memory": 1 << 60, "kind": "open", "attached": 5}
    with pytest.raises(TooLong):
        render_template(tokenizer(tmp_path, chat=endless), [{"role": "user", "content": "a"}], **told)


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it leaves behind with it ignored
from effc.compiler.models.checkpoints.tokenizer import load_checked_tokenizer
from pathlib import Path
made = load_checked_tokenizer(Path(sys.argv[1]), "m")
before = made("and")["input_ids"]
try:
    os.killpg(0, signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    pass
assert made("and")["input_ids"] == before
print("the same")
"""


@pytest.mark.slow
def test_a_text_is_cut_after_ctrl_c_as_before(folder):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(folder)], capture_output=True, text=True, start_new_session=True
    )
    assert done.stdout == "the same\n", done.stderr
