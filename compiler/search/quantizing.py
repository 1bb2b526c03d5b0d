"""What passes that put weights on a grid have in common: the zeros they leave, and what they say."""

from collections.abc import Mapping, Sequence
from math import fsum
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...dsl.inputs import inputs
from ...dsl.skeleton import Part
from ...kernels.grid import Grid
from .masks import is_sparse
from .sparsity import sizes

if TYPE_CHECKING:
    from ..ir.program import Program


def kept(weight: Tensor) -> Tensor | None:
    """What is not zero of a sparse matrix, [out, in] bool; None of a dense one."""
    return weight != 0 if is_sparse(weight) else None


def note(program: "Program", chosen: Sequence[Part], zeros: Mapping[str, float], grid: Grid, **more: Any) -> None:
    """Say what the grids are, how many bits a weight would take, and how much of each module is zero."""
    weights = sizes(chosen)
    bits = fsum(grid.bits_per_weight(inputs(part)) * weights[part.path] for part in chosen) / sum(weights.values())
    program.changed()
    program.note(
        bits=grid.bits,
        group=grid.group,
        symmetric=grid.symmetric,
        bits_per_weight=round(bits, 3),
        quantized={path: round(share, 4) for path, share in zeros.items()},
        **more,
    )
