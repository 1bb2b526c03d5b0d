"""Linear modules as `MatMulNBits` of ONNX Runtime: the codes of their grids, which its kernels multiply as they are.

    B             [n, blocks, block * bits / 8] uint8: codes of a row, of four bits the first in the low half of a byte
    scales        [n, blocks] float32
    zero_points   [n, ceil(blocks * bits / 8)] uint8, packed alike; none where 0 is the middle code

A weight is scale * (code - zero). The last block may be longer than what is left of a row: codes of zero fill it.
Source: the operator's text in ONNX Runtime 1.32, docs/ContribOperators.md.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.codes import Codes
from .nbits_checking import BLOCKS, DOMAIN, FLOAT_INPUTS, OPERATOR

_VERSION = 1


@dataclass(frozen=True)
class NBitsWeight:
    """A weight [n, k] as the operator reads it."""

    k: int
    bits: int
    block: int
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None


def block_size(group_size: int, k: int) -> int | None:
    """Inputs of a block where `group_size` inputs share a scale, 0 for all `k`; None where no block divides a group.

    A block has one scale, and a scale may be that of several blocks.
    """
    if group_size in (0, k):
        return next((block for block in BLOCKS if block >= k), BLOCKS[-1])
    return next((block for block in reversed(BLOCKS) if group_size % block == 0), None)


def pack_nbits(codes: Codes, bits: int, block_length: int, in_features: int) -> NBitsWeight:
    """Codes [n, in_features] of a grid in blocks; `block_length` is that of `block_size`."""
    blocks = -(-in_features // block_length)
    groups = torch.arange(blocks) * block_length // codes.group
    zero = codes.zero[:, groups].to(torch.uint8)  # [n, blocks]
    code = torch.cat([codes.code[:, :in_features], zero[:, -1:].expand(-1, blocks * block_length - in_features)], 1)
    middle = bool((zero == 1 << (bits - 1)).all())
    return NBitsWeight(
        in_features,
        bits,
        block_length,
        _packed(code, bits).view(len(code), blocks, -1),
        codes.scale[:, groups].contiguous(),
        None if middle else _packed(zero, bits),
    )


def nbits_bytes(n: int, k: int, bits: int, block: int, symmetric: bool) -> int:
    """Bytes of a weight [n, k]: codes, scales, and zeros where they lie anywhere."""
    blocks = -(-k // block)
    return n * (blocks * block * bits // 8 + 4 * blocks + (0 if symmetric else -(-blocks * bits // 8)))


@contextlib.contextmanager
def linears_as_matmul_nbits(model: nn.Module, weights: Mapping[str, NBitsWeight]) -> Iterator[None]:
    """Context in which the linear modules at these paths are nodes of the operator to torch's exporter."""
    dense = {path: model.get_submodule(path) for path in weights}
    try:
        for path, module in dense.items():
            bias = module.bias
            model.set_submodule(path, NBitsLinear(weights[path], bias if isinstance(bias, Tensor) else None))
        yield
    finally:
        for path, module in dense.items():
            model.set_submodule(path, module)


class NBitsLinear(nn.Module):
    """A linear module as a node of the operator; run by torch it gives zeros, as all symbolic operators do."""

    weight_codes: Tensor
    weight_scales: Tensor
    weight_zero_points: Tensor | None

    def __init__(self, weight: NBitsWeight, bias: Tensor | None):
        super().__init__()
        self.in_features, self.out_features = weight.k, len(weight.codes)
        # Readers differ in their defaults: OpenVINO has none for the level.
        self.attributes: dict[str, Any] = {
            "K": weight.k,
            "N": self.out_features,
            "bits": weight.bits,
            "block_size": weight.block,
            "accuracy_level": FLOAT_INPUTS,
        }
        self.register_buffer("weight_codes", weight.codes)
        self.register_buffer("weight_scales", weight.scales)
        self.register_buffer("weight_zero_points", weight.zero_points)
        self.bias = bias if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The scales: some models look at the type of a module's weight before they call it (T5)."""
        return self.weight_scales

    def forward(self, x: Tensor) -> Tensor:  # [..., k] -> [..., n]
        zero_points = [] if self.weight_zero_points is None else [self.weight_zero_points]
        product = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OPERATOR}",
            [x, self.weight_codes, self.weight_scales, *zero_points],
            self.attributes,
            dtype=torch.float32,
            shape=(*x.shape[:-1], self.out_features),
            version=_VERSION,
        )
        return product if self.bias is None else product + self.bias


def _packed(codes: Tensor, bits: int) -> Tensor:
    """[n, count] uint8 codes of 4 or 8 bits -> [n, bytes] uint8, the first of two in the low half."""
    if bits == 8:
        return codes.contiguous()
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return even[:, ::2] | even[:, 1::2] << 4
