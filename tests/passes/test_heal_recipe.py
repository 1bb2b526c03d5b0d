"""`tune.heal` in a recipe: what is kept, what the manifest and the plan tell, and going on after a kill."""

import json
import shutil
import sys
import time

import pytest
import torch
from effc.compiler.analysis.planning import peak_memory
from effc.compiler.core.cache import Cache
from effc.compiler.driver import api
from effc.compiler.driver.pipeline import Build
from effc.dsl.checker.values import DataRef
from effc.dsl.syntax.diagnostics import Reject

from tests import tiny
from tests.killing import kill_often
from tests.passes.test_heal import FULL, loss, refused, written


def building(recipe, cache):
    session = api.open_session(recipe, cache_dir=recipe.parent / cache, threads=1)
    (plan,) = api.plan_all_pipelines(session)
    return Build(plan, session.context(plan.recipe, plan.pipeline), Cache(session.settings.cache_dir))


def stepped(recipe, cache):
    """What the cache keeps of the last step, after all steps have run."""
    build = building(recipe, cache)
    for stage in build.plan.stages:
        build.run_step_unless_cached(stage)
    return build.cache.read_complete_step(build.plan.stages[-1].key)


@pytest.mark.slow
def test_a_kept_result_is_the_healed_model(tmp_path):
    recipe = written(tmp_path, "tune.heal(data: rows, steps: 9, lr: 1e-2)")
    first, second = building(recipe, "cache"), building(recipe, "cache")
    for stage in first.plan.stages:
        first.run_step_unless_cached(stage)
    key, rows = first.plan.stages[-1].key, first.ctx.rows(DataRef("rows"))
    assert loss(second.load_outcome(key).program.model, rows) == loss(first.load_outcome(key).program.model, rows)
    assert loss(second.load_outcome(key).program.model, rows) < loss(
        second.load_outcome(second.plan.stages[0].key).program.model, rows
    )


@pytest.mark.slow
def test_the_manifest_tells_the_loss_curve(tmp_path):
    recipe = written(tmp_path, "tune.heal(data: rows, steps: 20, lr: 1e-2, distill: 50%)")
    (result,) = api.compile(recipe, tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
    (artifact,) = result.artifacts
    (note,) = artifact.manifest.steps[-1]["decisions"]
    assert note["method"] == "lora" and note["loss"][-1][1] < note["loss"][0][1]


@pytest.mark.slow
def test_responses_alone_are_learned_and_judged(tmp_path):
    """The loss before training is that of the assistants' tokens, by hand; after it they are predicted better."""
    for name, words in (("a", "begat bread corn David"), ("b", "earth fire grace house")):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(
                json.dumps({"q": f"And what of {word}? {n}", "a": f"The {word} of the LORD"}) + "\n"
                for n in range(8)
                for word in words.split()
            )
        )
    (tmp_path / "chat.effspec").write_text("""effspec 1
model base = zoo("tiny-llama")
data talk = chat("a.jsonl", length: 32, prompt: "q", response: "a")
data dev = chat("b.jsonl", length: 32, prompt: "q", response: "a")
pipeline lean(base) {
  fit = tune.heal(data: talk, held_out: dev, learn: responses, steps: 12, every: 6, lr: 3e-3)
}
emit lean { hf("lean") }
""")
    build = building(tmp_path / "chat.effspec", "cache")
    build.run_step_unless_cached(build.plan.stages[0])
    (note,) = [n for n in build.results.outcome.program.notes if "held_out" in n]
    tokenizer, model = build.ctx.tokenizer, build.ctx.origin.load()
    ids = build.ctx.rows(DataRef("dev"))
    said = torch.stack(list(build.ctx.data(DataRef("dev")).assistant_masks(tokenizer, build.ctx))).bool()
    assert 0.2 < said.float().mean() < 0.8
    with torch.no_grad():
        values = model(input_ids=ids).logits[:, :-1][said[:, 1:]]
    expected = torch.nn.functional.cross_entropy(values, ids[:, 1:][said[:, 1:]]).item()
    first, last = note["held_out"][0][1], note["held_out"][-1][1]
    assert first == pytest.approx(expected, rel=1e-4) and last < 0.8 * first


def test_rows_in_which_nobody_speaks_have_no_responses(tmp_path):
    diagnostic = refused(tmp_path, tiny.model("llama"), learn="responses", **FULL)
    assert diagnostic.slug == "no-speakers" and "`rows`" in diagnostic.message


def test_the_original_is_asked_before_the_first_pass(tmp_path):
    recipe = written(tmp_path, "tune.heal(data: rows, steps: 2, lr: 1e-2, distill: 50%)")
    build = building(recipe, "cache")
    build.run_step_unless_cached(build.plan.stages[0])
    assert list((tmp_path / "cache" / "references").glob("*.safetensors"))


@pytest.mark.slow
def test_killed_many_times_a_compile_goes_on_to_the_same_bytes(tmp_path):
    torch.set_num_threads(1)
    recipe = written(tmp_path, "tune.heal(data: rows, steps: 60, lr: 1e-2, save: 3)")
    started = time.monotonic()
    whole = stepped(recipe, "whole")
    kill_often(
        lambda: stepped(recipe, "killed"),
        lambda: shutil.rmtree(tmp_path / "killed"),
        time.monotonic() - started,
        seed=4,
        times=2,
    )
    assert stepped(recipe, "killed") == whole


def test_plan_tells_what_training_takes(tmp_path, monkeypatch):
    # The process itself is part of each plan, and what earlier tests left may be freed between two of them.
    monkeypatch.setattr(peak_memory, "trim_heap_and_get_memory_bytes", lambda: 300 << 20)

    def planned(heal):
        (plan,) = api.plan(written(tmp_path, heal), cache_dir=tmp_path / "cache", threads=1)
        return plan.stages[1]

    few, many = (planned(f"tune.heal(data: rows, steps: {steps}, batch: 3)") for steps in (10, 20))
    assert 0 < few.seconds < many.seconds <= 2 * few.seconds
    full = planned("tune.heal(data: rows, steps: 10, batch: 3, method: full)")
    wide = planned("tune.heal(data: rows, steps: 10, batch: 6, method: full)")
    assert few.peak_bytes < full.peak_bytes < wide.peak_bytes
    assert few.before == few.after


def test_without_peft_adapters_are_refused_before_any_weight_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    options = {"cache_dir": tmp_path / "cache", "threads": 1}
    with pytest.raises(Reject, match="package-missing") as caught:
        api.plan(written(tmp_path, "tune.heal(data: rows)"), **options)
    assert caught.value.exit == 5 and "effc[tune]" in caught.value.diagnostics[0].help
    assert api.plan(written(tmp_path, "tune.heal(data: rows, method: full)"), **options)
