"""Models of transformers that llama.cpp knows: where their weights go, and what their configs say in its words."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .architectures import KINDS, Architecture, default_window_pattern
from .refusal import INSTEAD, cannot_write_gguf

_ATTENTION = {f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"} | {"self_attn.o_proj": "attn_output"}
_GATED = {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
_IN_ONE = {"mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_BEFORE = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_AROUND = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_LLAMA = _BEFORE | _ATTENTION | _GATED
# Tokens below which a context is no use: a window that llama.cpp knows nothing of may bound it.
_LEAST_CONTEXT = 512


@dataclass(frozen=True)
class Family:
    """kind     llama.cpp's architecture
    parts      stems of a layer's weights, of transformers -> of llama.cpp
    turned     rotary pairs of a head lie half of it apart, and llama.cpp wants them beside each other
    raised     norms multiply by one more than their weight
    keys       config -> keys below the architecture's name, beside those that all have
    unsupported  config -> what would be computed otherwise there, and whether this config asks for it
    """

    kind: str
    parts: Mapping[str, str]
    turned: bool = False
    raised: bool = False
    keys: Callable[[Any], dict[str, Any]] = lambda config: {}
    unsupported: Callable[[Any], dict[str, bool]] = lambda config: {}

    @property
    def of(self) -> Architecture:
        return KINDS[self.kind]


def _gemma_unsupported(config: Any) -> dict[str, bool]:
    """llama.cpp tells the largest of a generation by its layers, and scales the scores of others by their heads."""
    largest = {"gemma2": 46, "gemma3_text": 62}[config.model_type]
    expected = config.head_dim
    if config.num_hidden_layers == largest:
        expected = config.hidden_size // config.num_attention_heads
    return {
        f"scores scaled by {config.query_pre_attn_scalar} and not {expected}": config.query_pre_attn_scalar != expected
    }


def _gemma2_metadata(config: Any) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


def _gemma2_unsupported(config: Any) -> dict[str, bool]:
    return _gemma_unsupported(config) | {
        "scores or logits without a cap": not (config.attn_logit_softcapping and config.final_logit_softcapping)
    }


def _gemma3_metadata(config: Any) -> dict[str, Any]:
    local = config.rope_parameters["sliding_attention"].get("rope_theta", 10000.0)
    cap = config.final_logit_softcapping
    return ({"rope.freq_base_swa": float(local)} if local != 10000.0 else {}) | (
        {"final_logit_softcapping": float(cap)} if cap else {}
    )


def _gemma3_unsupported(config: Any) -> dict[str, bool]:
    local = config.rope_parameters["sliding_attention"].get("rope_type", "default")
    return _gemma_unsupported(config) | {
        "scores with a cap": bool(config.attn_logit_softcapping),
        "attention in both directions": bool(getattr(config, "use_bidirectional_attention", False)),
        f"positions by `{local}` in windows": local != "default",
    }


def _granite_metadata(config: Any) -> dict[str, Any]:
    return {
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
        "attention.scale": float(config.attention_multiplier),
    }


def _granite_unsupported(config: Any) -> dict[str, bool]:
    # llama.cpp takes 0 for "none"
    return {"a scale of 0": not all(value > 0 for value in _granite_metadata(config).values())}


def _smollm3_unsupported(config: Any) -> dict[str, bool]:
    rotates = [int(KINDS["smollm3"].rotates(i, False)) for i in range(config.num_hidden_layers)]
    return {"other layers without positions than each fourth": list(map(int, config.no_rope_layers)) != rotates}


_QK = "norms of each head with weights of its own"
FAMILIES = {
    "llama": Family("llama", _LLAMA, turned=True),
    "mistral": Family("llama", _LLAMA, turned=True),
    "qwen2": Family("qwen2", _LLAMA),
    "qwen3": Family("qwen3", _LLAMA | _NORMS),
    "gemma": Family("gemma", _LLAMA, raised=True),
    "gemma2": Family(
        "gemma2", _AROUND | _ATTENTION | _GATED, raised=True, keys=_gemma2_metadata, unsupported=_gemma2_unsupported
    ),
    "gemma3_text": Family(
        "gemma3",
        _AROUND | _ATTENTION | _GATED | _NORMS,
        raised=True,
        keys=_gemma3_metadata,
        unsupported=_gemma3_unsupported,
    ),
    "phi": Family(
        "phi2",
        {"input_layernorm": "attn_norm", "self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}
        | {name: place for name, place in _ATTENTION.items() if place != "attn_output"},
        unsupported=lambda config: {"norms of queries and keys": bool(config.qk_layernorm)},
    ),
    "phi3": Family("phi3", _BEFORE | _IN_ONE | {"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output"}),
    "stablelm": Family("stablelm", _LLAMA, unsupported=lambda config: {_QK: bool(config.qk_layernorm)}),
    "glm4": Family(
        "glm4",
        _BEFORE
        | _ATTENTION
        | _IN_ONE
        | {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"},
    ),
    "granite": Family("granite", _LLAMA, turned=True, keys=_granite_metadata, unsupported=_granite_unsupported),
    "olmo2": Family(
        "olmo2",
        _ATTENTION
        | _GATED
        | _NORMS
        | {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"},
    ),
    "smollm3": Family("smollm3", _LLAMA, turned=True, unsupported=_smollm3_unsupported),
    "cohere": Family(
        "command-r",
        {"input_layernorm": "attn_norm"} | _ATTENTION | _GATED,
        keys=lambda config: {"logit_scale": float(config.logit_scale)},
        unsupported=lambda config: {_QK: bool(config.use_qk_norm), "64 layers or more": config.num_hidden_layers >= 64},
    ),
    "cohere2": Family(
        "cohere2",
        {"input_layernorm": "attn_norm"} | _ATTENTION | _GATED,
        keys=lambda config: {"logit_scale": float(config.logit_scale)},
    ),
    "starcoder2": Family("starcoder2", _BEFORE | _ATTENTION | {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}),
}
_ACTIVATIONS = {"silu": ("silu", "swish"), "gelu": ("gelu_pytorch_tanh", "gelu_new")}


def family_of(config: Any) -> Family:
    """Family of a model by its config's type. Raises Reject (cannot-write-gguf) of a type that has none."""
    if config.model_type not in FAMILIES:
        raise cannot_write_gguf(
            f"effc writes no GGUF of `{config.model_type}`: it knows {', '.join(FAMILIES)}", help=INSTEAD
        ).rejection()
    return FAMILIES[config.model_type]


