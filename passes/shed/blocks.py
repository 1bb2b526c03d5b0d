"""Remove whole state-space blocks, the least missed first."""

from ...compiler.analysis.planning.selection import state_space_branches
from ...compiler.plugin.interfaces import param
from ...compiler.transforms.search.block_pruner import BlockPruner
from ...compiler.transforms.search.greedy import GreedySearch
from ...compiler.transforms.search.parts import MixerParts
from ...dsl.checker.skeleton import Skeleton
from ...dsl.checker.values import Ratio, Selector


class Blocks(BlockPruner):
    """Remove whole state-space blocks, the least missed first.

    A block is what one mixer adds to the residual stream, with its norm. Candidates are scored by running the model
    without them; the one that is missed least goes, and so on. Where a layer is nothing but such a block (Mamba,
    Mamba-2, FalconMamba, NemotronH) and the config can do without it, the layer goes as a whole, which leaves a stock
    checkpoint with its cache slots; in hybrids the layer keeps its MLP, and the cache slot goes to another layer. The
    last block of the model always stays. `prune.blocks` does the same for blocks of all kinds.

    Source: Mamba-Shedder (Munoz et al. 2025, arXiv 2501.17088), section 3, with `search: exact`; ratios and racing:
    own.
    Example: slim = shed.blocks(remove: 2, score: perplexity(calib))
    """

    acts_on = "ssm"
    makes = ("missing blocks",)

    remove: int | Ratio = param(
        "How many blocks to remove, or what share of them or of the whole model.",
        of=("blocks", "params", "flops", "bytes"),
        ge=1,
        unit="blocks",
    )
    on: Selector | None = param("Which mixers may go.", default=None)

    def make_search(self, skeleton: Skeleton) -> GreedySearch:
        parts = MixerParts(
            "blocks", all=len(state_space_branches(skeleton, None)), branches=state_space_branches(skeleton, self.on)
        )
        return self.removal_search(self.remove, "blocks", parts)
