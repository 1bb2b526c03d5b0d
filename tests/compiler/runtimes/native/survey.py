"""Every decoder of transformers that a config of common names makes tiny: does the engine have a plan of it?

    python -m tests.compiler.runtimes.native.survey [NAME ...]     one line for each, and the counts

"ok" is a plan that a naive interpreter runs to the model's own logits; what is refused says why. Architectures whose
config needs more than common names are left out, and counted.
"""

import sys
from collections import Counter

import torch
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.native.reader import Reader
from effc.dsl.syntax.diagnostics import Reject
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.compiler.runtimes.native.naive import Naive
from tests.compiler.runtimes.native.particular import CONFIGS
from tests.tiny import randomize

COMMON = {
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_target_positions": 64,
    "max_seq_len": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "is_decoder": True,
    "tie_word_embeddings": False,
    "sliding_window": 5,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "dff"), 96),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "state_size": 16,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "rotary_dim": 8,
    "global_head_dim": 16,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16,
}
NUMBERS = 3_000_000  # parameters of what still counts as tiny
LENGTH = 14


def made(name: str) -> torch.nn.Module | None:
    """The tiny model of an architecture, or None where the common names do not make one."""
    try:
        if name in CONFIGS:
            return _settled(AutoConfig.for_model(name, **CONFIGS[name]))
        known = AutoConfig.for_model(name).get_text_config().to_dict()
        values = {key: value for key, value in COMMON.items() if key in known or key == "is_decoder"}
        with torch.device("meta"):
            blank = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **values))
        if sum(p.numel() for p in blank.parameters()) > NUMBERS:
            return None
        if "qk_rope_head_dim" in values:  # every head has keys of its own, whatever the config says
            values["num_key_value_heads"] = 4
            values["head_dim"] = values["qk_rope_head_dim"]
        return _settled(AutoConfig.for_model(name, **values))
    except Exception:  # any of a hundred classes of others' code, of whose configs nothing is known
        return None


def _settled(config: PretrainedConfig) -> torch.nn.Module:
    """Its model, with random weights that bfloat16 holds."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in randomize(model).parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def verdict(model: torch.nn.Module) -> tuple[str, str]:
    """("ok" | "refused" | "wrong" | "broken", why)."""
    ids = torch.randint(3, 128, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    try:
        with torch.no_grad():
            wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    except Exception as error:
        return "not run", f"torch: {type(error).__name__}: {error}"
    try:
        plan = Reader(capture(model), "bf16").build_plan()
        engine = Naive(plan.to_json(), {key: entry.make() for key, entry in plan.live_weight_entries().items()})
        found = engine.run(ids[0].tolist(), [0] * LENGTH, [True] * LENGTH)
    except Reject as reject:
        return "refused", "; ".join(d.message for d in reject.diagnostics)
    except Exception as error:
        return "broken", f"{type(error).__name__}: {error}"
    near = torch.allclose(found, wanted, atol=2e-4 * max(1.0, float(wanted.abs().max())), rtol=1e-4)
    return ("ok", "") if near else ("wrong", f"off by {float((found - wanted).abs().max()):.2g}")


def main(names: list[str]) -> None:
    counts: Counter[str] = Counter()
    for name in names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        model = made(name)
        state, why = ("not made", "") if model is None else verdict(model)
        counts[state] += 1
        sys.stdout.write(f"{name:24} {state:8} {' '.join(why.split())[:260]}\n")
        sys.stdout.flush()
    sys.stdout.write(", ".join(f"{count} {state}" for state, count in counts.most_common()) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
