"""Round weights of linear modules to the nearest of few values."""

import torch

from ...compiler.analysis.discovery.discover import skeleton_of
from ...compiler.ir.program import Program
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Effort
from ...compiler.transforms.search.quantizing import Quantizer, nonzero_mask, note_grids
from ...compiler.transforms.search.sparsity import finite_weight, relative_change, replace_weight, weight_count_by_path
from ...dsl.checker.skeleton import Skeleton


class Round(Quantizer):
    """Round weights of linear modules to the nearest of few values.

    Every output has a scale for each `group` of its inputs, and codes of `bits` bits; 0 is one of the values, and
    the zeros of a sparse matrix stay. The modules keep their type and hold the rounded values: every target writes
    them and computes the same, and nothing gets smaller by itself. With some text `quantize.gptq` loses less.

    Source: uniform quantisation, Nagel et al. 2021 (arXiv 2106.08295), section 2.2; ranges as GPTQ's code has them.
    Example: q = quantize.round(on: "*_proj", bits: 8, group: 32)
    """

    def run(self, program: Program, ctx: Context) -> None:
        chosen, zeros, errors = self.chosen(skeleton_of(program)), {}, {}
        for part in ctx.each(chosen, "rounding", len(chosen)):
            weight = finite_weight(program, part.path).float()
            keep, new = nonzero_mask(weight), self.grid.fit_scales(weight).round(weight)
            new = new if keep is None else torch.where(keep, new, 0.0)
            errors[part.path] = relative_change(weight, new)
            zeros[part.path] = replace_weight(program, part.path, new, ctx)
        note_grids(program, chosen, zeros, errors, self.grid)

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        """Scales of every number's group are tried, or follow from the largest."""
        how = "grid" if self.grid.search else "select"
        return Effort(work={how: float(sum(weight_count_by_path(self.chosen(skeleton)).values()))})
