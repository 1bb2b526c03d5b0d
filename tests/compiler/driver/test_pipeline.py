"""The pipeline end to end on a tiny random model: kept results, kills, branches, refusals."""

import json
import os
import random
import signal
import time

import pytest
import torch
from effc.compiler.artifacts.artifact import artifact_hash
from effc.compiler.core.cache import Cache
from effc.compiler.core.journal import Journal
from effc.compiler.driver import api
from effc.dsl.syntax.diagnostics import Reject

from tests import tiny

RECIPE = """effspec 1
model base = config("tiny.json", seed: 3)
data  rows = synthetic(4, length: 12, seed: 1)

pipeline lean(base) {
  slim = prune.blocks(remove: 2, score: perplexity(rows))
  thin = prune.channels(keep: 50% of channels, align: 16, score: perplexity(rows))
}

emit lean { hf("lean", form: compact) }
"""


@pytest.fixture
def recipe(tmp_path):
    """A recipe file beside the config of a tiny Llama with random weights."""
    config = tiny.config("llama").to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    path = tmp_path / "tiny.effspec"
    path.write_text(RECIPE)
    return path


def compiled(recipe, name, **options):
    """(hash of the artifact, what happened) of a compile with a cache of that name."""
    events = []
    options = {"cache_dir": recipe.parent / f"cache-{name}", "threads": 1, "tell": events.append, **options}
    (result,) = api.compile(recipe, recipe.parent / f"out-{name}", force=True, **options)
    (artifact,) = result.artifacts
    return artifact_hash(artifact.path), [e for e in events if type(e).__name__ == "StageEnded"]


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_bytes_and_a_second_compile_runs_no_step(recipe):
    first, _ = compiled(recipe, "a")
    again, stages = compiled(recipe, "a")
    other, _ = compiled(recipe, "b")
    assert first == again == other
    assert [s.cached for s in stages] == [True, True, False]


def in_child(recipe, name):
    """Compile in a forked process; its number."""
    process = os.fork()
    if process == 0:
        try:
            compiled(recipe, name)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("times", [3, pytest.param(10, marks=pytest.mark.heavy)])
def test_killed_anywhere_and_often_a_compile_goes_on_to_the_same_bytes(recipe, times):
    torch.set_num_threads(1)
    started = time.monotonic()
    whole, _ = compiled(recipe, "whole")
    span = time.monotonic() - started
    moments = random.Random(5)
    for _ in range(times):
        process = in_child(recipe, "killed")
        time.sleep(moments.uniform(0, span))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        out = recipe.parent / "out-killed" / "lean"
        assert not out.exists() or artifact_hash(out) == whole  # there whole, or not at all
    assert compiled(recipe, "killed")[0] == whole


@pytest.mark.slow
def test_a_killed_search_does_not_score_again_what_it_had_scored(recipe, monkeypatch):
    session = api.open_session(recipe, cache_dir=recipe.parent / "cache", threads=1)
    (plan,) = api.plan_all_pipelines(session)
    work = Cache(session.settings.cache_dir).scratch_folder(plan.stages[0].key)
    computed, remember = [], Journal.get_or_compute

    def dying(self, key, compute):
        value = remember(self, key, compute)
        if self.path == work / "scores.jsonl" and len(self.known) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    def watched(self, key, compute):
        return remember(self, key, lambda: computed.append((self.path, key)) or compute())

    process = os.fork()
    if process == 0:
        Journal.get_or_compute = dying
        compiled(recipe, "x", cache_dir=recipe.parent / "cache")
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
    scored = {(work / "scores.jsonl", key) for key in Journal(work / "scores.jsonl").known}
    monkeypatch.setattr(Journal, "get_or_compute", watched)
    compiled(recipe, "x", cache_dir=recipe.parent / "cache")
    assert len(scored) == 3 and computed and not scored & set(computed)
    assert not work.exists()  # finished: its scratch is gone


@pytest.mark.slow
def test_a_change_of_one_step_keeps_the_steps_before_it(recipe):
    compiled(recipe, "a")
    recipe.write_text(RECIPE.replace("50% of channels", "66% of channels"))
    _, stages = compiled(recipe, "a")
    assert [s.cached for s in stages] == [True, False, False]


def test_a_step_that_changes_nothing_is_refused_at_its_place(recipe):
    recipe.write_text(RECIPE.replace("50% of channels", '50% of channels, on: "none.*" allow empty'))
    with pytest.raises(Reject) as refused:
        compiled(recipe, "a")
    (diagnostic,) = refused.value.diagnostics
    assert diagnostic.slug == "no-change" and diagnostic.exit == 3
    assert "prune.channels" in diagnostic.span.text


def test_the_bound_on_memory_is_kept(recipe):
    with pytest.raises(Reject, match="memory-bound") as refused:
        compiled(recipe, "a", max_memory=1 << 20)
    assert refused.value.exit == 6
    assert not (recipe.parent / "out-a" / "lean").exists()


@pytest.mark.slow
def test_a_saved_plan_is_followed_and_its_drift_refused(recipe):
    from effc.compiler.analysis.planning.plan import saved_plans_to_json

    options = {"cache_dir": recipe.parent / "cache", "threads": 1}
    saved = json.loads(json.dumps(saved_plans_to_json(api.plan(recipe, **options))))
    api.build(api.open_session(recipe, **options), recipe.parent / "out", saved_plans=saved)
    recipe.write_text(RECIPE.replace("remove: 2", "remove: 1"))
    with pytest.raises(Reject, match=r"plan-drift.*`remove` of step slim"):
        api.build(api.open_session(recipe, **options), recipe.parent / "out", saved_plans=saved, force=True)
