"""Take one choice out of a family."""

from typing import Literal

from ...compiler.ir.outcome import Model, Outcome
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Lossy, Pass, param
from ...compiler.transforms.supernet.family import Family
from ...dsl.syntax.diagnostics import Fault

masked_apart = Fault(
    "masked-apart",
    "Adapters that give nothing where a weight is zero are asked for apart from the weights.\n\n"
    "peft's own adapters know no masks, so beside the weights they would compute something else than was trained.",
)
rounded_apart = Fault(
    "rounded-apart",
    "Adapters that are rounded together with the weights are asked for apart from them.\n\n"
    "Beside weights on a grid, or before they are on one, they would compute something else than was trained.",
)
smaller_apart = Fault(
    "smaller-apart",
    "Adapters are asked for apart from a family in which more than their ranks may be chosen.\n\n"
    "A choice has its own widths and layers; beside the whole model its adapters would compute something else.",
)


class Pick(Pass):
    """Take one choice out of a family.

    `middle` is the heuristic of Shears: every dimension takes the median of its values. Of widths and depth the model
    is cut to what was chosen. The adapters of the choice are cut out of the family's and merged into the weights;
    zeros of sparse weights stay zero where the family was trained so. `merge: false` gives them apart instead,
    for the target `peft`.

    Source: Shears (Munoz et al. 2024, arXiv 2404.10934), section 3.3.
    Example: fit = supernet.pick(ranks: middle)
    """

    keeps = Lossy()
    changes = ("weights", "branches")
    determinism = "deterministic"
    accepts = ("family",)
    foreseeable = False  # widths of a choice are the family's to know: the whole model is the most that is left
    results = ("model", "adapters")

    ranks: Literal["largest", "middle", "smallest"] = param("The value that every dimension takes.", default="middle")
    merge: bool = param("Add the adapters to the weights; false gives them apart, for the target `peft`.", default=True)

    def result_kind(self) -> str:
        return "model" if self.merge else "adapters"

    def result_of(self, outcome: Outcome, ctx: Context) -> Outcome:
        assert isinstance(outcome, Family), f"picked from {outcome.kind}"
        choice = outcome.space.choice(self.ranks)
        if not self.merge:
            if outcome.has_dims_besides_ranks or outcome.shape is None:
                raise smaller_apart(
                    "the family's choices are smaller models, and no adapters alone say which",
                    help="leave `merge: false` out, or train it with `supernet.lora`",
                    argument="merge",
                ).rejection()
            if outcome.grid is not None:
                raise rounded_apart(
                    "the family was trained through a grid, and beside the weights peft rounds nothing",
                    help="leave `merge: false` out, or train it without `bits`",
                    argument="merge",
                ).rejection()
            if outcome.masked and outcome.acts_on_zeros:
                raise masked_apart(
                    "the family gives nothing where weights are zero, which peft can't say",
                    help="leave `merge: false` out, or train it with `zeros: fill`",
                    argument="merge",
                ).rejection()
            return outcome.unmerged_adapters_of(choice)
        return Model(outcome.cut_program_to_choice(choice))
