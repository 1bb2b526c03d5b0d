"""Bounds on sizes that a plan decides before anything runs."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ....dsl.checker.contradictions import unreachable_bound
from ....dsl.checker.recipe import Bound, Emit
from ....dsl.checker.value_text import bound_text
from ....dsl.syntax.diagnostics import Diagnostic, Reject
from ...analysis.planning.cost import Emission
from ...analysis.planning.plan import Plan, Size
from ...artifacts.load import target_facts
from ...core.quantity import measurement_text
from .gate import is_decided, judge_bound

if TYPE_CHECKING:
    from ..api import Session

TOLERANCE = 0.97  # share of a planned size that an artifact may have: they are known to 3 %
UNITS = {"bytes": "B", "params": "params"}  # metrics that plans know


def refuse_unreachable_bounds(session: "Session", plans: list[Plan]) -> None:
    """Raise Reject for bounds that no planned artifact can keep."""
    if diagnostics := [d for plan in plans for d in unreachable_bounds(session, plan)]:
        raise Reject(*diagnostics)


def unreachable_bounds(session: "Session", plan: Plan) -> Iterator[Diagnostic]:
    """A diagnostic for each bound on a size that an artifact misses by its plan."""
    for bound in (b for b in plan.pipeline.expects if b.metric.name in UNITS):
        original = original_size(session, plan, bound)
        for emit, emission in zip(plan.pipeline.emits, plan.emissions, strict=True):
            if not _bound_applies_to_target(bound, emit) or not _emits_a_model(session, plan, emit):
                continue
            planned, unit = planned_size(plan, emit, emission, bound.metric.name), UNITS[bound.metric.name]
            if is_missed(bound, original, planned, is_upper_bound=_size_qualifier(plan, emit) == "at most"):
                limit = judge_bound(bound, original, planned, unit).limit
                yield unreachable_bound(
                    f"`{bound_text(bound)}` asks for {limit}, and `{emit.call.word}` is planned at "
                    f"{measurement_text(planned, unit)}",
                    bound.span,
                    help="ask more of the steps, or loosen the bound",
                )
                break


def original_size(session: "Session", plan: Plan, bound: Bound) -> float | None:
    """Size of a bound's baseline by its shapes; None where the bound names none."""
    if bound.baseline is None:
        return None
    size = Size.of(session.skeleton(plan.recipe.models[bound.baseline]))
    return size.bytes if bound.metric.name == "bytes" else size.params


def planned_size(plan: Plan, emit: Emit, emission: Emission, metric: str) -> float:
    """Bytes as a target stores them, or parameters of the result that it holds."""
    if metric == "bytes":
        return emission.weight_bytes
    return next((s.after.params for s in plan.stages if s.name == emit.source), Size.of(plan.skeleton).params)


def is_missed(bound: Bound, original: float | None, planned_value: float, is_upper_bound: bool = False) -> bool:
    """Whether all sizes that an artifact of a planned one may come to miss a bound."""
    unit, interval = (
        UNITS[bound.metric.name],
        (0.0 if is_upper_bound else TOLERANCE * planned_value, planned_value / TOLERANCE),
    )
    return is_decided(bound, original, interval, unit) and not judge_bound(bound, original, planned_value, unit).passed


def _bound_applies_to_target(bound: Bound, emit: Emit) -> bool:
    return bound.part in ("", emit.call.word) and not target_facts(emit.call.word).get("later", "")


def _emits_a_model(session: "Session", plan: Plan, emit: Emit) -> bool:
    """Whether a target holds one model: sizes of fronts and adapters are known once they are there."""
    if session.registry.describes_artifacts(emit.call.word):
        return False
    call = next((stage.call for stage in plan.stages if stage.name == emit.source), None)
    return call is None or session.registry.make("pass", call).result_kind() == "model"


def _size_qualifier(plan: Plan, emit: Emit) -> str:
    return next((stage.hedges[1] for stage in plan.stages if stage.name == emit.source), "")
