"""The shipped federations: each compiles, runs in this process, and does what its task is measured by."""

from pathlib import Path

import numpy as np
import pytest
from effc.compiler.apps.federation.app import PACKAGE
from effc.compiler.apps.federation.declaration import base_hash, read_declaration
from effc.compiler.apps.federation.simulation import simulate_federation
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api

RECIPES = Path(__file__).parents[4] / "recipes" / "federated"
NAMES = ["pretraining", "prompt-tuning", "reft"]


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_federation_checks(name, tmp_path):
    assert not api.check(RECIPES / f"{name}.effspec", cache_dir=tmp_path).diagnostics


@pytest.mark.heavy
@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_federation_learns_for_every_client_and_leaves_the_model_as_it_was(name, tmp_path):
    (made,) = api.compile(RECIPES / f"{name}.effspec", out=tmp_path, cache_dir=tmp_path / "cache", force=True)
    path = made.artifacts[0].path
    declared = read_declaration(path / PACKAGE / "federation.json")
    run = simulate_federation(declared, path / declared.folder, RECIPES, Settings(tmp_path / "cache"))
    first, last = run.course.rounds[0], run.course.rounds[-1]
    assert not last.faults and sorted(last.updates) == list(range(declared.clients))
    before = {client: turn.before for client, turn in first.updates.items()}
    gains = [before[client] - turn.loss for client, turn in last.updates.items()]
    assert np.mean(gains) > 0 and min(gains) > -0.05  # the worst client is not worse off
    sent = {turn.bytes_up for turn in last.updates.values()}
    if declared.trains == "prompt":
        assert declared.full == {"prompt": (8, 128)} and sent == {4 * 8 * 128}
    assert base_hash(path / declared.folder, tmp_path / "cache") == declared.base
