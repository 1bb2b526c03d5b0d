"""Wishes that nothing can fulfil, refused before any weight is read."""

import math
from collections.abc import Iterator
from itertools import combinations

from ....dsl.checker.recipe import Bound
from ....dsl.checker.values import DataRef, Range, references_in
from ....dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ...analysis.planning import keys
from ...analysis.planning.plan import Size
from ...core.quantity import size
from ..judging.gate import bound_text, limit_in_unit
from .alternatives import Candidate, candidates_of
from .trials import Trials
from .wish import Wish

ROOM = 0.97  # share of planned bytes that a bound on bytes must leave room for: they are known to 3 %

contradicting_bounds = Fault("contradicting-bounds", "Two bounds on one metric leave no value that keeps both.")
unreachable_bound = Fault(
    "unreachable-bound", "A bound on bytes is below the smallest candidate of a search of steps, by its plan."
)
rows_read_before = Fault(
    "rows-read-before",
    "A bound reads rows that the search of steps reads, too.\n\n"
    "What was chosen by rows looks better on them than on others: `data`, `choose` and the rows of bounds are three "
    "data sets.",
)


def refuse_impossible(wish: Wish, trials: Trials) -> None:
    """Raise Reject for bounds that contradict each other, are out of reach, or judge by rows that are read before."""
    faults = [*_contradictions(wish), *_shared_rows(wish)] or [*_hub_unreachable_diagnostic(wish, trials)]
    if faults:
        raise Reject(*faults)


def _contradictions(wish: Wish) -> Iterator[Diagnostic]:
    for first, second in combinations(wish.bounds, 2):
        if (first.metric, first.baseline) != (second.metric, second.baseline):
            continue
        unit = wish.context.metric(first.metric).unit
        (low, high), (other_low, other_high) = _interval(first, unit), _interval(second, unit)
        if max(low, other_low) > min(high, other_high):
            related = ((first.span, "the other bound"),) if first.span else ()
            yield contradicting_bounds(
                f"`{bound_text(second)}` and `{bound_text(first)}` can't both hold",
                second.span,
                related=related,
                help="drop one of them",
            )


def _interval(bound: Bound, unit: str) -> tuple[float, float]:
    """Values that keep a bound, in the metric's unit or as factors of the baseline."""
    if isinstance(bound.limit, Range):
        return limit_in_unit(bound.limit.low, unit), limit_in_unit(bound.limit.high, unit)
    limit = limit_in_unit(bound.limit, unit)
    low = limit if bound.op in (">=", ">", "==") else -math.inf
    return low, limit if bound.op in ("<=", "<", "==") else math.inf


def _shared_rows(wish: Wish) -> Iterator[Diagnostic]:
    ctx = wish.context
    read = {keys.data_identity(ref, ctx): ref.name for ref in (wish.data, wish.choose)}
    for bound in wish.bounds:
        for ref in references_in(dict(bound.metric.args), DataRef):
            name = read.get(keys.data_identity(ref, ctx))
            if name is not None:
                message = f"`{bound_text(bound)}` reads `{ref.name}`, whose rows the search reads as `{name}`"
                yield rows_read_before(message, bound.span, help="judge by other rows")


def _hub_unreachable_diagnostic(wish: Wish, trials: Trials) -> Iterator[Diagnostic]:
    bounds = [b for b in wish.bounds if b.metric.name == "bytes" and b.op in ("<=", "<")]
    if not bounds:
        return
    plans = {c: plan for c in _smallest(wish) if (plan := trials.plan_or_none(c)) is not None}
    planned = {c: sum(e.weight_bytes for e in plan.emissions) for c, plan in plans.items()}
    if not planned:
        return
    candidate = min(planned, key=lambda c: planned[c])
    for bound in bounds:
        factor = Size.of(wish.session.skeleton(wish.recipe.models[bound.baseline])).bytes if bound.baseline else 1
        limit = limit_in_unit(bound.limit, "B") * factor
        if ROOM * planned[candidate] > limit:
            yield unreachable_bound(
                f"`{bound_text(bound)}` allows {size(limit)}, and the smallest candidate is planned at "
                f"{size(planned[candidate])}",
                bound.span,
                note=f"smallest: {candidate.name}",
                help="allow more bytes, or write the steps yourself",
            )


def _smallest(wish: Wish) -> list[Candidate]:
    """Candidates among which the smallest is: those with the strongest change of shape."""
    candidates = candidates_of(wish)
    return [c for c in candidates if c.shape == candidates[-1].shape]
