"""Rows of models whose config has a vocabulary and that take something else, or begin to write without a first token."""

from pathlib import Path

import pytest
import transformers
from effc.compiler.driver import api
from effc.dsl.syntax.diagnostics import Reject

from tests.architectures import table

_TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_SEEN = {**_TEXT, "image_size": 32, "patch_size": 8}
_SIDES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
_WIDE = {"num_global_tokens": 4, "block_size": 16}
_PROPHET = {
    **{name: value for name, value in _SIDES.items() if name not in ("d_model", "encoder_layers", "decoder_layers")},
    "hidden_size": 32,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
}
SCORED = "prune.multi(remove: 10% of params, group: 8, score: {metric}(rows))"


def compiled(folder: Path, cls: str, config: transformers.PretrainedConfig, metric: str) -> float:
    """What is left of the parameters after a recipe as `effc new` writes it for a model without a tokenizer."""
    table.randomized(lambda: getattr(transformers, cls)(config), spread=0.05).save_pretrained(folder / "model")
    (folder / "r.effspec").write_text(
        'effspec 1\nmodel base = hf("./model")\ndata rows = synthetic(count: 16, length: 32, seed: 1)\n'
        f"pipeline small(base) {{ slim = {SCORED.format(metric=metric)} }}\n"
        'expect small { params <= 0.95 * base }\nemit small { hf("small") }\n'
    )
    (result,) = api.compile(folder / "r.effspec", folder / "out", cache_dir=folder / "cache", threads=1)
    assert not result.missed
    return next(m.ratio for m in result.artifacts[0].manifest.measures if m.metric == "params")


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
@pytest.mark.slow
def test_a_classifier_of_images_is_given_pixels_though_its_config_has_a_vocabulary(kind, tmp_path):
    config = getattr(transformers, f"{kind}Config")(text_config=_TEXT, vision_config=_SEEN, num_labels=5)
    assert compiled(tmp_path, f"{kind}ForImageClassification", config, "similarity") < 0.95


@pytest.mark.parametrize(("cls", "more"), [("Bart", {}), ("PegasusX", _WIDE)])
@pytest.mark.slow
def test_states_below_the_head_of_a_model_of_two_sides_need_no_generation_config(cls, more, tmp_path):
    config = getattr(transformers, f"{cls}Config")(**_SIDES, **more)
    assert compiled(tmp_path, f"{cls}ForConditionalGeneration", config, "similarity") < 0.95


_FRAMES = {**{name: value for name, value in _SEEN.items() if name not in ("vocab_size", "max_position_embeddings")}}


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        ("VideoMAEForVideoClassification", transformers.VideoMAEConfig(**_FRAMES, num_frames=4, tubelet_size=2)),
        ("TimesformerForVideoClassification", transformers.TimesformerConfig(**_FRAMES, num_frames=4)),
    ],
)
@pytest.mark.slow
def test_a_model_of_videos_is_given_as_many_images_as_its_config_says(cls, config, tmp_path):
    assert compiled(tmp_path, cls, config, "similarity") < 0.95


@pytest.mark.slow
def test_an_encoder_of_features_is_given_frames_as_wide_as_its_config_says(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.Wav2Vec2BertConfig(**sizes, feature_projection_input_dim=16, conv_depthwise_kernel_size=5)
    assert compiled(tmp_path, "Wav2Vec2BertForSequenceClassification", config, "similarity") < 0.95


_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_BESIDE_WAVES = {
    **{name: value for name, value in _SIDES.items() if name not in ("d_model", "max_position_embeddings")},
    "hidden_size": 32,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
HEARS = {  # encoders of waves, and of frames of features, each with a decoder of tokens
    "Moonshine": {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        **dict.fromkeys(("encoder_num_hidden_layers", "decoder_num_hidden_layers"), 2),
        **dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads"), 4),
    },
    "SpeechT5": _BESIDE_WAVES,
    "Speech2Text": {**_SIDES, "input_feat_per_channel": 16, "conv_channels": 32, "max_source_positions": 64},
    "Canary": {
        "encoder_config": {
            **_LAYERS,
            "model_type": "parakeet_encoder",
            "num_mel_bins": 16,
            "subsampling_conv_channels": 8,
        },
        "decoder_config": {**_LAYERS, "vocab_size": 128, "head_dim": 8, "num_key_value_heads": 4},
        "vocab_size": 128,
    },
}


@pytest.mark.parametrize(
    "kind", [kind if kind == "Moonshine" else pytest.param(kind, marks=pytest.mark.slow) for kind in HEARS]
)
@pytest.mark.slow
def test_a_model_that_says_what_it_hears_is_given_sounds_of_the_form_that_its_config_names(kind, tmp_path):
    config = getattr(transformers, f"{kind}Config")(**HEARS[kind])
    cls = f"{kind}ForSpeechToText" if kind == "SpeechT5" else f"{kind}ForConditionalGeneration"
    assert compiled(tmp_path, cls, config, "similarity") < 0.95


@pytest.mark.slow
def test_code_points_are_drawn_for_a_model_that_hashes_them_and_states_no_vocabulary(tmp_path):
    config = transformers.CanineConfig(
        **_LAYERS, num_hash_buckets=64, num_hash_functions=4, local_transformer_stride=16
    )
    assert not hasattr(config, "vocab_size")
    assert compiled(tmp_path, "CanineForSequenceClassification", config, "similarity") < 0.95


def test_an_attention_that_is_exchanged_for_short_rows_is_named_with_the_word_of_the_config(tmp_path):
    with pytest.raises(Reject, match=r"makes modules anew .* it changes its `attention_type`, which is 'block_sparse'"):
        compiled(tmp_path, "BigBirdForMaskedLM", transformers.BigBirdConfig(**_TEXT), "perplexity")


@pytest.mark.slow
def test_a_decoder_whose_config_names_no_first_token_writes_nothing_and_is_pruned(tmp_path):
    config = transformers.T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    assert compiled(tmp_path, "T5ForConditionalGeneration", config, "perplexity") < 0.95


@pytest.mark.slow
def test_a_decoder_that_masks_without_a_cache_alone_is_pruned(tmp_path):
    config = transformers.FSMTConfig(**_SIDES, langs=["de", "en"], src_vocab_size=128, tgt_vocab_size=96)
    assert compiled(tmp_path, "FSMTForConditionalGeneration", config, "similarity") <= 0.95


@pytest.mark.slow
def test_a_generate_of_transformers_that_fails_is_a_refusal_with_its_line(tmp_path):
    config = transformers.ProphetNetConfig(**_PROPHET)
    with pytest.raises(Reject, match=r"stock-fails: ProphetNet.* fails when it writes: IndexError: .* at modeling_p"):
        compiled(tmp_path, "ProphetNetForConditionalGeneration", config, "perplexity")
