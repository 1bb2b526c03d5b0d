"""Models of several inputs: rows hold all of them, and whatever scores, cuts and learns takes them apart again."""

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.artifacts.verify import make_probe_inputs
from effc.compiler.artifacts.verify_child import probe_model
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.compiler.evaluation import equivalence
from effc.compiler.inputs.data.sounds import _read_wav
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.capture.sample import sample_inputs
from effc.compiler.models.rows.forward import outputs
from effc.compiler.models.rows.inputs import forward_args_and_kwargs, targets_and_prediction_mask
from effc.compiler.models.rows.packed_inputs import can_generate_from_ids_alone, pack_inputs, packed_input_parts
from effc.compiler.runtimes.native.reader import Reader
from effc.compiler.transforms.search.layerwise import Layerwise, stages
from effc.dsl.syntax.diagnostics import Reject
from safetensors.torch import save_file
from torch import nn

from tests import worlds
from tests.architectures.table import randomized

torch.set_num_threads(1)
_TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 1,
}
_IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}


def towers(kind: str) -> nn.Module:
    config = transformers.AutoConfig.for_model(kind, text_config=_TEXT, vision_config=_IMAGE, projection_dim=32)
    return randomized(lambda: transformers.AutoModel.from_config(config, dtype=torch.float32))


