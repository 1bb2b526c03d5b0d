"""What a GGUF file says of a model: its architecture, and widths and heads layer by layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...dsl.diagnostics import Reject
from .refusal import INSTEAD, cannot_write_gguf

# model_type -> llama.cpp's architecture, and whether its rotary pairs lie beside each other, as `deci` has them too
FAMILIES = {"llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
STAND_IN = 32  # channels of the MLP of zeros of a layer that has none; llama.cpp drops the attention of such a layer
_PARTS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True)
class Layer:
    """Heads and width of a layer; 0 where it has no attention."""

    heads: int
    kv_heads: int
    width: int


@dataclass(frozen=True)
class Shape:
    """architecture   llama.cpp's name; "deci" where layers differ
    interleaved    rotary pairs lie beside each other, not half a head apart
    """

    architecture: str
    interleaved: bool
    head_dim: int
    layers: tuple[Layer, ...]


def shape_of(model: nn.Module) -> Shape:
    """Raises Reject (cannot-write-gguf) where llama.cpp has no architecture that computes the same."""
    refuse_config(model.config)
    architecture, interleaved = FAMILIES[model.config.model_type]
    found = [_layer(model, number) for number in range(len(model.model.layers))]
    dims = {dim for _, dim in found if dim}
    if len(dims) != 1:
        raise Reject(cannot_write_gguf("layers have heads of several sizes, and GGUF states one", help=INSTEAD))
    layers = tuple(layer for layer, _ in found)
    if len(set(layers)) > 1 or any(not layer.heads or layer.width == STAND_IN for layer in layers):
        if not interleaved:
            raise Reject(
                cannot_write_gguf(
                    f"layers differ in width, heads or branches, which llama.cpp's `{architecture}` has no place for",
                    help=f"prune all layers alike; {INSTEAD}",
                )
            )
        architecture = "deci"
    return Shape(architecture, interleaved, dims.pop(), layers)


def _layer(model: Any, number: int) -> tuple[Layer, int]:
    """A layer, and the size of its heads."""
    layer = model.model.layers[number]
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    width = mlp.gate_proj.out_features if hasattr(mlp, "gate_proj") else STAND_IN
    if not hasattr(attention, "q_proj"):
        return Layer(0, 0, width), 0
    dim = attention.head_dim
    heads, kv_heads = attention.q_proj.out_features // dim, attention.k_proj.out_features // dim
    if heads % kv_heads:
        raise Reject(
            cannot_write_gguf(
                f"layer {number} has {heads} heads over {kv_heads} of keys and values, which does not divide",
                help=INSTEAD,
            )
        )
    return Layer(heads, kv_heads, width), dim


def refuse_config(config: Any) -> None:
    """Raise Reject where a config, whatever the weights, says what llama.cpp does not compute as we write it."""
    if config.model_type not in FAMILIES:
        raise Reject(
            cannot_write_gguf(
                f"effc writes no GGUF of `{config.model_type}`: it knows {', '.join(FAMILIES)}", help=INSTEAD
            )
        )
    windows = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
    rope = _rope(config)
    why = [
        (windows or (config.model_type == "mistral" and config.sliding_window), "attention in windows"),
        (config.hidden_act != "silu", f"the activation `{config.hidden_act}`"),
        (rope.get("rope_type", "default") not in ("default", "llama3"), f"positions by `{rope.get('rope_type')}`"),
        (rope.get("partial_rotary_factor", 1.0) != 1.0, "positions in a part of each head"),
    ]
    if odd := next((what for holds, what in why if holds), None):
        raise Reject(cannot_write_gguf(f"the model has {odd}, which effc writes no GGUF of", help=INSTEAD))


def _rope(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def metadata(model: Any, shape: Shape) -> dict[str, Any]:
    """Keys below the architecture's name, per-layer ones as lists where layers differ."""
    config, even = model.config, shape.architecture != "deci"

    def each(values: list[int]) -> Any:
        return values[0] if even else values

    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": len(shape.layers),
        "feed_forward_length": each([layer.width for layer in shape.layers]),
        "attention.head_count": each([layer.heads for layer in shape.layers]),
        "attention.head_count_kv": each([layer.kv_heads for layer in shape.layers]),
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": shape.head_dim,
        "rope.freq_base": float(_rope(config).get("rope_theta", 10000.0)),
        "vocab_size": config.vocab_size,
    }


def tensors(model: Any, shape: Shape) -> Iterator[tuple[str, Tensor]]:
    """Every weight under llama.cpp's name. Raises Reject where one has no place."""
    config = model.config
    if _rope(config).get("rope_type", "default") == "llama3":
        yield "rope_freqs.weight", rotary_factors(model, shape.head_dim)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        place = _OUTER.get(name) or _inner(name, shape)
        if place is None:
            raise Reject(
                cannot_write_gguf(f"`{name}` has no place in llama.cpp's `{shape.architecture}`", help=INSTEAD)
            )
        if shape.interleaved and (".attn_q." in place or ".attn_k." in place):
            tensor = interleaved(tensor, shape.head_dim)
        yield place, tensor
    for number, layer in enumerate(shape.layers):
        if f"model.layers.{number}.mlp.gate_proj.weight" not in model.state_dict():
            yield f"blk.{number}.ffn_norm.weight", torch.ones(config.hidden_size)
            for part, size in (("gate", (layer.width, config.hidden_size)), ("up", (layer.width, config.hidden_size))):
                yield f"blk.{number}.ffn_{part}.weight", torch.zeros(size)
            yield f"blk.{number}.ffn_down.weight", torch.zeros(config.hidden_size, layer.width)


def _inner(name: str, shape: Shape) -> str | None:
    if not name.startswith("model.layers."):
        return None
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    if rest in _PARTS:
        return f"blk.{number}.{_PARTS[rest]}"
    stem, _, kind = rest.rpartition(".")
    if stem in _PARTS and (kind == "weight" or (kind == "bias" and shape.architecture != "deci")):
        return f"blk.{number}.{_PARTS[stem]}.{kind}"
    return None


def interleaved(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of each head so that the two of a rotary pair lie beside each other."""
    # [h * d, ...] -> [h, 2, d / 2, ...]: the halves of a head become neighbours
    rows = tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape)


def rotary_factors(model: Any, head_dim: int) -> Tensor:
    """What each rotary frequency is divided by, [head_dim / 2]: Llama 3's stretch of the slow ones."""
    base = float(_rope(model.config).get("rope_theta", 10000.0))
    plain = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return plain / model.model.rotary_emb.inv_freq.float().cpu()
