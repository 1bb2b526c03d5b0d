"""Positions as models count and keep them: offsets, tables that end early, tables of their own, functions of one tensor."""

import pytest
import torch
from effc.compiler.artifacts.verify_child import first_position_id
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.native.emission import native_artifact_facts
from effc.compiler.runtimes.native.opening import open_native
from effc.compiler.runtimes.native.plan_files import write_plan
from effc.compiler.runtimes.native.reader import Reader
from effc.dsl.syntax.diagnostics import Reject
from transformers import AutoConfig, AutoModelForCausalLM

from tests.compiler.runtimes.native.naive import Naive
from tests.compiler.runtimes.native.test_plans import ATOL

_BERT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "is_decoder": True,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_BART = {
    "vocab_size": 128,
    "d_model": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_GPT = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64, "rotary_dim": 8}
_GEMMA = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    "sliding_window": 5,
}
MODELS = {
    "roberta": _BERT,
    "camembert": _BERT,
    "data2vec-text": _BERT,
    "bart": _BART,
    "pegasus": _BART,
    "whisper": {**_BART, "max_target_positions": 64},
    "codegen": _GPT,
    "gptj": _GPT,
    "ctrl": {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "dff": 96},
    "gemma4_text": _GEMMA,
    "trocr": {**_BART, "max_position_embeddings": 64},
    "xglm": {
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "d_model": 64,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 96,
    },
    "youtu": {
        **_BERT,
        "is_decoder": False,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
}


def made(name, **changes):
    config = AutoConfig.for_model(name, **MODELS[name] | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.1 if parameter.dim() > 1 else 0.2
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_((noise if parameter.dim() > 1 else parameter + noise).bfloat16())
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_counts_positions_as_the_model_does(name):
    model = made(name)
    plan = Reader(capture(model), "bf16").build_plan()
    engine = Naive(plan.to_json(), {key: entry.make() for key, entry in plan.live_weight_entries().items()})
    ids = torch.randint(3, 128, (1, 14), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    assert torch.allclose(engine.run(ids[0].tolist(), [0] * 14, [True] * 14), wanted, atol=ATOL, rtol=1e-4)
    assert plan.context == 64 - first_position_id(model)


@pytest.mark.parametrize("kind", ["roberta", "xmod"])
def test_a_row_that_holds_the_token_that_is_not_counted_is_refused_where_it_is_counted(kind, tmp_path):
    torch.manual_seed(0)
    more = {"default_language": "en_XX", "languages": ["en_XX"]} if kind == "xmod" else {}
    config = AutoConfig.for_model(kind, **_BERT, **more)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    plan = Reader(capture(model), "bf16").build_plan()
    write_plan(plan, tmp_path, native_artifact_facts(model, "bf16", plan.output))
    native = open_native(tmp_path, threads=1, max_sequences=2)
    ids = torch.randint(5, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    ids[0, 4] = ids[1, 7] = config.pad_token_id
    with pytest.raises(Reject, match="it counts all but 1"):
        native(ids)
    own = torch.arange(12).expand(2, 12)
    with torch.no_grad():  # counted as a text's own tokens they are the same
        wanted = model(input_ids=ids, position_ids=own + first_position_id(model)).logits
    found = native(ids, position_ids=own + first_position_id(model)).logits
    assert float((found - wanted).norm()) <= 0.02 * float(wanted.norm())
    filled = ids.clone()
    filled[:, :3], filled[:, 4], filled[:, 7] = config.pad_token_id, 9, 9
    mask = (filled != config.pad_token_id).long()
    with torch.no_grad():
        wanted = model(input_ids=filled, attention_mask=mask).logits[:, 3:]
    found = native(filled, mask).logits[:, 3:]
    assert float((found - wanted).norm()) <= 0.02 * float(wanted.norm())
    filled[:, :3] = 9  # hidden by the mask, and counted by the model
    with pytest.raises(Reject, match="it counts all but 1"):
        native(filled, mask)
