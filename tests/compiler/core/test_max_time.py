"""A compile whose searches may take only so long: what stands then, and that nothing of it is lost."""

import json
from dataclasses import replace

import pytest
from effc.compiler.artifacts.artifact import artifact_hash
from effc.compiler.core.cache import Cache
from effc.compiler.core.deadline import Deadline, DeadlineExceeded
from effc.compiler.core.events import Recorded
from effc.compiler.driver import api
from effc.compiler.driver.pipeline import Build
from effc.dsl.syntax.diagnostics import Reject

from tests import tiny

pytestmark = pytest.mark.slow

RECIPE = """effspec 1
model base = config("tiny.json", seed: 3)
data  rows = synthetic(4, length: 12, seed: 1)
pipeline lean(base) {
  slim = prune.multi(remove: 20% of params, order: [channels, heads], group: 16, score: perplexity(rows), data: rows)
  half = sparsify.magnitude(sparsity: 50% of weights)
}
emit lean { hf("lean", form: compact) }
"""


@pytest.fixture
def recipe(tmp_path):
    config = tiny.config("llama").to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    path = tmp_path / "tiny.effspec"
    path.write_text(RECIPE)
    return path


def compiled(recipe, cache, last=None, **more):
    """A compile whose time is over once the cut of this name is made; None: it has all that it wants."""
    events = []
    session = api.open_session(recipe, cache_dir=recipe.parent / cache, threads=1, **more)

    def tell(event):
        events.append(event)
        if last and isinstance(event, Recorded) and event.name.startswith(last):
            session.run.deadline.allowed = 0.0

    session.settings = replace(session.settings, on_event=tell)
    (result,) = api.build(session, recipe.parent / f"out-{len(list(recipe.parent.iterdir()))}")
    return result, [e.name for e in events if isinstance(e, Recorded) and e.name.startswith("cut ")]


def test_a_search_that_had_no_more_time_emits_its_best_and_later_goes_on_to_the_same_bytes(recipe):
    whole, cuts = compiled(recipe, "whole")
    assert len(cuts) > 3 and not whole.stopped
    early, some = compiled(recipe, "own", "cut 2:", max_time=3600.0)
    assert some == cuts[:2]
    (told,) = early.stopped
    assert told.slug == "out-of-time" and told.exit == 6 and "2 cuts" in told.message and told.span
    assert [s["name"] for s in early.artifacts[0].manifest.steps] == ["slim", "half"]
    assert not Cache(recipe.parent / "own").is_step_complete(whole.plan.key_of("slim"))
    later, rest = compiled(recipe, "own")
    assert rest == cuts and not later.stopped
    first, second = (artifact_hash(r.artifacts[0].path) for r in (whole, later))
    assert first == second != artifact_hash(early.artifacts[0].path)
    assert {s.key for s in early.plan.stages}.isdisjoint(s.key for s in later.plan.stages)


def test_scores_of_a_search_that_was_stopped_are_not_asked_again(recipe):
    compiled(recipe, "own", "cut 2:", max_time=3600.0)
    (plan,) = api.plan(recipe, cache_dir=recipe.parent / "own", threads=1)
    journal = Cache(recipe.parent / "own").scratch_folder(plan.stages[0].key) / "scores.jsonl"
    before = journal.read_bytes().splitlines()
    session = api.open_session(recipe, cache_dir=recipe.parent / "own", threads=1)
    (plan,) = api.plan_all_pipelines(session)
    build = Build(plan, session.context(plan.recipe, plan.pipeline), Cache(recipe.parent / "own"))
    kept = []
    finish = build.cache.write_step_record
    build.cache.write_step_record = lambda *args: kept.extend(journal.read_bytes().splitlines()) or finish(*args)
    build.run_step_unless_cached(plan.stages[0])
    assert kept[: len(before)] == before and len(kept) > len(before) > 4


def test_a_time_too_short_for_one_cut_names_the_shortest(recipe):
    with pytest.raises(Reject) as refused:
        compiled(recipe, "own", max_time=1e-6)
    (told,) = refused.value.diagnostics
    assert told.slug == "no-time" and told.exit == 6 and "--max-time" in told.help and told.span


def test_time_that_no_search_needs_is_not_missed(recipe):
    recipe.write_text(RECIPE.replace("  slim = prune.multi", "  # slim = prune.multi"))
    result, _ = compiled(recipe, "own", max_time=1e-6)
    assert not result.stopped and result.artifacts


def test_a_search_over_a_family_stops_at_the_front_so_far(recipe):
    recipe.write_text(
        RECIPE[: RECIPE.index("  slim =")]
        + "  net = supernet.elastic(channels: [100%, 50%], heads: [100%, 50%], data: rows, steps: 0)\n"
        + '  few = search.random(measure: [perplexity(rows), params], evals: 8)\n}\nemit lean { front("few") }\n'
    )
    events = []
    session = api.open_session(recipe, cache_dir=recipe.parent / "own", threads=1, max_time=3600.0)

    def tell(event):
        events.append(event)
        if getattr(event, "label", "") == "evaluated" and event.done == 3:
            session.run.deadline.allowed = 0.0

    session.settings = replace(session.settings, on_event=tell)
    (result,) = api.build(session, recipe.parent / "out")
    assert "3 choices of 8 evaluated" in result.stopped[0].message
    assert result.artifacts[0].manifest.steps[-1]["decisions"][-1]["evaluated"] == 3


def test_only_what_may_be_left_is_broken_off():
    deadline = Deadline(0.0)
    deadline.check()
    with pytest.raises(DeadlineExceeded), deadline.may_interrupt_search():
        pytest.fail("there was no time for this")
    deadline.check()
