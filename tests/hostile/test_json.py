"""JSON of files that may come from anybody has one meaning, and lies in regular files alone."""

import ast
import os
from pathlib import Path

import pytest
from effc.compiler.core.safe_read import parse_strict_json, read_json
from effc.dsl.syntax.diagnostics import Reject

ROOT = Path(__file__).parents[2] / "compiler"
# Files that read what effc itself has just written, in this process or in a folder of its own.
LEAF_FUNCTIONS = {
    "artifacts/artifact.py": "notes of a draft",
    "artifacts/compact_config.py": "a config that transformers has just written",
    "artifacts/verify_child.py": "what this compile emitted; it knows nothing of effc",
    "artifacts/openers/export.py": "what this compile emitted; it knows nothing of effc",
    "artifacts/openers/plain.py": "what this compile emitted; it knows nothing of effc",
    "analysis/discovery/structure.py": "a skeleton of the zoo",
    "runtimes/gguf/llama_quantizer_child.py": "requests of the process that started it",
    "runtimes/gguf/llama_clock_child.py": "requests of the process that started it",
    "cli/editor/forecast.py": "questions of the editor's own process",
    "cli/editor/hints.py": "answers of a process that it started",
    "models/checkpoints/safetensors_header.py": "a header, each name once",
    "core/architectures.py": "a table of effc itself",
    "apps/federation/declaration.py": "its own JSON again",
    "runtimes/gguf/pretokenizers.py": "tokens that llama.cpp makes, from a process that it started",
    "runtimes/gguf/llama_tokens_child.py": "texts from the process that started it",
    "runtimes/gguf/vocabulary.py": "a tokenizer that its library has just written",
    "inputs/sources/gguf.py": "a config that transformers has just made",
    "driver/worker_team.py": "answers of processes that it started",
    "models/checkpoints/text_child.py": "what the process that started it asks",
    "models/checkpoints/text_process.py": "answers of a process that it started",
    "core/journal.py": "scratch of this step, sealed by lines",
    "core/sealed_json.py": "its own JSON again",
    "apps/rttc/targets/rttc.py": "its own JSON again",
    "transforms/training/run_files.py": "scratch of this step",
    "driver/workers/replica.py": "what the process that started it asks",
}


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '[{"x": {"k": [], "k": []}}]'])
def test_a_name_that_stands_twice_is_refused(text):
    with pytest.raises(ValueError, match="stands twice in one object"):
        parse_strict_json(text)


@pytest.mark.parametrize("depth", [101, 900, 100_000])
@pytest.mark.parametrize("ends", ["[]", ('{"a":', "}")])
def test_deep_nesting_is_refused(depth, ends):
    with pytest.raises(ValueError, match="nested too deep"):
        parse_strict_json(ends[0] * depth + "1" + ends[1] * depth)


@pytest.mark.parametrize("number", ["1" * 301, "-" + "9" * 4000, "1" * 100_000])
def test_a_number_that_no_fraction_is_as_large_as_is_refused(number):
    with pytest.raises(ValueError, match="digits"):
        parse_strict_json(f'{{"a": [{number}]}}')


@pytest.mark.parametrize("text", [r'"\ud800"', r'{"a": ["\uDC80"]}', r'{"\ud800": 1}', r'"\ude00\ud83d"'])
def test_half_of_a_surrogate_pair_is_refused(text):
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        parse_strict_json(text)


def test_a_whole_pair_and_an_escaped_backslash_are_read():
    assert parse_strict_json(r'["\ud83d\ude00", "\\ud800"]') == ["\N{GRINNING FACE}", r"\ud800"]


def test_ordinary_json_is_read(tmp_path):
    (tmp_path / "x").write_text('{"a": [1, {"b": Infinity}], "c": {"b": null}}')
    assert read_json(tmp_path / "x", 100) == {"a": [1, {"b": float("inf")}], "c": {"b": None}}


def test_a_pipe_a_device_and_a_large_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(b" " * 101)
    for name in ("pipe", "zero", "large"):
        with pytest.raises(Reject):
            read_json(tmp_path / name, 100)


@pytest.mark.slow
def test_files_of_others_are_read_by_these_readers_alone():
    """A plain `json.loads` takes the second of two equal names, and `read_bytes` waits at a pipe."""
    plain = set()
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.loads", "json.load"):
                plain.add(file.relative_to(ROOT).as_posix())
    assert plain - {"core/safe_read.py"} == set(LEAF_FUNCTIONS), (
        "use `read_json` or `parse_strict_json` of core/safe_read.py"
    )
