"""Take one choice of ranks out of a family of adapters."""

from typing import Literal

from ...compiler.families.family import Family
from ...compiler.ir.outcome import Model, Outcome
from ...compiler.words.context import Context
from ...compiler.words.kinds import Lossy, Pass, param
from ...dsl.diagnostics import Fault, Reject

masked_apart = Fault(
    "masked-apart",
    "Adapters that give nothing where a weight is zero are asked for apart from the weights.\n\n"
    "peft's own adapters know no masks, so beside the weights they would compute something else than was trained.",
)


class Pick(Pass):
    """Take one choice of ranks out of a family of adapters.

    `middle` is the heuristic of Shears: every site takes the median of its ranks. The adapters of the choice are cut
    out of the family's and merged into the weights; zeros of sparse weights stay zero where the family was trained
    so. `merge: false` gives them apart instead, for the target `peft`.

    Source: Shears (Munoz et al. 2024, arXiv 2404.10934), section 3.3.
    Example: fit = supernet.pick(ranks: middle)
    """

    keeps = Lossy()
    determinism = "deterministic"
    takes = ("family",)
    gives = {"": "model", "merge: false": "adapters"}

    ranks: Literal["largest", "middle", "smallest"] = param("The rank that every site takes.", default="middle")
    merge: bool = param("Add the adapters to the weights; false gives them apart, for the target `peft`.", default=True)

    def give(self, outcome: Outcome, ctx: Context) -> Outcome:
        assert isinstance(outcome, Family), f"picked from {outcome.kind}"
        choice = outcome.space.choice(self.ranks)
        if not self.merge:
            if outcome.masked and outcome.acts_on_zeros:
                raise Reject(
                    masked_apart(
                        "the family gives nothing where weights are zero, which peft can't say",
                        help="leave `merge: false` out, or train it with `zeros: fill`",
                    )
                )
            return outcome.unmerged(choice)
        return Model(outcome.cut(choice))
