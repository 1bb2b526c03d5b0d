"""Models that take more than effc makes: the refusal names what is lacking, and not what the meta device lacks."""

import json

import pytest
import transformers
from effc.compiler.driver import api
from effc.dsl.syntax.diagnostics import Reject

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
            "input_ids",
            transformers.BlipConfig(
                text_config={**_TEXT, "encoder_hidden_size": 32, "max_position_embeddings": 64},
                vision_config={**_TEXT, "image_size": 32, "patch_size": 8},
                architectures=["BlipForConditionalGeneration"],
            ),
        ),
        (
            "pixel_values",
            transformers.IdeficsConfig(
                **_TEXT,
                vision_config={"embed_dim": 32, "image_size": 32, "patch_size": 8, "num_hidden_layers": 1},
                use_resampler=False,
                architectures=["IdeficsForVisionText2Text"],
            ),
        ),
    ],
    ids=["blip", "idefics"],
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
