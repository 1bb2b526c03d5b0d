"""Mistakes in data files are told all at once, by `check --resolve` and before anything is planned."""

import json

import effc
import pytest
from effc.compiler.cli.main import main
from effc.compiler.inputs.records import LISTED, read_records
from effc.dsl.syntax.diagnostics import Reject

RECIPE = """effspec 1
model base = zoo("tiny-llama")
data asked = choices("asked.jsonl")
data said  = pairs("said.jsonl", length: 32)
data away  = text("away.txt", length: 32)
pipeline lean(base) { s = prune.channels(keep: 50% of channels, score: perplexity(said)) }
expect lean { choice(asked) >= 0.2 perplexity(away) <= 1.5 * base }
emit lean { hf("lean") }
"""


def test_all_mistakes_of_all_data_files_are_told_at_once(tmp_path, capsys):
    (tmp_path / "r.effspec").write_text(RECIPE)
    records = [{"question": "2?", "options": ["one", "two"], "answer": answer} for answer in ("two", "seven", 9)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "said.jsonl").write_text('{"prompt": "a", "answer": ""}\nb\n{"prompt": "", "answer": "c"}\n')
    assert main(["check", str(tmp_path / "r.effspec"), "--resolve", "--cache-dir", str(tmp_path / "c")]) == 3
    told = capsys.readouterr().err
    assert "record 2 of" in told and "record 3 of" in told and "line 2 of" in told
    assert "away.txt" in told and told.count("missing-file") == 1
    with pytest.raises(Reject) as refused:
        effc.plan(tmp_path / "r.effspec", cache_dir=tmp_path / "c")
    assert len([d for d in refused.value.diagnostics if d.severity == "error"]) == 3
    assert main(["check", str(tmp_path / "r.effspec")]) == 0  # which reads no data


def test_a_file_of_many_mistakes_names_some_and_counts_the_others(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join("no" for _ in range(LISTED + 5)))
    with pytest.raises(Reject) as refused:
        read_records(tmp_path / "x.jsonl")
    assert len(refused.value.diagnostics) == LISTED
    assert refused.value.diagnostics[-1].note == "there are 5 more like these"


def test_a_table_with_tabs_is_read_as_one_with_commas_is(tmp_path):
    (tmp_path / "x.tsv").write_text('question\tanswer\n"a, b"\tc\n')
    assert read_records(tmp_path / "x.tsv") == [{"question": "a, b", "answer": "c"}]
