"""Shape of a model in a GGUF file: its architecture, and widths and heads layer by layer."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....dsl.checker.skeleton import Skeleton
from ...models.checkpoints.pretrained import pretrained
from .architectures import KINDS
from .families import (
    FAMILIES,
    Family,
    refuse_unsupported_config,
    rope_parameters_of,
    sliding_window_metadata,
    supported_context_length,
)
from .refusal import INSTEAD, cannot_write_gguf

STAND_IN = 32  # channels of the MLP of zeros of a layer that has none; llama.cpp drops the attention of such a layer
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.norm.bias": "output_norm.bias",
    "model.final_layernorm.weight": "output_norm.weight",
    "model.final_layernorm.bias": "output_norm.bias",
    "lm_head.weight": "output.weight",
    "lm_head.bias": "output.bias",
}


@dataclass(frozen=True)
class Layer:
    """Heads and width of a layer; 0 where it has no attention."""

    heads: int
    kv_heads: int
    width: int


@dataclass(frozen=True)
class GgufShape:
    """architecture   llama.cpp's name; "deci" where layers differ
    n_rotated      of each head, how many numbers rotate
    """

    architecture: str
    family: Family
    head_dim: int
    n_rotated: int
    layers: tuple[Layer, ...]


def gguf_shape_of(model: Any) -> GgufShape:
    """Raises Reject (cannot-write-gguf) where llama.cpp has no architecture that computes the same."""
    refuse_unsupported_config(model.config)
    family = FAMILIES[model.config.model_type]
    layer_shapes = [_layer_and_head_dim(model, family, number) for number in range(len(model.model.layers))]
    dims = {dim for _, dim in layer_shapes if dim}
    if len(dims) != 1:
        raise cannot_write_gguf(
            "layers have heads of several sizes or none, and GGUF states one", help=INSTEAD
        ).rejection()
    (dim,), layers = dims, tuple(layer for layer, _ in layer_shapes)
    return GgufShape(
        _gguf_architecture(model, family, layers, dim), family, dim, _rotated_dims_of_head(model.config, dim), layers
    )


def _gguf_architecture(model: nn.Module, family: Family, layers: tuple[Layer, ...], head_dim: int) -> str:
    """llama.cpp's name for the architecture; `deci` where layers differ."""
    if len(set(layers)) > 1 or any(not layer.heads or layer.width == STAND_IN for layer in layers):
        if family.kind != "llama":
            raise cannot_write_gguf(
                f"layers differ in width, heads or branches, which llama.cpp's `{family.kind}` has no place for",
                help=f"prune all layers alike; {INSTEAD}",
            ).rejection()
        return "deci"
    refuse_widths_unlike_stream(
        family, residual_stream_width(model), embedding_scale(model), {layers[0].heads * head_dim}
    )
    return family.kind


def embedding_scale(model: Any) -> float | None:
    """Factor of embeddings; None where they have none."""
    return vars(model.model.embed_tokens).get("scalar_embed_scale")


def refuse_widths_unlike_stream(
    family: Family, hidden_size: int, embedding_scale: float | None, all_heads_widths: Collection[int]
) -> None:
    """Raise Reject where llama.cpp derives a factor or heads from a stream's width, and the model has others.

    all_heads_widths   of attentions, the numbers that all heads of one have together
    """
    if embedding_scale and round(embedding_scale**2) != hidden_size:
        raise cannot_write_gguf(
            f"embeddings are multiplied by the root of {embedding_scale**2:.0f}, and llama.cpp's "
            f"`{family.kind}` takes that of "
            f"the {hidden_size} channels of the residual stream",
            help=f"prune other things than the stream; {INSTEAD}",
        ).rejection()
    other = next((heads for heads in all_heads_widths if heads != hidden_size), None)
    if family.of.square and other is not None:
        raise cannot_write_gguf(
            f"all heads of a layer have {other} numbers together, and llama.cpp's `{family.kind}` takes them for the "
            f"{hidden_size} of the residual stream",
            help=f"prune neither heads nor the stream, or both to one width; {INSTEAD}",
        ).rejection()


