"""Shared by passes that quantize weights: preserved zeros, and remarks."""

from collections.abc import Iterator, Mapping, Sequence
from math import fsum
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ....dsl.checker.inputs import in_features_of
from ....dsl.checker.skeleton import Part, Skeleton
from ....dsl.checker.values import Selector
from ....kernels.grid import Grid
from ...analysis.planning import shrink
from ...plugin.interfaces import Lossy, Pass, param
from .grid import refuse_indivisible_groups
from .masks import is_sparse
from .sparsity import chosen_parts, weight_count_by_path

if TYPE_CHECKING:
    from ...ir.program import Program


class GridPass(Pass):
    """Has a grid for the weights of linear modules."""

    acts_on = "linear"
    divides = "group"
    determinism = "deterministic"

    bits: int = param("Bits of a code.", default=4, ge=2, le=8, unit="bits")
    group: int = param("Inputs of an output that share a scale; 0 for all.", default=64, ge=0, unit="inputs")
    on: Selector | None = param("Linear modules; all inside the layers where it is left out.", default=None)
    zero: Literal["free", "middle"] = param("Whether 0 is any code, or the middle one.", default="free")
    scales: Literal["range", "search"] = param(
        "Scales that reach the largest weight, or for which the squared error is least.", default="search"
    )

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        """Unchanged shapes. Groups that don't divide are reported here, before any weight is read."""
        self.chosen(skeleton)
        return skeleton

    def chosen(self, skeleton: Skeleton) -> Sequence[Part]:
        parts = chosen_parts(skeleton, self.on)
        refuse_indivisible_groups(parts, self.group)
        return parts

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group, self.zero == "middle", self.scales == "search")


class Quantizer(GridPass):
    """Puts linear modules' weights on a grid; the modules keep their type and hold the values of the grid."""

    keeps = Lossy()
    changes = ("weights",)
    after = {"changes: values": "other values would leave the grid"}

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        """Unchanged shapes, of weights on a grid. Groups that don't divide are reported here."""
        grid = (self.bits, self.group, self.zero == "middle")
        return shrink.with_module_grids(skeleton, {part.path: grid for part in self.chosen(skeleton)})

    def effects(self) -> Iterator[str]:
        if self.bits == 4 and self.zero == "free":
            yield "codes whose 0 lies anywhere"


def nonzero_mask(weight: Tensor) -> Tensor | None:
    """Mask of the nonzeros of a sparse matrix, [out, in] bool; None of a dense one."""
    return weight != 0 if is_sparse(weight) else None


def note_grids(
    program: "Program",
    parts: Sequence[Part],
    zero_share_by_path: Mapping[str, float],
    error_by_path: Mapping[str, float],
    grid: Grid,
    **extra_facts: Any,
) -> None:
    """Note in the program what the grids are, how many bits a weight would take, and of each module the share of zeros
    and the error of its weights, relative to them."""
    weights = weight_count_by_path(parts)
    bits = fsum(grid.bits_per_weight(in_features_of(part)) * weights[part.path] for part in parts) / sum(
        weights.values()
    )
    program.changed()
    program.note(
        bits=grid.bits,
        group=grid.group,
        symmetric=grid.symmetric,
        bits_per_weight=round(bits, 3),
        quantized={path: round(share, 4) for path, share in zero_share_by_path.items()},
        errors={path: round(error, 5) for path, error in error_by_path.items()},
        **extra_facts,
    )
