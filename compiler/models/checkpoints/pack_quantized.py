"""Linear weights in the format `pack-quantized` of compressed-tensors: codes in 32-bit words, scales, zeros.

A weight [n, k] is four tensors behind its module's name:

    weight_packed      [n, ceil(k * bits / 32)] int32: codes of a row, the first in the lowest bits
    weight_scale       [n, groups]              the model's dtype; groups of neighbouring inputs
    weight_zero_point  [ceil(n * bits / 32), groups] int32: codes of zeros, packed down the rows; asymmetric ones alone
    weight_shape       [2] int64                n, k

The package itself is not used: it fills a model that transformers has built, where a folder that comes from anybody
is checked first, and its functions have moved between versions. The tests compare with it.
Source: compressed-tensors 0.20, `compressors/pack_quantized`. Its codes are signed, ours less 2**(bits - 1), which it
adds again before it packs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config_bounds import invalid_config
from .safetensors_header import damaged_weights
from .tensor_files import iterate_mapped_tensors
from .weights import Weights

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
KEY = "quantization_config"
BITS = (4, 8)  # whose words every version packs alike, and that vLLM reads
_WORD = 32
_SCALES = (torch.float32, torch.bfloat16, torch.float16)
_PACKED, _SCALE, _ZERO, _SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
_REMEDY = "take config.json and the weights of one save"


@dataclass(frozen=True, order=True)
class Scheme:
    """A grid as the format states it: bits of a code, inputs that share a scale (0: all), zero is the middle code."""

    bits: int
    group: int
    symmetric: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if self.group else "channel",
            "group_size": self.group or None,
            "dynamic": False,
            "actorder": None,
        }

    @staticmethod
    def smallest_for_grid(bits: int, group_size: int, symmetric: bool) -> "Scheme":
        """The scheme of least bits that has the codes of a grid."""
        return Scheme(next(b for b in BITS if b >= bits), group_size, symmetric)

    @staticmethod
    def from_json(weights: Any, label: str) -> "Scheme":
        """Scheme of one of `config_groups`; it may come from anybody."""
        read = weights if isinstance(weights, dict) else {}
        bits, group, symmetric = read.get("num_bits"), read.get("group_size"), read.get("symmetric", True)
        by_group = {"group": group, "channel": 0}.get(str(read.get("strategy")))
        plain = read.get("type", "int") == "int" and read.get("dynamic", False) is False and not read.get("actorder")
        if not (
            plain
            and type(bits) is int
            and bits in BITS
            and type(by_group) is int
            and by_group >= 0
            and type(symmetric) is bool
        ):
            raise invalid_config(
                f"{label}: effc reads `{FORMAT}` weights of {' or '.join(map(str, BITS))} bits in groups or rows, "
                "and the config has others",
                help="load it with transformers, or start from the model that it was quantized from",
            ).rejection()
        return Scheme(bits, by_group, symmetric)

    def stored_bytes(self, n: int, k: int, itemsize: int) -> int:
        """Bytes of a weight [n, k] whose scales take `itemsize`."""
        groups = k // (self.group or k)
        zeros = 0 if self.symmetric else 4 * _n_words(n, self.bits) * groups
        return 4 * n * _n_words(k, self.bits) + itemsize * n * groups + zeros + 2 * 8


def schemes_of_config(config: Mapping[str, Any], label: str) -> tuple[Scheme, ...]:
    """Schemes of a model's weights by its config; () where it is not in this format. Raises Reject (bad-config)."""
    read = config.get(KEY)
    if not isinstance(read, dict) or (read.get("quant_method"), read.get("format")) != (METHOD, FORMAT):
        return ()
    groups = read.get("config_groups")
    parts = [part for part in groups.values() if isinstance(part, dict)] if isinstance(groups, dict) else []
    rounds_inputs = any(part.get("input_activations") or part.get("output_activations") for part in parts)
    if rounds_inputs or read.get("kv_cache_scheme"):
        raise invalid_config(
            f"{label}: inputs or caches of the model are quantized", help="load it with transformers"
        ).rejection()
    if not parts:
        raise invalid_config(f"{label}: `{KEY}` has no `config_groups`", help=_REMEDY).rejection()
    return tuple(dict.fromkeys(Scheme.from_json(part.get("weights"), label) for part in parts))


def max_unpacked_count(config: Mapping[str, Any], weights: Weights, label: str) -> int:
    """Numbers that the tensors of a folder stand for, at most: a word may hold eight."""
    if not schemes_of_config(config, label):
        return weights.count
    per_word = _WORD // min(BITS)
    return sum(slot.count * (per_word if name.endswith(_PACKED) else 1) for name, slot in weights.slots.items())