def refuse_unsupported_config(config: Any) -> None:
    """Raise Reject where a config, whatever the weights, says what llama.cpp does not compute as we write it."""
    family = family_of(config)
    rope, windows = rope_parameters_of(config), has_window_by_layer(config)
    act = getattr(config, "hidden_activation", None) or config.hidden_act
    unsupported = {
        f"attention in windows of {config.sliding_window} tokens" if any(windows) else "": (
            any(windows) and not family.of.period and config.sliding_window < _LEAST_CONTEXT
        ),
        f"the activation `{act}`": act not in _ACTIVATIONS[family.of.activation],
        f"positions by `{rope.get('rope_type')}`": rope.get("rope_type", "default")
        not in ("default", "linear", *(("llama3",) if family.of.factors else ())),
        "positions in a part of each head": family.turned and rope.get("partial_rotary_factor", 1.0) != 1.0,
        "a head of its own": family.of.tied and not config.tie_word_embeddings,
        **family.unsupported(config),
    }
    if feature := next((feature_name for feature_name, applies in unsupported.items() if applies), None):
        raise cannot_write_gguf(
            f"the model has {feature}, which llama.cpp's `{family.kind}` does not compute", help=INSTEAD
        ).rejection()


def rope_parameters_of(config: Any) -> dict[str, Any]:
    """Rotary parameters; of the layers without a window, where there are two kinds."""
    known = getattr(config, "rope_parameters", None) or {}
    return known.get("full_attention", known)


def has_window_by_layer(config: Any) -> tuple[bool, ...]:
    """Layers that have a window."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (bool(getattr(config, "sliding_window", None)),) * config.num_hidden_layers
    return tuple(kind == "sliding_attention" for kind in kinds)


def supported_context_length(config: Any) -> int:
    """Tokens after which llama.cpp would compute something else, or the model knows no positions."""
    bounded = any(has_window_by_layer(config)) and not FAMILIES[config.model_type].of.period
    return min(config.max_position_embeddings, config.sliding_window) if bounded else config.max_position_embeddings


def sliding_window_metadata(config: Any) -> dict[str, Any]:
    """Keys of windows; layer by layer only where the order is not what llama.cpp takes for granted."""
    kind, windows = FAMILIES[config.model_type].of, has_window_by_layer(config)
    usual = windows == default_window_pattern(kind, len(windows))
    if not kind.period or (not any(windows) and kind is KINDS["gemma3"]):
        return {}
    keys: dict[str, Any] = {"attention.sliding_window": config.sliding_window or config.max_position_embeddings}
    return keys if usual else keys | {"attention.sliding_window_pattern": list(windows)}
