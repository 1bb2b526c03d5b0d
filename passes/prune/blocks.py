"""Remove whole residual branches or layers, the least missed first."""

from collections.abc import Iterator
from typing import Literal

from ...compiler.analysis.planning.selection import branches, layers
from ...compiler.plugin.interfaces import param
from ...compiler.transforms.search.block_pruner import BlockPruner
from ...compiler.transforms.search.greedy import GreedySearch
from ...compiler.transforms.search.parts import BlockParts, LayerParts
from ...dsl.checker.skeleton import Skeleton
from ...dsl.checker.values import Ratio, Selector
from ...dsl.syntax.diagnostics import Fault

no_block = Fault("no-block", "Blocks are to go from a model that has none to spare.")


class Blocks(BlockPruner):
    """Remove whole residual branches or layers, the least missed first.

    A branch is what one attention or MLP adds to the residual stream. Candidates are scored by running the model
    without them; the one that is missed least goes, and so on. An exact search scores all of them again after
    each cut, attention first; a racing one only those that may win by what they cost before. Of `params`, either
    weighs what a block costs against its size. Removing layers leaves a stock checkpoint; removing branches leaves
    shapes that only `effc.load` reads at their true size. The last branch and the last layer always stay.

    Source: BlockPruner (Zhong et al. 2024, arXiv 2406.10594), section 3; stage 1 of MultiPruner.
    Example: slim = prune.blocks(remove: 2, score: perplexity(calib))
    """

    acts_on = "branches"

    remove: int | Ratio = param(
        "How many to remove, or what share of them or of all parameters.", of=("blocks", "params"), ge=1, unit="blocks"
    )
    on: Selector | None = param("Which may go: paths of attention or MLP modules, or of layers.", default=None)
    unit: Literal["branch", "layer"] = param("Remove single branches, or whole layers.", default="branch")

    def effects(self) -> Iterator[str]:
        if self.unit == "branch":
            yield "missing branches"

    def make_search(self, skeleton: Skeleton) -> GreedySearch:
        self._refuse_single_removable(skeleton)
        parts: LayerParts | BlockParts
        if self.unit == "layer":
            parts = LayerParts("blocks", all=len(skeleton.units), units=layers(skeleton, self.on))
        else:
            parts = BlockParts("blocks", all=len(skeleton.branches), branches=branches(skeleton, self.on))
        return self.removal_search(self.remove, "blocks", parts)

    def _refuse_single_removable(self, skeleton: Skeleton) -> None:
        """The last one stays, so that one alone is none to remove."""
        removable, noun = (skeleton.units, "layer") if self.unit == "layer" else (skeleton.branches, "residual branch")
        if len(removable) <= 1:
            raise no_block(
                f"{skeleton.model_type} has {'one' if removable else 'no'} {noun} that effc can tell"
                f"{', and the last one stays' if removable else ''}",
                help="`prune.channels` makes what is there narrower",
            ).rejection()