class Denoiser(nn.Module):
    """A convolution whose channels a timestep and a text steer, as diffusion models have them."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.time, self.text = nn.Embedding(1000, 16), nn.MultiheadAttention(16, 4, kdim=8, vdim=8, batch_first=True)
        self.dummy_inputs = {
            "sample": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor([3, 7]),
            "encoder_hidden_states": torch.randn(2, 5, 8),
        }

    def forward(self, sample, timestep, encoder_hidden_states):
        x = self.enter(sample)
        steered = self.text(self.time(timestep)[:, None], encoder_hidden_states, encoder_hidden_states)[0]
        return self.leave(nn.functional.silu(x + steered[:, 0, :, None, None]))


def test_rows_of_a_module_of_several_inputs_are_what_it_would_be_given_by_name():
    model = randomized(Denoiser)
    rows = pack_inputs(model.dummy_inputs, tuple(model.dummy_inputs))
    assert torch.equal(outputs(model, rows), model(**model.dummy_inputs))
    given = forward_args_and_kwargs(model, rows)[1]
    assert given["timestep"].dtype == torch.int64 and given["timestep"].tolist() == [3, 7]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_two_towers_are_one_program_of_units_in_both(kind):
    model = towers(kind)
    program, reference = capture(model), towers(kind)
    assert {path.split(".")[0] for path in program.units} == {"text_model", "vision_model"}
    assert not program.opaque
    said = equivalence.record_logits_of_sample_calls(reference)
    for unit in program.units.values():
        unit.install_graph_forward(program.model)
    assert equivalence.max_difference(said, equivalence.record_logits_of_sample_calls(program.model)) == 0.0
    assert {g.site.split(".")[0] for g in skeleton_of(program).groups} == {"text_model", "vision_model"}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_row_for_two_towers_is_an_image_with_its_text(kind):
    model = towers(kind)
    ids = torch.arange(20).view(2, 10) + 5
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    rows = pack_inputs({"pixel_values": image, "ids": ids}, ("pixel_values", "ids"))
    both = model(pixel_values=image, input_ids=ids)
    assert torch.equal(outputs(model, rows), torch.cat([both.text_embeds, both.image_embeds], -1))
    assert set(probe_model(model, make_probe_inputs(model))) == {"outputs of a batch"}


def test_waves_of_sound_are_what_wav2vec2_is_captured_with():
    config = transformers.Wav2Vec2Config(**{**_TEXT, "conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 4})
    model = randomized(lambda: transformers.Wav2Vec2Model(config))
    assert sample_inputs(model)["input_values"].dim() == 2
    program = capture(model)
    assert {"encoder.layers.0", "encoder.layers.1"} < set(program.units)
    assert {g.kind for g in skeleton_of(program).groups} >= {"heads", "channels"}
    assert set(probe_model(model, make_probe_inputs(model))) == {"outputs of a batch"}


def test_waves_have_the_axis_of_channels_that_a_first_convolution_is_given():
    """OmniASR hands what it is given to its first convolution; wav2vec2 adds the axis itself."""
    audio = {**_TEXT, "conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 4}
    config = transformers.AutoConfig.for_model("omniasr_ctc", audio_config=audio, vocab_size=32)
    model = randomized(lambda: transformers.AutoModelForCTC.from_config(config, dtype=torch.float32))
    assert sample_inputs(model)["input_values"].shape[:2] == (2, 1)
    assert {g.kind for g in skeleton_of(capture(model)).groups} >= {"heads", "channels"}


@pytest.mark.parametrize("kind", ["patchtst", "patchtsmixer"])
def test_time_series_are_what_a_model_that_continues_them_is_captured_with(kind):
    sizes = {"context_length": 32, "patch_length": 8, "num_input_channels": 3, "d_model": 16, "ffn_dim": 32}
    config = transformers.AutoConfig.for_model(kind, **sizes, num_hidden_layers=2, num_attention_heads=4)
    model = randomized(lambda: transformers.AutoModel.from_config(config, dtype=torch.float32))
    assert sample_inputs(model)["past_values"].shape == (2, 32, 3)
    assert "channels" in {g.kind for g in skeleton_of(capture(model)).groups}
    assert set(probe_model(model, make_probe_inputs(model))) == {"outputs of a batch"}
    with pytest.raises(Reject, match="takes `past_values`"):
        forward_args_and_kwargs(model, torch.ones(1, 8, dtype=torch.int64))


def test_a_model_whose_own_generate_wants_sounds_writes_nothing_and_is_compared_by_its_logits():
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.Pop2PianoConfig(**sizes, num_decoder_layers=2)
    model = randomized(lambda: transformers.Pop2PianoForConditionalGeneration(config))
    assert model.can_generate() and not can_generate_from_ids_alone(model)
    assert {name.split()[0] for name in probe_model(model, make_probe_inputs(model))} == {"logits"}
    assert can_generate_from_ids_alone(
        randomized(lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=4)))
    )


def test_norms_of_weights_are_captured_without_weights():
    config = transformers.Wav2Vec2Config(**{**_TEXT, "conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 4})
    with torch.device("meta"):
        program = capture(transformers.Wav2Vec2ForCTC(config))
    assert {g.kind for g in skeleton_of(program).groups} >= {"heads", "channels"}


def test_tokens_are_no_rows_of_a_model_that_takes_waves():
    config = transformers.Wav2Vec2Config(**{**_TEXT, "conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 4})
    with pytest.raises(Reject, match="takes `input_values`"):
        forward_args_and_kwargs(transformers.Wav2Vec2ForCTC(config), torch.ones(1, 8, dtype=torch.int64))


def test_pictures_of_sound_are_what_a_spectrogram_transformer_is_captured_with():
    config = transformers.ASTConfig(**{**_IMAGE, "max_length": 64, "num_mel_bins": 32, "patch_size": 16})
    model = randomized(lambda: transformers.ASTModel(config))
    assert sample_inputs(model)["input_values"].shape == (2, 64, 32)
    assert {g.kind for g in skeleton_of(capture(model)).groups} >= {"heads", "channels"}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_tower_of_images_with_a_head_finds_the_form_of_its_images_in_its_config(kind):
    config = transformers.AutoConfig.for_model(kind, text_config=_TEXT, vision_config=_IMAGE)
    model = randomized(lambda: transformers.AutoModelForImageClassification.from_config(config, dtype=torch.float32))
    assert sample_inputs(model)["pixel_values"].shape == (2, 3, 16, 16) and capture(model).units
    assert make_probe_inputs(model)["pixels"].shape == (2, 3, 16, 16)


def test_a_model_that_talks_of_images_is_probed_by_its_texts():
    config = transformers.VipLlavaConfig(text_config={**_TEXT, "model_type": "llama"}, vision_config=_IMAGE)
    model = randomized(lambda: transformers.VipLlavaForConditionalGeneration(config))
    assert "ids" in make_probe_inputs(model) and len(probe_model(model, make_probe_inputs(model), 2)) == 6


# -- sounds --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("sounds")
    worlds.hearing(made / "whisper")
    worlds.clips(made)
    return made


def compiled(folder, steps: str, bounds: str = "", data: str = 'sounds("clips.jsonl", length: 10)') -> list:
    path = folder / "r.effspec"
    path.write_text(
        f'effspec 1\nmodel base = hf("./whisper")\ndata heard = {data}\npipeline small(base) {{\n{steps}\n}}\n'
        f'expect small {{\n{bounds}\n}}\nemit small {{ hf("small") }}\n'
    )
    out = Path(tempfile.mkdtemp(dir=folder))
    return api.build(api.open_session(path, settings=Settings(folder / "cache", threads=1)), out)


def judged(result) -> float:
    """What the only bound came to."""
    (told,) = json.loads((result.artifacts[0].path / "measures.json").read_text())["expectations"]
    assert told["outcome"] == "holds"
    return told["value"]


@pytest.mark.slow
def test_what_a_model_says_of_sounds_is_scored_and_learned(folder):
    (result,) = compiled(
        folder,
        "a = prune.multi(remove: 5% of params, group: 8, score: divergence(heard))\n"
        "b = tune.heal(data: heard, steps: 30, lr: 0.01, method: full, batch: 6)",
        "perplexity(heard) <= 1000",
    )
    assert 1 < judged(result) < 30, "261 tokens would be as likely as each other, and it learned which are said"
    model = api.load(result.artifacts[0].path)
    assert sum(p.numel() for p in model.parameters()) > 0


def test_a_target_is_what_is_said_of_a_sound(folder):
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder / "whisper")
    opened = api.open_session(recipe_of(folder), settings=Settings(folder / "cache", threads=1))
    (recipe,) = opened.recipes()
    rows = opened.context(recipe, recipe.pipelines["small"]).tokenize_rows_once("heard")
    (part,) = packed_input_parts(model)
    assert part.shape == (16, 100) and rows.shape == (6, 1600 + 10)
    wanted, counted = targets_and_prediction_mask(model, rows)
    assert wanted[3].tolist()[:7] == [0, *[2 + i for i in ids_of(folder, "tone 3")]] or counted[3].sum() == 7
    given = forward_args_and_kwargs(model, rows)[1]
    assert given["input_features"].shape == (6, 16, 100) and given["decoder_input_ids"][:, 0].tolist() == [0] * 6


def recipe_of(folder):
    path = folder / "rows.effspec"
    path.write_text(
        'effspec 1\nmodel base = hf("./whisper")\ndata heard = sounds("clips.jsonl", length: 10)\n'
        "pipeline small(base) { a = sparsify.wanda(sparsity: 50% of weights, data: heard) }\n"
    )
    return path


def ids_of(folder, text: str) -> list[int]:
    return transformers.AutoTokenizer.from_pretrained(folder / "whisper")(text)["input_ids"]


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_are_the_same_in_every_width_of_pcm(tmp_path, width, channels):
    wave = [math.sin(t / 7) * 0.9 for t in range(400)]
    file = worlds.tone(tmp_path / "x.wav", wave, 16_000, width, channels)
    found = torch.from_numpy(_read_wav(file, 16_000))
    assert torch.allclose(found, torch.tensor(wave), atol=2 / 2 ** (8 * min(width, 3) - 1))


def test_another_rate_and_what_is_no_recording_are_refused(tmp_path):
    worlds.tone(tmp_path / "slow.wav", [0.0] * 10, 8_000)
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "none.wav").write_bytes(worlds.tone(tmp_path / "x.wav", [0.0] * 9, 16_000).read_bytes()[:20])
    for name in ("slow", "text", "none"):
        assert worlds.slug(lambda name=name: _read_wav(tmp_path / f"{name}.wav", 16_000)) == "bad-sound"


# -- tensors -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_features_made_elsewhere_are_rows_of_tensors(folder):
    features = torch.randn(4, 16, 100, generator=torch.Generator().manual_seed(0))
    said = torch.arange(20).view(4, 5) + 3
    save_file({"input_features": features, "decoder_input_ids": said}, folder / "batch.safetensors")
    data = 'tensors("batch.safetensors")'
    (result,) = compiled(folder, "a = prune.heads(keep: 75% of heads)", "divergence(heard) <= 10", data)
    assert judged(result) > 0


@pytest.mark.parametrize(
    ("tensors", "fact"),
    [
        ({"input_features": torch.zeros(2, 16, 100)}, "no tensor `decoder_input_ids`"),
        ({"input_features": torch.zeros(2, 16, 99), "decoder_input_ids": torch.ones(2, 3).long()}, "has the shape"),
        ({"input_features": torch.zeros(2, 16, 100), "decoder_input_ids": torch.full((2, 3), 300)}, "token id 300"),
        (
            {"input_features": torch.zeros(3, 16, 100), "decoder_input_ids": torch.ones(2, 3).long()},
            "different numbers",
        ),
        (
            {"input_features": torch.full((2, 16, 100), math.nan), "decoder_input_ids": torch.ones(2, 3).long()},
            "finite",
        ),
    ],
)
def test_tensors_that_are_no_rows_of_the_model_are_refused(folder, tensors, fact):
    save_file(tensors, folder / "odd.safetensors")
    with pytest.raises(Reject) as refused:
        compiled(folder, "a = sparsify.wanda(sparsity: 50% of weights, data: heard)", "", 'tensors("odd.safetensors")')
    assert fact in refused.value.diagnostics[0].message


def test_towers_that_are_given_everything_by_name_are_thinned_and_refused_by_the_engine():
    config = transformers.OwlViTConfig(
        text_config={**_TEXT, "max_position_embeddings": 16}, vision_config=_IMAGE, projection_dim=32
    )
    model = randomized(lambda: transformers.OwlViTModel(config))
    program = capture(model)
    given = sample_inputs(model)
    rows = pack_inputs({"pixel_values": given["pixel_values"], "ids": given["input_ids"]}, ("pixel_values", "ids"))
    assert forward_args_and_kwargs(model, rows)[0] == (), (
        "a picture comes before the text, so nothing is given by place"
    )
    layers, paths = Layerwise(program, rows), set()
    for stage in stages(program, [m for m in skeleton_of(program).parts if m.path.endswith("q_proj")]):
        layers.run_and_observe_inputs(stage, lambda path, module, x: paths.add(path))
        layers.mark_changed(stage)
    assert {path.split(".")[0] for path in paths} == {"text_model", "vision_model"}
    with pytest.raises(Reject, match="takes pictures as well"):
        Reader(program, "bf16").build_plan()
