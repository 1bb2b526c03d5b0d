"""What the engine would refuse is known before any weight is read, and nothing else is."""

import json
import re
from functools import partial

import pytest
import torch
import transformers
from effc.compiler.analysis.discovery.discover import discover
from effc.compiler.analysis.planning import shrink
from effc.compiler.driver import api
from effc.compiler.ir.capture.capture import capture
from effc.compiler.models.checkpoints.fake_weights import build_with_random_weights
from effc.compiler.models.checkpoints.origin import Origin
from effc.compiler.plugin.registry import Registry
from effc.compiler.runtimes.native.engine_support import engine_rejection
from effc.compiler.runtimes.native.linears import NumberFormats
from effc.compiler.runtimes.native.plan_files import PLAN, write_plan
from effc.compiler.runtimes.native.reader import Reader
from effc.dsl.checker.recipe import Invocation
from effc.dsl.syntax.diagnostics import Reject

from tests import mixers, tiny, worlds
from tests.compiler.runtimes.native.survey import made
from tests.compiler.runtimes.native.test_plans import MIXTURES, NATIVE, REFUSED, STATEFUL, WRITTEN
from tests.grids import wide

torch.set_num_threads(1)
RECIPE = """effspec 1
model base = config("tiny.json", seed: 3)
data rows = synthetic(4, length: 12, seed: 1)

pipeline lean(base) {{
  slim = {step}
}}

emit lean {{
  native("cpu")
}}
"""
NARROW = "prune.channels(keep: 75% of channels)"
TAKE_OUT = "prune.blocks(remove: 1, score: perplexity(rows))"

ALL = (*NATIVE, *STATEFUL, *WRITTEN, *MIXTURES, *REFUSED)


def origin_of(name):
    build = partial(mixers.blank, name)
    return Origin(name, {}, None, name, build, build, lambda: None)


@pytest.mark.parametrize("name", wide(ALL, ALL[::6]))
def test_the_same_is_foreseen_from_the_config_as_is_found_in_the_model(name):
    try:
        Reader(capture(mixers.model(name)), NumberFormats("bf16")).build_plan()
        wanted = None
    except Reject as refused:
        wanted = str(refused)
    found = engine_rejection(origin_of(name), NumberFormats("bf16"))
    assert (found and str(found)) == wanted
    assert (wanted is not None) == (name in REFUSED)


@pytest.mark.parametrize("name", ["kolibri1", "jetmoe", "minimax", "zamba", "xmod", "doge"])
@pytest.mark.slow
def test_what_is_recognised_by_trying_is_so_with_numbers_that_stand_in(name):
    config = made(name).config
    build = partial(transformers.AutoModelForCausalLM.from_config, config, dtype=torch.float32)
    assert engine_rejection(Origin(name, {}, None, name, build, build, lambda: None), NumberFormats("bf16")) is None


def test_numbers_that_stand_in_for_weights_take_no_room():
    model = build_with_random_weights(origin_of("llama").build)
    assert not any(p.is_meta for p in model.parameters())
    assert model.lm_head.weight.isfinite().all()
    wide = partial(tiny.blank, "llama", vocab_size=1 << 20, tie_word_embeddings=True)
    model = build_with_random_weights(wide)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.untyped_storage().nbytes() == 4 * 64


@pytest.fixture
def written(tmp_path):
    config = tiny.config("llama", hidden_act="mish").to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "tiny.json").write_text(json.dumps(config))

    def write(step):
        path = tmp_path / "r.effspec"
        path.write_text(RECIPE.format(step=step))
        return path

    return write


@pytest.mark.slow
def test_a_plan_refuses_what_the_engine_has_no_step_for_where_the_target_stands(written, monkeypatch):
    path = written(NARROW)
    with pytest.raises(Reject) as refused:
        api.plan(path, cache_dir=path.parent / "cache")
    (found,) = refused.value.diagnostics
    assert (found.slug, found.exit) == ("cannot-run-natively", 5)
    assert found.span.text == 'native("cpu")'
    assert "mlp.act_fn (MishActivation" in found.message  # not the multiplication that wants its result
    monkeypatch.setattr(
        "effc.compiler.runtimes.native.engine_support.engine_rejection", lambda *_: pytest.fail("looked at again")
    )
    with pytest.raises(Reject, match=re.escape(found.message)):
        api.plan(path, cache_dir=path.parent / "cache")


def test_a_compile_is_refused_before_a_pass_runs(written):
    path, events = written(NARROW), []
    with pytest.raises(Reject, match="cannot-run-natively"):
        api.compile(path, path.parent / "out", cache_dir=path.parent / "cache", on_event=events.append)
    assert not [e for e in events if type(e).__name__ == "StageBegan"]


def test_where_a_step_may_take_out_what_is_refused_the_plan_only_warns(written):
    path, events = written(TAKE_OUT), []
    (plan,) = api.plan(path, cache_dir=path.parent / "cache", on_event=events.append)
    assert plan.stages
    (said,) = [e.message for e in events if type(e).__name__ == "Warned"]
    assert "native would refuse the model as it is: " in said and said.endswith("unless `slim` takes that out")


def test_a_model_that_hears_is_refused_by_what_its_encoder_would_need(tmp_path):
    worlds.hearing(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    make = partial(transformers.WhisperForConditionalGeneration, config)
    refused = engine_rejection(Origin("whisper", {}, None, "whisper", make, make, lambda: None), NumberFormats("bf16"))
    assert "has no convolution that sees what follows" in refused.diagnostics[0].message


def test_a_model_of_images_is_refused_by_what_it_takes():
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    build = partial(transformers.ViTForImageClassification, config)
    refused = engine_rejection(Origin("vit", {}, None, "vit", build, build, lambda: None), NumberFormats("bf16"))
    assert "it takes pixel_values, and the engine reads token ids" in refused.diagnostics[0].message


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_the_size_of_its_file_is_foreseen_with_tables_that_are_and_are_not_shared(tmp_path, weights, tied):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 4096}
    model = tiny.model("llama", tie_word_embeddings=tied, **sizes)
    program = capture(model)
    target = Registry().make("target", Invocation("native", {"path": "a", "weights": weights}))
    now = discover(program)
    planned = target.weight_bytes(shrink.stored_weight_specs(now, now))
    numbers = NumberFormats.from_target_arguments(weights, "int8", 64, "auto")
    write_plan(Reader(program, numbers).build_plan(), tmp_path, {"class": "X", "model_type": "llama", "params": 1})
    stored = json.loads((tmp_path / PLAN).read_text())["entries"].values()
    assert planned == pytest.approx(sum(entry["bytes"] for entry in stored), rel=0.001)