def refuse_unsupported_forecast(skeleton: Skeleton, embedding_scale: float | None) -> None:
    """Raise Reject (cannot-write-gguf) where widths that a plan forecasts are none that llama.cpp derives."""
    family, shapes = FAMILIES[skeleton.model_type], skeleton.shapes()
    output = next(name for name, gguf_name in family.parts.items() if gguf_name == "attn_output")
    names = (f"{unit}.{output}.weight" for unit in skeleton.units)
    head_widths = {shapes[name][1] for name in names if name in shapes}
    refuse_widths_unlike_stream(family, shapes["model.embed_tokens.weight"][1], embedding_scale, head_widths)


def residual_stream_width(model: Any) -> int:
    """Channels of the residual stream: of a narrower one the config may still say how wide it was."""
    return model.model.embed_tokens.weight.shape[-1]


def _layer_and_head_dim(model: Any, family: Family, layer_index: int) -> tuple[Layer, int]:
    """A layer, and the size of its heads."""
    layer = model.model.layers[layer_index]
    sizes = {
        family.parts[name.removesuffix(".weight")]: tensor.shape
        for name, tensor in layer.state_dict().items()
        if name.removesuffix(".weight") in family.parts
    }
    width = sizes["ffn_down"][1] if "ffn_down" in sizes else STAND_IN
    if "attn_output" not in sizes:
        return Layer(0, 0, width), 0
    dim = layer.self_attn.head_dim
    heads = sizes["attn_output"][1] // dim
    kv_heads = (sizes["attn_qkv"][0] // dim - heads) // 2 if "attn_qkv" in sizes else sizes["attn_k"][0] // dim
    if heads % kv_heads:
        raise cannot_write_gguf(
            f"layer {layer_index} has {heads} heads over {kv_heads} of keys and values, which does not divide",
            help=INSTEAD,
        ).rejection()
    return Layer(heads, kv_heads, width), dim


def _rotated_dims_of_head(config: Any, head_dim: int) -> int:
    return int(head_dim * rope_parameters_of(config).get("partial_rotary_factor", 1.0))


def refuse_weights_without_gguf_name(model: nn.Module) -> None:
    """Raise Reject where a weight has no place, whatever is cut."""
    config = pretrained(model).config
    family = FAMILIES[config.model_type]
    for name in model.state_dict():
        _gguf_name(name, family, family.kind, config.tie_word_embeddings)


def shape_metadata(model: Any, shape: GgufShape) -> dict[str, Any]:
    """Keys below the architecture's name, per-layer ones as lists where layers differ."""
    config, even = model.config, shape.architecture != "deci"

    def each(values: list[int]) -> Any:
        return values[0] if even else values

    rope = rope_parameters_of(config)
    centred = shape.family.of.centred
    stretch = {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.get("factor", 1.0))}
    return {
        "context_length": supported_context_length(config),
        "embedding_length": residual_stream_width(model),
        "block_count": len(shape.layers),
        "feed_forward_length": each([layer.width for layer in shape.layers]),
        "attention.head_count": each([layer.heads for layer in shape.layers]),
        "attention.head_count_kv": each([layer.kv_heads for layer in shape.layers]),
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        f"attention.layer_norm_{'' if centred else 'rms_'}epsilon": _norm_epsilon(config),
        "rope.dimension_count": shape.n_rotated,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "vocab_size": config.vocab_size,
        **(stretch if rope.get("rope_type") == "linear" else {}),
        **sliding_window_metadata(config),
        **shape.family.keys(config),
    }


def _norm_epsilon(config: Any) -> float:
    """Under the name that the config has for it."""
    names = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon")
    return float(next(value for name in names if (value := getattr(config, name, None)) is not None))


def gguf_named_tensors(model: Any, shape: GgufShape) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under llama.cpp's name. Raises Reject where one has no place."""
    config, weights = model.config, model.state_dict()
    if rope_parameters_of(config).get("rope_type", "default") == "llama3":
        yield "rope_freqs.weight", rotary_frequency_divisors(model, shape.head_dim)
    for name, gguf_name in names_with_gguf_names(model, shape):
        tensor = weights[name]
        if is_rotary(gguf_name, shape):
            tensor = interleave_rotary_rows(tensor, shape.head_dim)
        if shape.family.raised and gguf_name.endswith("_norm.weight"):
            tensor = tensor.float() + 1
        yield gguf_name, tensor
    yield from _zero_mlps_of_layers_without(residual_stream_width(model), shape, weights)


