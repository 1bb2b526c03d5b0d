"""Models that take more than effc makes: the refusal names what is lacking, and not what the meta device lacks."""

import json

import pytest
import transformers
from effc.compiler.driver import api
from effc.compiler.ir.capture.capture import capture
from effc.dsl.syntax.diagnostics import Reject
from torch import nn

from tests.architectures import table

_TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


@pytest.mark.parametrize(
    ("lacking", "config"),
    [
        (
            "pixel_values",
            transformers.IdeficsConfig(
                **_TEXT,
                vision_config={"embed_dim": 32, "image_size": 32, "patch_size": 8, "num_hidden_layers": 1},
                use_resampler=False,
                architectures=["IdeficsForVisionText2Text"],
            ),
        ),
        (
            "qformer_input_ids",
            transformers.InstructBlipConfig(
                text_config={"model_type": "opt", **_TEXT, "ffn_dim": 48, "max_position_embeddings": 64},
                vision_config={**_TEXT, "image_size": 32, "patch_size": 8},
                qformer_config={**_TEXT, "encoder_hidden_size": 32},
                num_query_tokens=4,
                architectures=["InstructBlipForConditionalGeneration"],
            ),
        ),
    ],
    ids=["idefics", "instructblip"],
)
def test_a_forward_that_needs_pixels_and_tokens_is_refused_with_their_name(lacking, config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(json.loads(config.to_json_string())))
    (tmp_path / "r.effspec").write_text(
        'effspec 1\nmodel base = config("./config.json")\ndata rows = synthetic(count: 8, length: 16)\n'
        "pipeline small(base) { slim = prune.multi(remove: 10% of params, score: perplexity(rows)) }\n"
        'emit small { hf("small") }\n'
    )
    with pytest.raises(Reject) as refused:
        api.plan(tmp_path / "r.effspec", cache_dir=tmp_path / "cache", threads=1)
    assert f"it takes `{lacking}`" in refused.value.diagnostics[0].help, refused.value


def test_a_model_of_patches_of_any_shape_is_refused_with_the_input_that_says_their_shape():
    config = transformers.Siglip2VisionConfig(**{n: s for n, s in _TEXT.items() if n != "vocab_size"}, patch_size=8)
    model = table.randomized(lambda: transformers.Siglip2VisionModel(config))
    with pytest.raises(Reject, match="with `spatial_shapes`") as refused:
        capture(model)
    assert "`dummy_inputs`" in refused.value.diagnostics[0].help


def _squeezebert() -> nn.Module:
    sizes = {**_TEXT, "embedding_size": 32, "max_position_embeddings": 64}
    return table.randomized(lambda: transformers.SqueezeBertForMaskedLM(transformers.SqueezeBertConfig(**sizes)))


def test_layers_whose_forward_a_model_runs_itself_are_named_and_not_said_to_be_missing():
    with pytest.raises(Reject, match=r"runs the `forward` of transformer\.encoder\.layers\.0 itself") as refused:
        capture(_squeezebert())
    assert "call the layer" in refused.value.diagnostics[0].help


def test_a_refused_model_keeps_the_forward_that_somebody_gave_its_layer():
    model = _squeezebert()
    layer = model.transformer.encoder.layers[0]
    forward = layer.forward

    def patched(*args, **kwargs):
        return forward(*args, **kwargs)

    layer.forward = patched
    with pytest.raises(Reject):
        capture(model)
    assert layer.forward is patched and "forward" not in vars(model.transformer.encoder.layers[1])


def test_a_decoder_that_writes_several_codebooks_at_once_is_refused_with_their_number():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    sizes |= {"head_dim": 8, "intermediate_size": 48, "vocab_size": 128}
    decoder = {**sizes, "cross_num_attention_heads": 4, "cross_num_key_value_heads": 4, "cross_head_dim": 8}
    config = transformers.DiaConfig(
        encoder_config=sizes, decoder_config={**decoder, "cross_hidden_size": 32, "num_channels": 9}
    )
    model = table.randomized(lambda: transformers.DiaForConditionalGeneration(config))
    with pytest.raises(Reject, match="takes `decoder_input_ids` of 9 codebooks at each position") as refused:
        capture(model)
    assert "`dummy_inputs`" in refused.value.diagnostics[0].help


def test_channels_of_an_image_are_no_codebooks():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "image_size": 32, "patch_size": 8}
    config = transformers.UdopConfig(vocab_size=128, max_2d_position_embeddings=64, **sizes)
    model = table.randomized(lambda: transformers.UdopForConditionalGeneration(config))
    with pytest.raises(Reject, match="reads texts with `bbox` and `pixel_values`"):
        capture(model)
