"""Round weights of linear modules to the nearest of few values."""

from typing import Literal

import torch

from ...compiler.ir.program import Program
from ...compiler.search.grid import check_groups
from ...compiler.search.quantizing import kept, note
from ...compiler.search.sparsity import chosen_parts, exchange, finite_weight, sizes
from ...compiler.words.context import Context
from ...compiler.words.kinds import Effort, Lossy, Pass, param
from ...dsl.skeleton import Skeleton
from ...dsl.values import Selector
from ...kernels.grid import SHRINKS, Grid


class Round(Pass):
    """Round weights of linear modules to the nearest of few values.

    Every output has a scale for each `group` of its inputs, and codes of `bits` bits; 0 is one of the values, and
    the zeros of a sparse matrix stay. The modules keep their type and hold the rounded values: every target writes
    them and computes the same, and nothing gets smaller by itself. With some text `quantize.gptq` loses less.

    Source: uniform quantisation, Nagel et al. 2021 (arXiv 2106.08295), section 2.2; ranges as GPTQ's code has them.
    Example: q = quantize.round(on: "*_proj", bits: 8, group: 32)
    """

    keeps = Lossy()
    acts_on = "linear"
    divides = "group"
    determinism = "deterministic"
    after = {
        "tune.heal": "training would leave the grid",
        "sparsify.sparsegpt": "its weights would leave the grid",
        "sparsify.admm": "its weights would leave the grid",
    }

    bits: int = param("Bits of a code.", default=4, ge=2, le=8, unit="bits")
    group: int = param("Inputs of an output that share a scale; 0 for all.", default=64, ge=0, unit="inputs")
    on: Selector | None = param("Linear modules; all inside the layers where it is left out.", default=None)
    zero: Literal["free", "middle"] = param("Whether 0 is any code, or the middle one.", default="free")
    scales: Literal["range", "search"] = param(
        "Scales that reach the largest weight, or for which the squared error is least.", default="search"
    )

    def run(self, program: Program, ctx: Context) -> None:
        chosen, found = self._chosen(program.skeleton), {}
        for part in ctx.each(chosen, "rounding", len(chosen)):
            weight = finite_weight(program, part.path).float()
            keep, new = kept(weight), self._grid.fit(weight).round(weight)
            found[part.path] = exchange(program, part.path, new if keep is None else torch.where(keep, new, 0.0), ctx)
        note(program, chosen, found, self._grid)

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        """The same shapes. Groups that don't divide are said here, before any weight is read."""
        self._chosen(skeleton)
        return skeleton

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        """Every number is rounded once for each scale that is tried."""
        tried = SHRINKS if self._grid.search else 1
        return Effort(work={"select": float(tried * sum(sizes(self._chosen(skeleton)).values()))})

    def _chosen(self, skeleton: Skeleton):
        chosen = chosen_parts(skeleton, self.on)
        check_groups(chosen, self.group)
        return chosen

    @property
    def _grid(self) -> Grid:
        return Grid(self.bits, self.group, self.zero == "middle", self.scales == "search")
