"""Round weights of linear modules to few values, and let the weights behind each make up for it."""

from typing import Literal

import torch
from torch import Tensor

from ...compiler.analysis.discovery.discover import skeleton_of
from ...compiler.ir.program import Program
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Effort, param
from ...compiler.transforms.search.quantizing import Quantizer, nonzero_mask, note_grids
from ...compiler.transforms.search.solving import estimate_layerwise_effort, solve_and_replace_weights
from ...compiler.transforms.search.updates import solve_gptq
from ...dsl.checker.skeleton import Skeleton
from ...dsl.checker.values import DataRef


class Gptq(Quantizer):
    """Round weights of linear modules to few values, and let the weights behind each make up for it.

    Inputs are settled one after another, those that are large over `data` first: what an output loses when its
    weight is rounded, the weights of later inputs take over. Layers go from the first to the last, each for what
    the rounded ones before it give; a killed run goes on at the layer where it was. Every output has a scale for
    each `group` of its inputs; 0 is one of the values, and the zeros of a sparse matrix stay. The modules keep
    their type and hold the rounded values: every target writes them and computes the same, and nothing gets
    smaller by itself.

    `scales: search`, the default, is own: scales for which the squared error is least, weighed by the inputs'
    squares. After that, `sweeps` times, scales are fitted to the codes, all of an output at once, and every code is
    looked at again, given all others: none of this raises an output's squared error. `order: given, scales: range,
    sweeps: 0` is plain GPTQ.

    Source: GPTQ (Frantar et al. 2022, arXiv 2210.17323); the sweeps are QuantEase (Behdin et al. 2023, arXiv
    2309.01885), and fitting scales between them is own.
    Example: q = quantize.gptq(on: "*_proj", data: calib, bits: 4, group: 32)
    """

    data: DataRef = param("Rows whose inputs of the modules count; more tokens than a module has inputs.")
    order: Literal["activation", "given"] = param(
        "Large inputs first, on scales fitted before; or as they lie, on scales fitted as they come.",
        default="activation",
    )
    sweeps: int = param(
        "How often scales and codes are looked at again, given all others.", default=2, ge=0, unit="sweeps"
    )
    damping: float = param("What is added to the inputs' squares, as a share of their mean.", default=0.01, gt=0)

    def run(self, program: Program, ctx: Context) -> None:
        chosen, rows, grid = self.chosen(skeleton_of(program)), ctx.rows(self.data), self.grid

        def new(_unit: str, weight: Tensor, gram: Tensor | None) -> Tensor:
            keep = nonzero_mask(weight)
            if gram is None:  # no row reached it
                nearest = grid.fit_scales(weight.float()).round(weight.float())
                return nearest if keep is None else torch.where(keep, nearest, 0.0)
            return solve_gptq(weight, gram, grid, self.order, keep, self.damping, self.sweeps)

        note_grids(
            program, chosen, *solve_and_replace_weights(program, ctx, chosen, rows, new), grid, tokens=rows.numel()
        )

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        return estimate_layerwise_effort(skeleton, self.chosen(skeleton), ctx.rows(self.data), "uniform")
