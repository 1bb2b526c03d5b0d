"""Number formats of linear layers on native kernels: one record each, from which tables that name formats follow."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

# Names that recipes have, where headers read them: `formats` of `lower.mixed`, `format` of `lower.sparse_cpu`, and
# `weights` and `head` of `native`.
MixedFormat = Literal["dense_bf16", "sparse_bf16", "dense_int8", "sparse_int8", "dense_int8_int16", "dense_int4"]
FormatName = MixedFormat | Literal["block"]
DenseNumbers = Literal["bf16", "int8", "int4"]


@dataclass(frozen=True)
class NumberFormat:
    """Numbers that a kernel multiplies, and how they lie.

    name          of the format in recipes: `format` of `lower.sparse_cpu`
    kernel        name of the op (`kernels.native.LINEAR`)
    numbers       of weights, or of weights and inputs: formats of equal numbers compute equal outputs. The target
                  `native` packs layers by the dense format of its numbers
    bytes         of a weight with its part of the scales; of a dense matrix
    nanoseconds   level of instruction sets -> nanoseconds that 32 weights take where memory is no limit; of blocks the
                  least, and what all blocks kept take more
    tolerance     of outputs of a model all of whose layers have these numbers, as a share of root mean squares
    grid          weights are put on a grid of few values; False: they are rounded as floating numbers are
    skips         zeros that it leaves out: "", "weights" or "blocks"
    worth_from    share of those zeros from which it may be faster than a dense one
    grouped       groups of inputs share a scale, and packing takes their size
    head          numbers of the layer that makes the logits beside such layers, unless a recipe says; "": the same
    """

    name: str
    kernel: str
    numbers: str
    bytes: float
    nanoseconds: Mapping[str, float | tuple[float, float]]
    tolerance: float
    grid: bool = True
    skips: str = ""
    worth_from: float = 0.0
    grouped: bool = False
    head: str = ""


def _speeds_by_isa_level(
    portable: float | tuple[float, float],
    avx2: float | tuple[float, float],
    avx512: float | tuple[float, float],
    avx512_bf16: float | tuple[float, float],
    amx: float | tuple[float, float],
) -> Mapping[str, float | tuple[float, float]]:
    """Speeds of a format by kernel level: of a Zen 4 (EPYC, 3.7 GHz) with kernels held to it; amx of a Xeon (3.6 GHz,
    `bench/pace.py`)."""
    return MappingProxyType(
        {"portable": portable, "avx2": avx2, "avx512": avx512, "avx512_bf16": avx512_bf16, "amx": amx}
    )


# Tolerances: bfloat16 (2**-9 each) comes to 0.004..0.017 over the 28 architectures of the tests and to 0.014 in
# SmolLM2, where attention scaled 10 % wrong is 0.07 and one layer scaled twofold 0.05. int8 by the token comes to
# 0.02..0.08 and, where few channels are a hundred times the others, as in SmolLM2, to 0.27; a wrong activation, window
# or sum is 0.4 and more there. With all inputs in 16 bits it was 0.011..0.048, in SmolLM2 0.036; with outliers alone
# in 16 it is more, and within what is allowed. What is finer is seen with bfloat16, whose plan is the same.
NUMBER_FORMATS = (
    NumberFormat(
        "dense_bf16", "dense_linear", "bf16", 2.0, _speeds_by_isa_level(3.5, 1.2, 1.0, 0.85, 0.73), 0.04, grid=False
    ),
    NumberFormat(
        "sparse_bf16",
        "sparse_linear",
        "bf16",
        2.0,
        _speeds_by_isa_level(14.9, 2.1, 1.2, 1.1, 1.2),
        0.04,
        grid=False,
        skips="weights",
        worth_from=0.05,
    ),
    NumberFormat(
        "block",
        "block_sparse_linear",
        "bf16",
        2.0,
        _speeds_by_isa_level((0.5, 3.2), (0.4, 0.85), (0.4, 0.65), (0.4, 0.57), (0.01, 0.8)),
        0.04,
        grid=False,
        skips="blocks",
        worth_from=0.2,
    ),
    NumberFormat("dense_int8", "dense_linear_int8", "int8", 1.0, _speeds_by_isa_level(18.9, 1.3, 0.85, 0.6, 0.24), 0.4),
    NumberFormat(
        "sparse_int8",
        "sparse_linear_int8",
        "int8",
        1.0,
        _speeds_by_isa_level(30.4, 2.5, 1.1, 0.76, 0.48),
        0.4,
        skips="weights",
        worth_from=0.05,
    ),
    # The products of int8 and those of outliers' upper bytes: 1.08 to 1.16 times as long (128 rows, one input in 80
    # twelve times the others). On AMX, whose tiles take both lines of every row, not measured.
    NumberFormat(
        "dense_int8_int16",
        "dense_linear_int8_int16",
        "int8_int16",
        1.0,
        _speeds_by_isa_level(20.4, 1.4, 0.93, 0.7, 0.48),
        0.1,
    ),
    # The products of int8; AMX measured.
    NumberFormat(
        "dense_int4",
        "dense_linear_int4",
        "int4",
        0.56,
        _speeds_by_isa_level(18.9, 1.3, 0.85, 0.6, 0.3),
        0.8,
        grouped=True,
        head="int8",
    ),
)
BY_KERNEL = {format.kernel: format for format in NUMBER_FORMATS}
BY_NAME = {format.name: format for format in NUMBER_FORMATS}
DENSE = {format.numbers: format for format in NUMBER_FORMATS if not format.skips}  # by numbers
