"""Models that read or say tokens beside images and videos: rows hold both."""

import pytest
import torch
import transformers
from effc.compiler.artifacts.verify import make_probe_inputs
from effc.compiler.artifacts.verify_child import probe_model
from effc.compiler.driver import api
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.capture.sample import sample_inputs
from effc.compiler.models.rows.forward import logits, row_nll
from effc.compiler.models.rows.inputs import forward_args_and_kwargs, targets_and_prediction_mask
from effc.compiler.models.rows.packed_inputs import pack_inputs, packed_input_parts, prepend_placeholders
from effc.dsl.syntax.diagnostics import Reject
from torch import nn

from tests.architectures.table import randomized

torch.set_num_threads(1)
_WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = {**_WIDTHS, "vocab_size": 128, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
_IMAGE = {**_WIDTHS, "image_size": 32, "patch_size": 8}


def captioner() -> nn.Module:
    config = transformers.BlipConfig(text_config={**_TEXT, "encoder_hidden_size": 32}, vision_config=_IMAGE)
    return randomized(lambda: transformers.BlipForConditionalGeneration(config))


def answerer() -> nn.Module:
    sizes = {"model_type": "opt", **_TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}
    config = transformers.Blip2Config(
        text_config=sizes,
        vision_config=_IMAGE,
        qformer_config={**_WIDTHS, "vocab_size": 128, "encoder_hidden_size": 32},
        num_query_tokens=4,
        image_token_index=9,
    )
    return randomized(lambda: transformers.Blip2ForConditionalGeneration(config))


def transcriber() -> nn.Module:
    decoder = transformers.BertConfig(**_TEXT, is_decoder=True, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**_IMAGE), decoder
    )
    config.decoder_start_token_id = 0
    return randomized(lambda: transformers.VisionEncoderDecoderModel(config))


def watcher() -> nn.Module:
    config = transformers.VideoPrismConfig(
        vision_config={
            **_WIDTHS,
            **{"num_frames": 2, "image_size": 16, "tubelet_size": [1, 8, 8]},
            **{"num_spatial_layers": 1, "num_temporal_layers": 1, "num_auxiliary_layers": 1},
        },
        text_config={**_TEXT, "apply_l2norm": True},
    )
    return randomized(lambda: transformers.VideoPrismClipModel(config))


MODELS = [captioner, answerer, transcriber, watcher]


@pytest.mark.parametrize("make", MODELS)
def test_a_model_is_captured_with_images_and_tokens_and_probed_with_both(make):
    model = make()
    (part,) = packed_input_parts(model)
    inputs = sample_inputs(model)
    assert tuple(inputs[part.name].shape[1:]) == part.shape
    assert {"input_ids", "decoder_input_ids"} & inputs.keys()
    assert capture(model).units
    probe = make_probe_inputs(model)
    assert all(torch.equal(a, b) for a, b in zip(*(probe_model(model, probe, 2).values() for _ in "ab"), strict=True))


@pytest.mark.parametrize("make", [captioner, answerer, transcriber])
def test_tokens_of_a_packed_row_are_what_is_predicted(make):
    model = make()
    (part,) = packed_input_parts(model)
    image = torch.randn(2, *part.shape, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(24).view(2, 12) + 20
    ids[:, :4] = 9 if make is answerer else 8
    rows = pack_inputs({part.name: image, "ids": ids}, (part.name, "ids"))
    targets, _ = targets_and_prediction_mask(model, rows)
    assert torch.equal(targets, ids if make is transcriber else ids[:, 1:])
    assert logits(model, rows).shape[:2] == (2, 12)
    assert row_nll(model, rows).n_predictions == [targets.shape[1]] * 2
    assert torch.equal(forward_args_and_kwargs(model, rows)[1]["pixel_values"], image)


def test_placeholders_are_as_many_as_the_vectors_that_take_their_place():
    model, ids = answerer(), torch.tensor([[9, 3, 127], [1, 9, 9]])
    filled = prepend_placeholders(model, ids)
    assert filled.tolist() == [[9] * 4 + [10, 3, 127], [9] * 4 + [1, 10, 10]]
    assert torch.equal(prepend_placeholders(captioner(), ids), ids), "it reads images beside its tokens"


@pytest.mark.parametrize("count", [0, 3, 5])
def test_rows_with_other_placeholders_than_an_image_has_vectors_are_refused(count):
    model = answerer()
    ids = torch.tensor([[9] * 4 + [20] * 8, [9] * count + [20] * (12 - count)])
    rows = pack_inputs({"pixel_values": torch.zeros(2, 3, 32, 32), "ids": ids}, ("pixel_values", "ids"))
    with pytest.raises(Reject, match=f"at 4 tokens 9 of a row, and a row has {count}"):
        forward_args_and_kwargs(model, rows)


def test_an_image_decides_what_a_model_answers():
    model, inputs = answerer(), sample_inputs(answerer())
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}
    assert not torch.allclose(model(**inputs).logits, model(**other).logits)


@pytest.mark.parametrize("make", [captioner, answerer, transcriber])
def test_rows_of_ids_alone_are_refused_with_the_names_of_both_inputs(make):
    with pytest.raises(Reject, match=r"takes `pixel_values`, `(decoder_)?input_ids`") as refused:
        forward_args_and_kwargs(make(), torch.ones(1, 8, dtype=torch.int64))
    assert refused.value.diagnostics[0].help == "give it rows of `tensors`"


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS)
def test_a_model_of_images_and_tokens_is_pruned_emitted_and_reopened(make, tmp_path):
    make().save_pretrained(tmp_path / "model")
    (tmp_path / "r.effspec").write_text(
        'effspec 1\nmodel base = hf("./model")\ndata rows = synthetic(count: 4, length: 16)\n'
        "pipeline small(base) { slim = prune.multi(remove: 5% of params, group: 8, score: similarity(rows)) }\n"
        'emit small { hf("small") }\n'
    )
    api.compile(tmp_path / "r.effspec", tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
    assert (tmp_path / "out" / "small" / "manifest.json").exists()
