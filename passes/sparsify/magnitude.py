"""Make the smallest weights of linear modules zero."""

from typing import Literal

from ...compiler.analysis.discovery.discover import skeleton_of
from ...compiler.analysis.planning.peak_memory import bytes_per_parameter
from ...compiler.ir.program import Program
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Effort, param
from ...compiler.transforms.search.masks import keep_mask, magnitude, magnitude_sort_keys
from ...compiler.transforms.search.sparsity import (
    Sparsifier,
    chosen_parts,
    finite_weight,
    mask_weight,
    mask_work,
    note_zero_shares,
    weight_count_by_path,
)
from ...dsl.checker.skeleton import Skeleton
from ...dsl.checker.values import Ratio


class Magnitude(Sparsifier):
    """Make the smallest weights of linear modules zero.

    Nothing gets smaller or faster by itself: `lower.sparse_cpu` packs what is left. Without data it is the
    cheapest mask and the worst; `sparsify.wanda` costs a look at some text. Half of the weights of a small
    language model do not go without a trace: measure it, and let `tune.heal` train what is left, which keeps
    the zeros.

    Source: Han et al. 2015 (arXiv 1506.02626); the blocks are the vectors of the kernel
    `block_sparse_linear`.
    Example: sps = sparsify.magnitude(on: "*_proj", sparsity: 50% of weights)
    """

    sparsity: Ratio = param("Share of a module's weights that become zero.", of=("weights",), gt=0, lt=1)
    each: Literal["module", "row"] = param("What loses that share: modules, or every output.", default="module")

    def run(self, program: Program, ctx: Context) -> None:
        chosen, masks = self.chosen(skeleton_of(program)), {}
        for part in ctx.each(chosen, "masks", len(chosen)):
            masks[part.path] = self._zero_smallest_of_module(program, part.path, ctx)
        note_zero_shares(program, chosen, masks, pattern=self.pattern)

    def _zero_smallest_of_module(self, program: Program, path: str, ctx: Context) -> float:
        """Of one module, so that nothing of it is held when the next one begins; its share of zeros."""
        weight = finite_weight(program, path)
        score = magnitude(weight) if self.pattern == "blocks" else magnitude_sort_keys(weight)
        return mask_weight(program, path, keep_mask(score, self.sparsity.value, self.pattern, self.each), ctx)

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        """Of a module what is ordered, a mask, the result and its bytes are held; of blocks and groups sums and
        places, too."""
        chosen = chosen_parts(skeleton, self.on)
        bytes_per_weight = 3 * bytes_per_parameter(skeleton) + 1 if self.pattern == "any" else 32
        work = mask_work(chosen, self.pattern, self.each)
        return Effort(n_separate=bytes_per_weight * max(weight_count_by_path(chosen).values(), default=0), work=work)
