"""Tiny models with random weights, one per architecture, built from configs without network."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_COMMON = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
           "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GATED = {**_COMMON, "intermediate_size": 96, "num_key_value_heads": 2}
_GEMMA = {**_GATED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4,
          "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_CONFIGS = {
    "llama": _GATED,
    "qwen2": _GATED,
    "qwen3": {**_GATED, "head_dim": 16},
    "mistral": {**_GATED, "sliding_window": 5},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": _GATED,
    "gpt2": {"vocab_size": 128, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 96,
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "opt": {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": {**_COMMON, "intermediate_size": 96},
}
NAMES = tuple(_CONFIGS)


def config(name: str, **changes):
    """The config of one of `NAMES`, with some values changed."""
    return AutoConfig.for_model(name, **{**_CONFIGS[name], **changes})


def blank(name: str, **changes) -> torch.nn.Module:
    """The same without weights of its own: use it inside `torch.device("meta")`."""
    return AutoModelForCausalLM.from_config(config(name, **changes), dtype=torch.float32).eval()


def model(name: str, seed: int = 0, **changes) -> torch.nn.Module:
    """A causal language model in evaluation mode whose weights follow from the seed.

    Weights are larger than at a usual start, and norms and biases are random too: so every part matters.
    """
    generator = torch.Generator().manual_seed(seed)
    made = blank(name, **changes)
    with torch.no_grad():
        for parameter in made.parameters():
            spread = 0.1 if parameter.dim() > 1 else 0.2
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return made
