"""The bounds of one pipeline, each judged once on what it speaks of.

A bound without `in` speaks of the result: it is judged on the first artifact that holds it, or on the program itself
where no target writes a model. A target that rounds computes something else, so there it is judged again; so it is
on an artifact that is of another size, whatever it computes. What a clock said of one artifact is said of no other.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ....dsl.checker.recipe import Bound, Emit
from ....dsl.checker.value_text import value_text
from ....dsl.checker.values import MetricRef
from ...artifacts.load import target_facts
from ...artifacts.manifest import Measure
from ...core.cache import Cache
from ...plugin.context import Context
from .comparison import Comparison, measure_beside_original
from .front_times import rebase_on_median_original
from .gate import BoundVerdict, judge_bound, metric_label

if TYPE_CHECKING:
    from ...analysis.planning.plan import Plan


@dataclass
class Verdicts:
    """Verdicts so far, by the result that they were judged on."""

    plan: "Plan"
    cache: Cache
    ctx: Context
    on_original: Callable[[Any], None] = lambda original: None
    totals: dict[str, Comparison] = field(default_factory=dict)

    def judge_model(
        self, target: Emit, load_model: Callable[[], Any], is_rounded: bool
    ) -> tuple[Comparison, tuple[BoundVerdict, ...]]:
        """All that is to be said of an artifact, and the verdicts among it that are new.

        load_model        makes what is measured: the artifact reopened, or the program in memory
        is_rounded   the artifact's numbers are not the result's
        """
        known = None if is_rounded else self.totals.get(target.source)
        word, later = target.call.word, target_facts(target.call.word).get("later", "")
        wait = tuple(
            BoundVerdict(b, None, skipped=later) for b in self.plan.pipeline.expects if later and b.part == word
        )
        bounds = [
            b for b in self.plan.pipeline.expects if (b.part == word and not later) or (not b.part and known is None)
        ]
        compared = measure_beside_original(
            load_model(), self._plan_with_bounds(bounds), self.cache, self.ctx, self.on_original
        )
        if known is None:
            if not is_rounded:
                self.totals[target.source] = compared
            return replace(compared, outcomes=(*compared.outcomes, *wait)), (*compared.outcomes, *wait)
        clocked = {
            name
            for b in self.plan.pipeline.expects
            if self.ctx.metric(b.metric).timed
            for name in _label_and_word_of_metric(b)
        }
        measured_metrics = {m.metric for m in compared.measures} | set(known.ratios) | clocked
        measures = (*compared.measures, *(m for m in known.measures if m.metric not in measured_metrics))
        reused = [v for v in known.outcomes if metric_label(v.bound) not in clocked]
        rejudged = [_rejudge_by_artifact_measures(v, compared.measures, str(target.call.args["path"])) for v in reused]
        new = (*(v for v, old in zip(rejudged, reused, strict=True) if v is not old), *compared.outcomes, *wait)
        return replace(compared, outcomes=(*rejudged, *compared.outcomes, *wait), measures=measures), new

    def judge_front(self, named_models: Iterator[tuple[str, Any]]) -> tuple[Comparison, tuple[BoundVerdict, ...]]:
        """Judge every point by the bounds that speak of it: one verdict a bound, on the point that decides it."""
        judged = rebase_on_median_original([(name, self._compare_point(name, model)) for name, model in named_models])
        point_verdicts = [replace(v, where=name) for name, compared in judged for v in compared.outcomes]
        verdicts = [
            decisive_verdict([v for v in point_verdicts if v.bound == b])
            for b in dict.fromkeys(v.bound for v in point_verdicts)
        ]
        measures = tuple(
            replace(m, metric=f"{m.metric} of {name}") for name, compared in judged for m in compared.measures
        )
        seconds = sum(compared.run["seconds"]["measure"] for _, compared in judged)
        timings = {
            f"{metric} of {name}": t for name, compared in judged for metric, t in compared.run["timings"].items()
        }
        run = {**judged[-1][1].run, "seconds": {"measure": round(seconds, 2)}, "timings": timings}
        ratios = {f"{metric} of {name}": r for name, compared in judged for metric, r in compared.ratios.items()}
        return Comparison(tuple(verdicts), measures, run, ratios), tuple(verdicts)

    def _compare_point(self, name: str, model: Any) -> Comparison:
        bounds = [b for b in self.plan.pipeline.expects if b.part in ("", "all", "any", name)]
        return measure_beside_original(
            model,
            self._plan_with_bounds(bounds),
            self.cache,
            self.ctx,
            self.on_original,
            self._metrics_without_bounds(),
        )

    def _metrics_without_bounds(self) -> list[MetricRef]:
        """Metrics of the front, equal for every point."""
        lists = [step.call.args.get("measure", ()) for step in self.plan.pipeline.steps]
        return [m for refs in lists for m in refs if isinstance(m, MetricRef)]

    def _plan_with_bounds(self, bounds: list[Bound]) -> "Plan":
        return replace(self.plan, pipeline=replace(self.plan.pipeline, expects=tuple(bounds)))


def _label_and_word_of_metric(bound: Bound) -> tuple[str, str]:
    """Names of a bound's metric in tables."""
    return metric_label(bound), value_text(bound.metric)


def _rejudge_by_artifact_measures(
    verdict: BoundVerdict, measures: Sequence[Measure], artifact_name: str
) -> BoundVerdict:
    """The same, unless the artifact itself measures something else."""
    value = next((m.compiled for m in measures if m.metric in _label_and_word_of_metric(verdict.bound)), verdict.value)
    if value == verdict.value or verdict.skipped or value is None:
        return verdict
    return replace(judge_bound(verdict.bound, verdict.original, value, verdict.unit), where=artifact_name)


def decisive_verdict(verdicts: list[BoundVerdict]) -> BoundVerdict:
    """Of a bound's verdicts on several points the one that counts: any that holds will do, or all have to."""
    any_suffices = verdicts[0].bound.part == "any"
    return next((v for v in verdicts if v.passed == any_suffices), verdicts[0])
