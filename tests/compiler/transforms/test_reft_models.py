"""Interventions in any model: decoders with their caches, encoders, and the structure that is found behind them."""

import copy

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.ir.capture.capture import capture
from effc.compiler.models.rows.prompt_positions import prompts
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from tests import tiny
from tests.compiler.transforms.test_reft import ids_of, intervened, louder, naive


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral", "mamba", "mamba2", "bamba", "rwkv"])
@pytest.mark.slow
def test_decoding_with_a_cache_edits_the_prompt_once(name):
    model = tiny.model(name)
    program = louder(intervened(model), 0.5)
    prompt = ids_of(1, 7)
    with torch.no_grad():
        cached = program.model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=True)
        told, row = torch.tensor([7]), prompt
        with prompts(program.model, told):  # without a cache: the prompt stays the first seven
            for _ in range(cached.shape[1] - 7):
                logits = program.model(row, use_cache=False).logits[:, -1]
                row = torch.cat([row, logits.argmax(-1, keepdim=True)], 1)
        plain = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, row)
    assert not torch.equal(cached, plain)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"cache_implementation": "static"}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["beams", "static cache", "samples"],
)
def test_padded_prompts_generate_as_they_do_alone(options):
    program = louder(intervened(tiny.model("llama")), 0.5)
    ids, mask = ids_of(2, 7), torch.ones(2, 7, dtype=torch.int64)
    ids[1, :3], mask[1, :3] = 0, 0
    facts = {"max_new_tokens": 5, **options}
    torch.manual_seed(0)
    found = program.model.generate(ids, attention_mask=mask, **facts)
    if options.get("do_sample"):
        assert found.shape == (4, 12)
        return
    for i, start in enumerate((0, 3)):
        alone = program.model.generate(ids[i : i + 1, start:], **facts)
        assert torch.equal(found[i, 7:], alone[0, 7 - start :])


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=128,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            num_labels=3,
        )
    ).eval()


def test_an_encoder_is_edited_at_its_prompts_edges_padded_or_not():
    model = bert()
    program = louder(intervened(model, positions="f1+l1"))
    ids, mask = ids_of(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    with torch.no_grad():
        found = program.model(ids, attention_mask=mask).logits
        alone = program.model(ids[1:, :5]).logits
        assert torch.allclose(found[1], alone[0], atol=1e-5)
        assert torch.allclose(alone, naive(model, program, ids[1:, :5], 1, 1), atol=1e-5)
        assert not torch.allclose(found, model(ids, attention_mask=mask).logits, atol=1e-2)


def test_a_vision_transformer_is_edited_at_its_class_token():
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    ).eval()
    program = louder(intervened(model, positions="f1"))
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert not torch.allclose(program.model(pixels).logits, model(pixels).logits, atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba2", "jamba", "bert"])
def test_structure_that_was_found_is_found_behind_interventions(name):
    model = tiny.model(name)
    before, after = skeleton_of(capture(copy.deepcopy(model))), skeleton_of(intervened(model))
    assert after.branches == before.branches and after.groups == before.groups and after.scans == before.scans
    assert after.facts["refused"] == before.facts["refused"]


@pytest.mark.heavy
@pytest.mark.parametrize("name", [*tiny.NAMES, *tiny.WIDER])
def test_every_architecture_takes_an_identity_and_then_an_edit(name):
    model, ids = tiny.model(name), ids_of(2, 9)
    program = intervened(model, start="identity")
    with torch.no_grad():
        before = model(ids).logits
        assert torch.equal(program.model(ids).logits, before)
        louder(program)
        assert not torch.allclose(program.model(ids).logits, before, atol=1e-2)
