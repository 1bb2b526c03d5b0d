"""Gather results of several steps as a front: models with their measures, to pick from later."""

from typing import Literal

from ...compiler.analysis.planning.cost import ROUNDS
from ...compiler.evaluation.timing import measure_interleaved
from ...compiler.ir.outcome import Front as Points
from ...compiler.ir.outcome import Outcome, Point
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Lossy, Pass, param
from ...compiler.transforms.supernet.explorer import beats
from ...dsl.checker.value_text import value_text
from ...dsl.checker.values import MetricRef, StepRef
from ...dsl.syntax.diagnostics import Fault

too_few_points = Fault("too-few-points", "A front is asked for of fewer than two different models.")


class Front(Pass):
    """Gather results of several steps as a front: models with their measures, to pick from later.

    Each point is the result of an earlier step, measured as `measure` says. With `keep: best` a point goes that
    another one equals or beats in every measure. The target `front` writes them all into one artifact, from which
    `effc pick` takes a model that fits: the best at the first measure among those that keep the bounds.

    Times are taken in turns with the original and told over one time of it, so that points compare.

    A bound of `expect` is asked of every point; `in NAME` asks it of one, `in any` of any.

    Source: own.
    Example: sizes = search.front(points: [slim, lean], measure: [perplexity(calib), params])
    """

    keeps = Lossy()
    determinism = "deterministic"
    results = ("front",)

    points: list[StepRef] = param("Steps whose results are the points.", least=2, distinct=True)
    measure: list[MetricRef] = param("What is measured of each, the most telling first.", least=1, distinct=True)
    keep: Literal["all", "best"] = param(
        "Every point, or those that no other one beats in all measures.", default="all"
    )

    def result_of(self, outcome: Outcome, ctx: Context) -> Points:
        names = [ref.name for ref in self.points]
        if len(set(names)) < max(2, len(names)):
            raise too_few_points(
                "a front has at least two points, each of another step",
                help="name two or more steps: points: [slim, lean]",
            ).rejection()
        if not self.measure:
            raise too_few_points(
                "a front without a measure has nothing to choose by", help="write `measure: [params]`"
            ).rejection()
        originals: dict[str, float] = {}
        points = [self._measure_point(ref, ctx, originals) for ref in ctx.each(self.points, "points", len(self.points))]
        best = (
            [
                p
                for p in points
                if not any(beats(less_is_better_values(other), less_is_better_values(p)) for other in points)
            ]
            if self.keep == "best"
            else points
        )
        return Points(tuple(best), ctx.results)

    def _measure_point(self, step_ref: StepRef, ctx: Context, original_time_by_measure: dict[str, float]) -> Point:
        """`original_time_by_measure` are times of the original beside the first point, by measure."""
        key, program = ctx.result(step_ref)
        words = [ctx.metric(metric) for metric in self.measure]
        original = ctx.origin.load().eval() if any(word.timed for word in words) else None
        values = []
        for metric, word in zip(self.measure, words, strict=True):
            if not word.timed:
                values.append(float(word.measure(program.model, ctx)))
                continue
            assert original is not None, "a timed metric was not seen"
            times = measure_interleaved(
                {"original": original, "point": program.model}, word, ROUNDS, calls_per_round=ROUNDS
            )
            values.append(
                original_time_by_measure.setdefault(value_text(metric), times.values["original"]) * times.ratio
            )
        return Point(
            step_ref.name,
            key,
            {
                value_text(metric): (value, word.unit, word.better)
                for metric, word, value in zip(self.measure, words, values, strict=True)
            },
        )


def less_is_better_values(point: Point) -> tuple[float, ...]:
    """Its measures, so that less is better."""
    return tuple(value if better == "lower" else -value for value, _, better in point.measures.values())
