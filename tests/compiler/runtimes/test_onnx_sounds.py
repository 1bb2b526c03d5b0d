"""An encoder of sounds with a decoder as ONNX: three graphs as hosts of Whisper name them, and what opens them."""

import pytest
import torch
from effc.compiler.apps.serving.chat import refuse_without_generate
from effc.compiler.artifacts.load import load
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.dsl.syntax.diagnostics import Reject
from transformers import GenerationMixin

from tests import worlds
from tests.compiler.runtimes.native.test_translators import assert_near
from tests.compiler.runtimes.test_onnx_sources import GRAPHS, pytestmark  # noqa: F401 (marks this file, too)

runtime = pytest.importorskip("onnxruntime")
torch.set_num_threads(1)
RECIPE = """effspec 1
model base = hf("./whisper")
data heard = sounds("clips.jsonl", length: 10)
pipeline small(base) {
  cut = prune.channels(keep: 75% of channels)
}
expect small {
  perplexity(heard) <= 1.5 * base
}
emit small {
  hf("small")
  onnx("runtime")
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A pruned Whisper as ONNX and for transformers; a fresh process compared it, and its perplexity was measured."""
    folder = tmp_path_factory.mktemp("sounds")
    worlds.hearing(folder / "whisper")
    worlds.clips(folder)
    (folder / "r.effspec").write_text(RECIPE)
    (result,) = api.build(
        api.open_session(folder / "r.effspec", settings=Settings(folder / "cache", threads=1)), folder
    )
    return {artifact.path.name: artifact for artifact in result.artifacts}


def features(rows=2, seed=0):
    return torch.randn(rows, 16, 100, generator=torch.Generator().manual_seed(seed))


def test_a_fresh_process_said_32_tokens_of_sounds_in_onnx_runtime(compiled):
    (check,) = [c for c in compiled["runtime"].manifest.checks if "decode steps" in c.what]
    assert check.holds


def test_hosts_that_know_the_names_hear_as_transformers_does(compiled):
    """By the names of optimum's ORTModelForSpeechSeq2Seq: no mask, as a sound is heard whole."""
    folder, model = compiled["runtime"].path / "onnx", load(compiled["small"].path)
    encoder, first, further = (runtime.InferenceSession(folder / f"{name}.onnx") for name in GRAPHS)
    assert [i.name for i in encoder.get_inputs()] == ["input_features"]
    assert [i.name for i in first.get_inputs()] == ["input_ids", "encoder_hidden_states"]
    sounds, said = features(3), torch.arange(15).view(3, 5) + 4
    (states,) = encoder.run(None, {"input_features": sounds.numpy()})
    names = [o.name.replace("present.", "past_key_values.") for o in first.get_outputs()[1:]]
    assert [i.name for i in further.get_inputs()] == ["input_ids", *names]
    logits, *kept = first.run(None, {"input_ids": said[:, :2].numpy(), "encoder_hidden_states": states})
    past, found = dict(zip(names, kept, strict=True)), [torch.from_numpy(logits)]
    for place in range(2, 5):
        given = {"input_ids": said[:, place : place + 1].numpy(), **past}
        out = dict(zip([o.name for o in further.get_outputs()], further.run(None, given), strict=True))
        found.append(torch.from_numpy(out.pop("logits")))
        past |= {name.replace("present.", "past_key_values."): x for name, x in out.items()}
    with torch.no_grad():
        wanted = model(input_features=sounds, decoder_input_ids=said).logits
    assert_near(torch.cat(found, 1), wanted, 1e-4)


def test_what_is_loaded_says_of_sounds_what_transformers_says(compiled):
    model, own = load(compiled["small"].path), load(compiled["runtime"].path)
    sounds, said = features(), torch.arange(12).view(2, 6) + 4
    with torch.no_grad():
        wanted = model(input_features=sounds, decoder_input_ids=said).logits
    assert_near(own(sounds, decoder_input_ids=said).logits, wanted, 1e-4)
    begun = own(sounds, decoder_input_ids=said[:, :3], use_cache=True)
    again = own(encoder_outputs=(begun.encoder_last_hidden_state,), decoder_input_ids=said[:, :3], use_cache=True)
    for out in (begun, again):
        assert_near(out.logits, wanted[:, :3], 1e-4)
        assert_near(own(decoder_input_ids=said[:, 3:], cache=out.cache).logits, wanted[:, 3:], 1e-4)


def test_tokens_that_are_said_are_the_likeliest(compiled):
    model, own = load(compiled["small"].path), load(compiled["runtime"].path)
    sounds, begun = features(), torch.tensor([[0, 5], [0, 7]])
    made = own.generate(sounds, decoder_input_ids=begun, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert made.shape == (2, 10) and torch.equal(made[:, :2], begun)
    with torch.no_grad():
        logits = model(input_features=sounds, decoder_input_ids=made[:, :-1]).logits[:, 1:]
    logits[..., model.config.eos_token_id] = -torch.inf  # eight tokens were asked for
    logits[:, 0, [t for t in model.generation_config.begin_suppress_tokens if t < logits.shape[2]]] = -torch.inf
    assert torch.equal(made[:, 2:], logits.argmax(-1))


def test_beams_of_sounds_are_those_of_transformers(compiled):
    model, opened = load(compiled["small"].path), load(compiled["runtime"].path)
    options = {"decoder_input_ids": torch.tensor([[0, 5], [0, 7]]), "max_new_tokens": 6, "num_beams": 3}
    expected = GenerationMixin.generate(model, features(), **options)
    assert torch.equal(opened.generate(features(), **options), expected)


@pytest.mark.parametrize("form", ["small", "runtime"])
def test_who_talks_to_one_that_hears_is_told_so(compiled, form):
    with pytest.raises(Reject, match="hears sounds and reads no prompt"):
        refuse_without_generate(load(compiled[form].path))


def test_features_of_another_size_are_refused(compiled):
    own = load(compiled["runtime"].path)
    with pytest.raises(Reject, match=r"hears \[sounds, 16, 100\]"):
        own(torch.zeros(2, 16, 99), decoder_input_ids=torch.tensor([[4], [4]]))
