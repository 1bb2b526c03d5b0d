"""Settings are what a user grants; what a run decides or remembers stands elsewhere."""

from dataclasses import FrozenInstanceError

import pytest
import torch
from effc.compiler.core.device import set_torch_threads_and_fill_settings
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api

from tests.compiler.driver.test_outcomes import ADAPTERS, write


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_nobody_writes_into_settings(tmp_path):
    with pytest.raises(FrozenInstanceError):
        Settings(tmp_path).seed = 1


@pytest.mark.parametrize(("granted", "workers", "count"), [(2, "", 2), (None, "3", 1), (2, "3", 2)])
def test_threads_are_decided_once_and_torch_has_as_many(tmp_path, granted, workers, count):
    settings = Settings(tmp_path, threads=granted, workers=workers)
    assert set_torch_threads_and_fill_settings(settings).threads == count == torch.get_num_threads()
    assert settings.threads == granted


def test_contexts_of_a_session_have_the_threads_that_were_decided_and_share_the_state_of_the_run(tmp_path):
    recipe = write(tmp_path, ADAPTERS)
    opened = api.open_session(recipe, cache_dir=tmp_path / "cache", workers=2)
    (plan,) = api.plan_all_pipelines(opened)
    one, other = (opened.context(plan.recipe, plan.pipeline) for _ in range(2))
    assert one.settings.threads == 1 and one.run is other.run is opened.run
