"""Make the smallest weights of linear modules zero."""

from typing import Literal

from ...compiler.ir.program import Program
from ...compiler.search.sparsity import chosen_parts, finite_weight, keep_mask, mask, note
from ...compiler.words.context import Context
from ...compiler.words.kinds import Lossy, Pass, param
from ...dsl.values import Ratio, Selector


class Magnitude(Pass):
    """Make the smallest weights of linear modules zero.

    Nothing gets smaller or faster by itself: `lower.sparse_cpu` packs what is left. Without data it is the
    cheapest mask and the worst; `sparsify.wanda` costs a look at some text. Half of the weights of a small
    language model do not go without a trace: measure it, and heal before, as training fills the zeros again.

    Source: Han et al. 2015 (arXiv 1506.02626); the blocks are the vectors of the kernel
    `block_sparse_linear`.
    Example: sps = sparsify.magnitude(on: "*_proj", sparsity: 50% of weights)
    """

    keeps = Lossy()
    acts_on = "linear"
    determinism = "deterministic"
    after = {"tune.heal": "training would fill the zeros again"}

    sparsity: Ratio = param("Share of a module's weights that become zero.", of=("weights",), gt=0, lt=1)
    on: Selector | None = param("Linear modules; all inside the layers where it is left out.", default=None)
    pattern: Literal["any", "blocks"] = param(
        "Any weights, or blocks of 16 outputs by 2 inputs, which run faster from 80% on.", default="any")
    each: Literal["module", "row"] = param("What loses that share: modules, or every output.", default="module")

    def run(self, program: Program, ctx: Context) -> None:
        chosen, found = chosen_parts(program.skeleton, self.on), {}
        for part in ctx.each(chosen, "masks", len(chosen)):
            score = finite_weight(program, part.path).abs().float()
            keep = keep_mask(score, self.sparsity.value, self.pattern, self.each)
            found[part.path] = mask(program, part.path, keep)
        note(program, chosen, found, pattern=self.pattern)
