"""What ships as the matrix is what runs."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from effc.compiler.core.architectures import FILE, parse_architecture_matrix

from tests.architectures.matrix import LOOKS, body, markdown_table, run
from tests.architectures.more import MORE
from tests.architectures.passes import WORDS
from tests.architectures.table import NAMES, ROWS

torch.set_num_threads(1)
MIN_SAMPLES = ("mixtral", "skip and concat")  # a model of transformers with experts, a plain convolutional net
TURN = int(os.environ.get("EFFC_TURN", datetime.date.today().toordinal()))  # which tenth is tried, and with what


def shipped() -> dict:
    return json.loads(FILE.read_text(encoding="utf-8"))


def agrees(words: dict[str, list[str]], folder) -> None:
    """No cell fails, and those that ship are as they ship."""
    found, known = body(run(list(words), words, folder))["rows"], shipped()["rows"]
    failed = [
        f"{name}: {stage}: {cell}" for name, row in found.items() for stage, cell in row.items() if cell[0] == "failed"
    ]
    assert not failed, failed
    both = {name: set(row) & set(known.get(name, {})) for name, row in found.items()}
    for name, stages in both.items():
        assert {stage: found[name][stage] for stage in stages} == {stage: known[name][stage] for stage in stages}, (
            f"EFFC_TURN={TURN}: run python -m tests.architectures.matrix --write and read the diff"
        )


@pytest.mark.slow
def test_some_architectures_do_what_the_shipped_matrix_says(tmp_path):
    agrees({name: shipped()["passes"] for name in MIN_SAMPLES}, tmp_path)


@pytest.mark.slow
def test_a_tenth_of_all_architectures_which_changes_by_the_day_does_too(tmp_path):
    """Each with one column: in ten days for every column all have been tried in all."""
    names, words = list(shipped()["rows"])[TURN % 10 :: 10], shipped()["passes"]
    agrees({name: [words[(TURN // 10 + place) % len(words)]] for place, name in enumerate(names)}, tmp_path)


@pytest.mark.heavy
@pytest.mark.timeout(5400)
def test_all_architectures_do_what_the_shipped_matrix_says(tmp_path):
    agrees({name: list(WORDS) for name in ROWS}, tmp_path)


def test_every_architecture_is_in_the_matrix_and_nothing_in_it_is_a_failure():
    found = shipped()
    assert list(found["rows"]) == [name for name in ROWS if name in found["rows"]]
    assert set(NAMES) <= set(found["rows"])
    states = [cell[0] for row in found["rows"].values() for cell in row.values()]
    assert set(states) == {"green", "refused", "none"}
    assert found["counts"] == {
        "green": states.count("green"),
        "refused": states.count("refused"),
        "total": states.count("green") + states.count("refused"),
    }
    assert all(found["rows"][name][look][0] != "refused" for name in NAMES if name not in MORE for look in LOOKS), (
        "all of the twenty-five are captured"
    )


def test_every_refusal_is_a_sentence():
    for why in parse_architecture_matrix().refusals:
        assert why[0].islower() or why[0].isupper() or why[0].isdigit() or why[0] == "`"
        assert not why.endswith(".") and "Traceback" not in why and len(why) < 400


def test_doctor_prints_the_matrix():
    command = "from effc.compiler.cli.main import main; raise SystemExit(main(['doctor', '--architectures']))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    found = parse_architecture_matrix()
    assert done.returncode == 0 and found.summary in done.stdout
    for name in shipped()["rows"]:
        assert f"\n{name}" in done.stdout
    assert markdown_table(found).count("\n| ") == len(shipped()["rows"]) + 1


def test_the_page_shows_the_matrix():
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert markdown_table(parse_architecture_matrix()).strip() in page, (
        "python -m tests.architectures.matrix --write puts it there"
    )
