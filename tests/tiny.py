"""Tiny models with random weights, one per architecture, built from configs without network."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GATED = {**_COMMON, "intermediate_size": 96, "num_key_value_heads": 2}
_GEMMA = {
    **_GATED,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_CONFIGS = {
    "llama": _GATED,
    "qwen2": _GATED,
    "qwen3": {**_GATED, "head_dim": 16},
    "mistral": {**_GATED, "sliding_window": 5},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": _GATED,
    "gpt2": {
        "vocab_size": 128,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 128,
        "n_inner": 96,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "opt": {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": {**_COMMON, "intermediate_size": 96},
}
NAMES = tuple(_CONFIGS)
STAND = ("llama", "gemma2", "gpt2", "phi3", "gpt_neox")  # for all of them, where each run can not try each

_MOE = {
    **_GATED,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
}
_SSM = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_WIDER = {
    **{
        name: {**_GATED, "head_dim": 16}
        for name in ("smollm3", "olmo2", "cohere", "granite", "glm4", "nemotron", "ministral")
    },
    **dict.fromkeys(("stablelm", "starcoder2", "phi", "exaone4"), _GATED),
    "bloom": {**_COMMON, "n_layer": 3, "n_head": 4},
    "mpt": {**_COMMON, "d_model": 64, "n_layers": 3, "n_heads": 4},
    "gpt_neo": {**_COMMON, "attention_types": [[["global", "local", "global"], 1]], "num_layers": 3, "num_heads": 4},
    "mixtral": _MOE,
    "qwen3_moe": _MOE,
    "gpt_oss": _MOE,
    "gemma4_text": {
        **_GEMMA,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 128,
    },
    "mamba": {**_COMMON, "state_size": 16},
    "falcon_mamba": {**_COMMON, "state_size": 16},
    "mamba2": {**_COMMON, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 8},
    "bamba": {**_GATED, **_SSM, "attn_layer_indices": [1]},
    "jamba": {**_MOE, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_offset": 1, "attn_layer_period": 2},
    "granitemoehybrid": {
        **_MOE,
        **_SSM,
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 64,
    },
    "qwen3_next": {
        **_MOE,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "lfm2": {**_GATED, "layer_types": ["conv", "full_attention", "conv"]},
    "rwkv": {**_COMMON, "attention_hidden_size": 64, "intermediate_size": 96},
    "bert": {**_COMMON, "intermediate_size": 96},
}
# Its experts are chosen for several tokens at once, so no pass promises anything of it.
_UNTRIED = {"doge": {**_GATED, "is_moe": True, "num_experts": 16, "num_experts_per_tok": 2}}
WIDER = tuple(_WIDER)  # captured, too; the passes promise less of them


def config(name: str, **changes):
    """The config of one of `NAMES`, `WIDER` or what is untried, with some values changed."""
    return AutoConfig.for_model(name, **{**(_CONFIGS | _WIDER | _UNTRIED)[name], **changes})


def blank(name: str, **changes) -> torch.nn.Module:
    """The same without weights of its own: use it inside `torch.device("meta")`."""
    return AutoModelForCausalLM.from_config(config(name, **changes), dtype=torch.float32).eval()


def model(name: str, seed: int = 0, **changes) -> torch.nn.Module:
    """A causal language model in evaluation mode whose weights follow from the seed.

    Weights are larger than at a usual start, and norms and biases are random too: so every part matters.
    """
    return randomize(blank(name, **changes), seed)


def randomize(made: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The same module, every parameter of which has random numbers of a size that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            spread = 0.1 if parameter.dim() > 1 else 0.2
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return made
