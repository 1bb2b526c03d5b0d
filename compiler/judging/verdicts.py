"""The bounds of one pipeline, each judged once on what it speaks of.

A bound without `in` speaks of the result: it is judged on the first artifact that holds it, or on the program itself
where no target writes a model. A target that rounds computes something else, so there it is judged again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ...dsl.recipe import Bound, Emit
from ...dsl.values import MetricRef
from ..store.cache import Cache
from ..words.context import Context
from .comparison import Comparison, compare
from .gate import Outcome as Verdict

if TYPE_CHECKING:
    from ..planning.plan import Plan


@dataclass
class Verdicts:
    """What was judged so far, by the result that it was judged on."""

    plan: "Plan"
    cache: Cache
    ctx: Context
    look: Callable[[Any], None] = lambda original: None
    whole: dict[str, Comparison] = field(default_factory=dict)

    def on_model(self, target: Emit, model: Callable[[], Any], rounds: bool) -> tuple[Comparison, tuple[Verdict, ...]]:
        """All that is to be said of an artifact, and the verdicts among it that are new.

        model    makes what is measured: the artifact reopened, or the program in memory
        rounds   the artifact's numbers are not the result's
        """
        known = None if rounds else self.whole.get(target.source)
        own = [b for b in self.plan.pipeline.expects if b.part == target.call.word or (not b.part and known is None)]
        made = compare(model(), self._with(own), self.cache, self.ctx, self.look)
        if known is None:
            if not rounds:
                self.whole[target.source] = made
            return made, made.outcomes
        said = {m.metric for m in made.measures}
        measures = (*made.measures, *(m for m in known.measures if m.metric not in said))
        return replace(made, outcomes=(*known.outcomes, *made.outcomes), measures=measures), made.outcomes

    def on_front(self, models: Iterator[tuple[str, Any]]) -> tuple[Comparison, tuple[Verdict, ...]]:
        """Every point against the bounds that speak of it: one verdict a bound, on the point that decides it."""
        judged = [(name, self._point(name, model)) for name, model in models]
        said = [replace(v, where=name) for name, made in judged for v in made.outcomes]
        verdicts = [decisive([v for v in said if v.bound == b]) for b in dict.fromkeys(v.bound for v in said)]
        measures = tuple(replace(m, metric=f"{m.metric} of {name}") for name, made in judged for m in made.measures)
        seconds = sum(made.run["seconds"]["measure"] for _, made in judged)
        timings = {f"{metric} of {name}": t for name, made in judged for metric, t in made.run["timings"].items()}
        run = {**judged[-1][1].run, "seconds": {"measure": round(seconds, 2)}, "timings": timings}
        ratios = {f"{metric} of {name}": r for name, made in judged for metric, r in made.ratios.items()}
        return Comparison(tuple(verdicts), measures, run, ratios), tuple(verdicts)

    def _point(self, name: str, model: Any) -> Comparison:
        own = [b for b in self.plan.pipeline.expects if b.part in ("", "all", "any", name)]
        return compare(model, self._with(own), self.cache, self.ctx, self.look, self._scores())

    def _scores(self) -> list[MetricRef]:
        """What the front is measured by, so that every point says the same of itself; times are taken in turns."""
        lists = [step.call.args.get("measure", ()) for step in self.plan.pipeline.steps]
        return [m for refs in lists for m in refs if isinstance(m, MetricRef) and not self.ctx.metric(m).timed]

    def _with(self, bounds: list[Bound]) -> "Plan":
        return replace(self.plan, pipeline=replace(self.plan.pipeline, expects=tuple(bounds)))


def decisive(verdicts: list[Verdict]) -> Verdict:
    """Of a bound's verdicts on several points the one that counts: any that holds will do, or all have to."""
    wanted = verdicts[0].bound.part == "any"
    return next((v for v in verdicts if v.holds == wanted), verdicts[0])
