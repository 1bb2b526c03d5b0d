"""`--device`: models are moved there. The meta device stands for one: it is everywhere, and is not the CPU."""

import json

import pytest
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.core.cache import Cache
from effc.compiler.core.device import refuse_unusable_device
from effc.compiler.driver import api
from effc.compiler.driver.judging.gate import baseline_origin
from effc.compiler.ir.step_results import StepResults
from effc.dsl.syntax.diagnostics import Reject

from tests import tiny

RECIPE = """effspec 1
model base = config("tiny.json", seed: 3)
pipeline lean(base) {
  slim = prune.channels(keep: 50% of channels, align: 16)
}
emit lean { hf("lean", form: stock) }
"""


@pytest.fixture
def recipe(tmp_path):
    config = tiny.config("llama").to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    path = tmp_path / "r.effspec"
    path.write_text(RECIPE)
    return path


def context(recipe, device):
    session = api.open_session(recipe, cache_dir=recipe.parent / "cache", threads=1, device=device)
    made = session.recipes()[0]
    return session.context(made, made.pipelines["lean"])


def devices(model):
    return {t.device.type for t in (*model.parameters(), *model.buffers())}


def test_an_original_is_loaded_to_the_device_as_a_baseline_too(recipe):
    for device in ("cpu", "meta"):
        ctx = context(recipe, device)
        assert devices(ctx.origin.load()) == devices(baseline_origin("base", ctx).load()) == {device}


@pytest.mark.slow
def test_a_kept_step_is_restored_to_the_device(recipe):
    api.compile(recipe, recipe.parent / "out", cache_dir=recipe.parent / "cache", threads=1)
    cache = Cache(recipe.parent / "cache")
    (entry,) = cache.finished_steps()
    for device in ("cpu", "meta"):
        origin = context(recipe, device).origin
        program = StepResults(cache, origin).load_outcome(entry.key).program
        assert devices(program.model) == {device} and {g.count for g in skeleton_of(program).groups} == {48, 4, 2}
        assert program.inputs["input_ids"].device.type == device


@pytest.mark.parametrize("name", ["", "gpu", "auto:1"])
def test_a_word_that_is_no_device_is_a_wrong_flag(name):
    with pytest.raises(Reject) as refused:
        refuse_unusable_device(name)
    assert refused.value.diagnostics[0].slug == "unknown-device" and refused.value.exit == 2