def refuse_excess_packed_numbers(config: Mapping[str, Any], weights: Weights, n_params: int, label: str) -> None:
    """Reject (damaged-weights) words that may hold more than twice the numbers of the model: all are unpacked before a
    name or a shape is compared. The factor is for codes of 8 bits, which are counted as of 4."""
    if not schemes_of_config(config, label):
        return
    words = sum(slot.count for name, slot in weights.slots.items() if name.endswith(_PACKED))
    if words * (_WORD // min(BITS)) > 2 * n_params:
        message = f"{label}: its packed weights hold more numbers than the model of its config has"
        raise damaged_weights(message, help=_REMEDY).rejection()


def read_dense_tensors(config: Mapping[str, Any], weights: Weights, label: str) -> dict[str, Tensor]:
    """Tensors of a folder by name: mapped, and packed weights as dense ones of equal values.

    A config may name any way to quantize, so that none of transformers' own is run on a folder.
    """
    tensors = dict(iterate_mapped_tensors(weights))
    schemes = schemes_of_config(config, label)
    return dict(_with_dense_weights(tensors, schemes, label)) if schemes else tensors


def pack(code: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a weight by name: codes [n, k] uint8, scales and zeros [n, groups] float32."""
    tensors = {
        _PACKED: pack_words(code, scheme.bits),
        _SCALE: scale.to(dtype),
        _SHAPE: torch.tensor(code.shape, dtype=torch.int64),
    }
    if not scheme.symmetric:
        tensors[_ZERO] = pack_words(zero.T.to(torch.uint8), scheme.bits).T.contiguous()
    return tensors


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """[n, k] uint8 codes of 4 or 8 bits -> [n, words] int32, the first code in the lowest bits."""
    per_word = _WORD // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    if bits == 4:
        padded = padded[:, ::2] | padded[:, 1::2] << 4
    return padded.flatten().view(torch.int32).view(len(codes), -1)  # little-endian, as safetensors is


def unpack_words(words: Tensor, bits: int, k: int) -> Tensor:
    """[n, words] int32 -> [n, k] uint8 codes."""
    codes = words.flatten().view(torch.uint8).view(len(words), -1)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), 2).flatten(1)
    return codes[:, :k]


def _with_dense_weights(
    tensors: Mapping[str, Tensor], schemes: tuple[Scheme, ...], label: str
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a folder by name, with a dense weight for each packed one. Raises Reject (damaged-weights)."""
    parts = (_PACKED, _SCALE, _ZERO, _SHAPE)
    packed = {name.removesuffix(_PACKED) for name in tensors if name.endswith(f".{_PACKED}")}
    members = {f"{path}{part}" for path in packed for part in parts}
    for name, tensor in tensors.items():
        if name not in members:
            yield name, tensor
        elif name.endswith(_PACKED):
            path = name.removesuffix(_PACKED)
            if f"{path}weight" in tensors:
                raise damaged_weights(f"{label}: `{path}weight` is there twice, packed too", help=_REMEDY).rejection()
            yield f"{path}weight", _unpack(path, {part: tensors.get(path + part) for part in parts}, schemes, label)


def _unpack(path: str, parts: Mapping[str, Tensor | None], schemes: tuple[Scheme, ...], label: str) -> Tensor:
    words, scale, zeros, shape = (parts[name] for name in (_PACKED, _SCALE, _ZERO, _SHAPE))
    stated = shape is not None and shape.dtype == torch.int64 and shape.shape == (2,)
    n, k = shape.tolist() if stated and shape is not None else (0, 0)
    scheme = next((s for s in schemes if _fits_scheme(s, n, k, words, scale, zeros)), None)
    if scheme is None or words is None or scale is None:
        message = f"{label}: the tensors of `{path}{_PACKED}` are of no scheme of the config"
        raise damaged_weights(message, help=_REMEDY).rejection()
    steps = unpack_words(words, scheme.bits, k).to(torch.int16)
    groups = steps.reshape(n, scale.shape[1], -1)
    zero = torch.full((n, 1), 2 ** (scheme.bits - 1), dtype=torch.int16)
    if zeros is not None:
        zero = unpack_words(zeros.T, scheme.bits, n).T.to(torch.int16)
    return ((groups - zero[:, :, None]).to(scale.dtype) * scale[:, :, None]).reshape(n, k)


def _fits_scheme(
    scheme: Scheme, n: int, k: int, words: Tensor | None, scale: Tensor | None, zeros: Tensor | None
) -> bool:
    """Whether tensors have the types and shapes of a weight [n, k] of a scheme."""
    if words is None or scale is None or min(n, k) < 1 or k % (scheme.group or k):
        return False
    groups = k // (scheme.group or k)
    zero_words = None if scheme.symmetric else (torch.int32, (_n_words(n, scheme.bits), groups))
    return (
        (words.dtype, tuple(words.shape)) == (torch.int32, (n, _n_words(k, scheme.bits)))
        and scale.dtype in _SCALES
        and tuple(scale.shape) == (n, groups)
        and (None if zeros is None else (zeros.dtype, tuple(zeros.shape))) == zero_words
    )


def _n_words(count: int, bits: int) -> int:
    return -(-count * bits // _WORD)
