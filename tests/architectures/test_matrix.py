"""What ships as the matrix is what runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from effc.compiler.report.architectures import FILE, markdown, matrix

from tests.architectures.matrix import LOOKS, body, run
from tests.architectures.more import MORE
from tests.architectures.passes import PASSES
from tests.architectures.table import NAMES

torch.set_num_threads(1)
FEW = ("mixtral", "skip and concat")  # a model of transformers with experts, a plain convolutional net


def shipped() -> dict:
    return json.loads(FILE.read_text(encoding="utf-8"))


def agrees(names, folder) -> None:
    found = body(run(list(names), list(PASSES), folder))
    ours = {name: found["rows"][name] for name in names}
    assert ours == {name: shipped()["rows"][name] for name in names}, (
        "run python -m tests.architectures.matrix --write and read the diff"
    )


def test_some_architectures_do_what_the_shipped_matrix_says(tmp_path):
    agrees(FEW, tmp_path)


@pytest.mark.heavy
@pytest.mark.timeout(1500)
def test_all_architectures_do_what_the_shipped_matrix_says(tmp_path):
    agrees(NAMES, tmp_path)


def test_every_architecture_is_in_the_matrix_and_nothing_in_it_is_a_failure():
    found = shipped()
    assert list(found["rows"]) == list(NAMES)
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
    for why in matrix().refusals:
        assert why[0].islower() or why[0].isupper() or why[0].isdigit() or why[0] == "`"
        assert not why.endswith(".") and "Traceback" not in why and len(why) < 400


def test_doctor_prints_the_matrix():
    command = "from effc.compiler.cli import main; raise SystemExit(main(['doctor', '--architectures']))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    found = matrix()
    assert done.returncode == 0 and found.summary in done.stdout
    for name in NAMES:
        assert f"\n{name}" in done.stdout
    assert markdown(found).count("\n| ") == len(NAMES) + 1


def test_the_page_shows_the_matrix():
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert markdown(matrix()).strip() in page, "python -m tests.architectures.matrix --write puts it there"
