"""Leave the steps open: `effc tune` searches them."""

from collections.abc import Iterator

from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Lossy, Pass, param
from ...dsl.checker.rules import Conflict, Problem
from ...dsl.checker.skeleton import Skeleton
from ...dsl.checker.values import DataRef, Duration, MetricRef
from ...dsl.syntax.diagnostics import Fault

open_steps = Fault(
    "open-steps",
    "A recipe was planned or compiled whose steps are still open.\n\n"
    "`search.steps` says what the steps are to be good for, not which they are. `effc tune RECIPE` searches them, and "
    "writes an ordinary recipe with steps in its place.",
)


class Steps(Pass):
    """Leave the steps open: `effc tune` searches those that keep all bounds and are best at one metric.

    The bounds are those of `expect`, the target is the one of `emit`, whose arguments are open, too, as far as they
    are not written. Candidates are sequences of other passes and arguments of the target. They are measured on rows
    of `choose`; rows that bounds name are read by the last candidates alone, so that a search does not flatter
    itself. What comes out is a recipe with ordinary steps, which compiles to the same artifact by itself. With
    `against`, several come out: candidates of which none is better than another at both metrics.

    Source: own. Effects of single changes are added up to foretell combinations, as in the additive models of Puzzle
    (Bercovich et al. 2024, arXiv 2411.19146), and the best foretold are measured first.
    Example: best = search.steps(optimize: decode.p50, data: calib, choose: dev, within: 30min)
    """

    keeps = Lossy()
    determinism = "nondeterministic"
    disjoint = {"choose": "data", "train": "choose"}

    optimize: MetricRef = param("Metric to be best at, such as decode.p50 or bytes.")
    against: MetricRef | None = param(
        "Second metric: up to five candidates between both are compiled, the front, in place of the best one.",
        default=None,
    )
    data: DataRef = param("Rows that the passes read.")
    choose: DataRef = param("Other rows, that candidates are measured on.")
    train: DataRef | None = param("Rows to heal pruned candidates on; without them nothing is trained.", default=None)
    within: Duration = param("Time for the search; the best candidate is compiled after it.", gt=0)
    among: list[str] = param(
        'Patterns of the passes and formats to choose from, such as "sparsify.*" or "int4"; all where it is empty.',
        default=(),
        distinct=True,
        least=1,
    )

    def problems(self) -> Iterator[Problem]:
        if self.against == self.optimize:
            yield Conflict(("against",), "both metrics are the same", "leave `against` out, or name another metric")

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        raise open_steps(
            "the steps of this pipeline are open", help="search them by `effc tune`, and compile its recipe"
        ).rejection()

    def reads_clock(self) -> bool:
        return True

    def run(self, program, ctx: Context) -> None:
        raise AssertionError("a plan with open steps is refused")
