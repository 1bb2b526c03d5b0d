"""Linear modules whose weights are on a grid, as `MatMulNBits` of ONNX Runtime stores them: the same codes."""

from collections.abc import Sequence

from torch import Tensor

from ...dsl.syntax.diagnostics import Diagnostic
from ...kernels.codes import Codes
from ..core.quantity import count_text
from ..ir.program import Program
from ..models.checkpoints.pack_quantized import Scheme
from ..plugin.interfaces import Pass
from ..runtimes.onnx.nbits import NBitsWeight, block_size, pack_nbits
from .gridded_modules import (
    PackedFormat,
    PackedLinears,
    incompatible_grid,
    notes_on_dense_modules,
    pack_linear_modules,
    quantizer_steps,
)

NBITS = PackedFormat("weights", "nbits")


def pack_nbits_modules(program: Program) -> PackedLinears[NBitsWeight]:
    """Linear modules that are on a grid. Raises Reject where there are none, or a grid can't be packed in blocks."""
    return pack_linear_modules(program, NBITS, _pack_module)


def nbits_notes(linears: PackedLinears[NBitsWeight]) -> list[str]:
    """Sentences for the model card."""
    count = count_text(len(linears.packed), "linear module")
    return [f"The weights of {count} are codes of `MatMulNBits`.", *notes_on_dense_modules(linears.dense)]


def diagnostic_for_steps(earlier_passes: Sequence[Pass]) -> Diagnostic | None:
    """Diagnostic for a recipe whose steps leave no grid, or one of groups that no block divides."""
    steps = quantizer_steps(earlier_passes)
    groups = [step.group for step in steps if step.group and block_size(step.group, 0) is None]
    return NBITS.no_grid_diagnostic() if not steps else _unfit_group("a step quantises", groups[0]) if groups else None


def _pack_module(path: str, weight: Tensor, scheme: Scheme, codes: Codes) -> NBitsWeight:
    k = weight.shape[1]
    block = block_size(scheme.group, k)
    if block is None:
        raise _unfit_group(f"`{path}` is quantised", scheme.group).rejection()
    return pack_nbits(codes, scheme.bits, block, k)


def _unfit_group(subject: str, group_size: int) -> Diagnostic:
    return incompatible_grid(
        f"{subject} in groups of {group_size} inputs, and a scale of `MatMulNBits` is for 16, 32, 64 or 128",
        help="quantise with `group: 32`, or another multiple of 16, or with `group: 0`",
        argument="weights",
    )
