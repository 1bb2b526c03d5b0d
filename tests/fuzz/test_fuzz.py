"""Every reader takes changed inputs or refuses them; `python -m tests.fuzz TARGET` goes on for as long as one likes."""

import os
import random
from pathlib import Path

import pytest

from tests.fuzz.__main__ import broken
from tests.fuzz.changes import changed
from tests.fuzz.targets import TARGETS
from tests.hostile import kinds

MIN_SAMPLES = dict.fromkeys(TARGETS, 40) | {"import": 6, "step": 12}  # inputs of a target in the default run
FOUND = sorted(Path(__file__).with_name("found").iterdir())  # TARGET-HASH: what once broke a reader
COUNT = int(os.environ.get("EFFC_FUZZ", "20000"))


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return kinds.honest(tmp_path_factory.mktemp("honest"))


def ways_to_break(name, honest, folder, count, seed):
    target = TARGETS[name]
    seeds, draw = target.seeds(honest), random.Random(f"{name} {seed}")
    for data in seeds:
        target.read(data, folder)
    return {why for _ in range(count) if (why := broken(target, changed(seeds, draw), folder))}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.slow
def test_changed_inputs_are_read_or_refused(honest, tmp_path, name):
    assert not ways_to_break(name, honest, tmp_path, MIN_SAMPLES[name], 0)


@pytest.mark.parametrize("file", FOUND, ids=lambda file: file.name)
def test_what_once_broke_a_reader_is_read_or_refused(honest, tmp_path, file):
    target = TARGETS[file.name.rpartition("-")[0]]
    target.seeds(honest)  # which set up what lies beside an input
    assert not broken(target, file.read_bytes(), tmp_path)


@pytest.mark.heavy
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", TARGETS)
def test_many_changed_inputs_are_read_or_refused(honest, tmp_path, name):
    assert not ways_to_break(name, honest, tmp_path, COUNT, 1)