def names_with_gguf_names(model: Any, shape: GgufShape) -> Iterator[tuple[str, str]]:
    """Names of weights with llama.cpp's, but for those that it has once where the model has them twice."""
    for name in model.state_dict():
        gguf_name = _gguf_name(name, shape.family, shape.architecture, model.config.tie_word_embeddings)
        if gguf_name is not None:
            yield name, gguf_name


def gguf_weight_name_by_linear_path(model: Any, shape: GgufShape) -> dict[str, str]:
    """Paths of linear modules with llama.cpp's names of their weights; without a head that shares the embedding's."""
    paths = ((name.removesuffix(".weight"), gguf_name) for name, gguf_name in names_with_gguf_names(model, shape))
    tied = {"lm_head"} if model.config.tie_word_embeddings else set()
    return {
        path: gguf_name
        for path, gguf_name in paths
        if gguf_name.endswith(".weight") and path not in tied and isinstance(model.get_submodule(path), nn.Linear)
    }


def is_rotary(gguf_name: str, shape: GgufShape) -> bool:
    """Whether rows of a weight lie as rotary pairs do, and llama.cpp has these beside each other."""
    return shape.family.turned and (".attn_q." in gguf_name or ".attn_k." in gguf_name)


def _zero_mlps_of_layers_without(
    hidden: int, shape: GgufShape, weights: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """MLPs of zeros, of layers that have none."""
    for number, layer in enumerate(shape.layers):
        if f"model.layers.{number}.mlp.down_proj.weight" not in weights and shape.architecture == "deci":
            yield f"blk.{number}.ffn_norm.weight", torch.ones(hidden)
            for part in ("gate", "up"):
                yield f"blk.{number}.ffn_{part}.weight", torch.zeros(layer.width, hidden)
            yield f"blk.{number}.ffn_down.weight", torch.zeros(hidden, layer.width)


# llama.cpp has one table of tokens where the head is that, too; these want one of their own.
_TWICE = ("stablelm", "olmo2", "phi2")


def _gguf_name(name: str, family: Family, architecture: str, is_head_tied: bool) -> str | None:
    """llama.cpp's name of a weight; None where the head is the table of tokens. Raises Reject where it has none."""
    if name == "lm_head.weight" and is_head_tied and family.kind not in _TWICE:
        return None
    if gguf_name := _OUTER.get(name):
        if name != "lm_head.bias" or family.of.headed:
            return gguf_name
    elif name.startswith("model.layers."):
        number, _, suffix = name.removeprefix("model.layers.").partition(".")
        stem, _, kind = suffix.rpartition(".")
        gguf_name = family.parts.get(stem)
        if gguf_name and (kind == "weight" or (kind == "bias" and gguf_name in KINDS[architecture].biases)):
            return f"blk.{number}.{gguf_name}.{kind}"
    raise cannot_write_gguf(f"`{name}` has no place in llama.cpp's `{architecture}`", help=INSTEAD).rejection()


def interleave_rotary_rows(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of each head so that the two of a rotary pair lie beside each other."""
    # [h * d, ...] -> [h, 2, d / 2, ...]: the halves of a head become neighbours
    rows = tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape)


def separate_rotary_rows(tensor: Tensor, head_dim: int) -> Tensor:
    """Inverse of `interleave_rotary_rows`."""
    # [h * d, ...] -> [h, d / 2, 2, ...]: the two of a pair become halves of the head
    pairs = tensor.view(-1, head_dim // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def rotary_frequency_divisors(model: Any, head_dim: int) -> Tensor:
    """Divisor of each rotary frequency, [head_dim / 2]: Llama 3's stretch of the slow ones."""
    base = float(rope_parameters_of(model.config).get("rope_theta", 10000.0))
    plain = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return plain / model.model.rotary_emb.inv_freq.float().cpu()
