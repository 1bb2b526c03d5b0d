"""Wishes that nothing can fulfil, refused before any weight is read."""

from collections.abc import Iterator

from ....dsl.checker.recipe import Bound
from ....dsl.checker.values import DataRef, references_in
from ....dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ...analysis.planning import keys
from ...analysis.planning.plan import Size
from ...core.environment import check_modules
from ...core.quantity import size
from ..judging.gate import bound_text, limit_in_unit
from .alternatives import Candidate, candidates_of
from .trials import Trials
from .wish import Wish

ROOM = 0.97  # share of planned bytes that a bound on bytes must leave room for: they are known to 3 %

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
    """Raise Reject for bounds that are out of reach, or judge by rows that are read before, and for a target whose
    packages are missing."""
    word = wish.session.registry.vocabulary.words("target")[wish.emit.call.word]
    check_modules(word.facts.get("requires", ()), word.facts.get("extra", ""), f"the target `{word.name}`")
    faults = [*_shared_rows(wish)] or [*_unreachable_bounds(wish, trials)]
    if faults:
        raise Reject(*faults)


def _shared_rows(wish: Wish) -> Iterator[Diagnostic]:
    ctx = wish.context
    read = {keys.data_identity(ref, ctx): "data" for ref in references_in(wish.emit.call.args, DataRef)}
    read |= {keys.data_identity(ref, ctx): name for name in ("train", "choose", "data") if (ref := getattr(wish, name))}
    for bound in wish.bounds:
        for ref in references_in(dict(bound.metric.args), DataRef):
            name = read.get(keys.data_identity(ref, ctx))
            if name is not None:
                message = f"`{bound_text(bound)}` reads `{ref.name}`, the rows that the search reads by `{name}`"
                yield rows_read_before(message, bound.span, help="judge by other rows")


def _unreachable_bounds(wish: Wish, trials: Trials) -> Iterator[Diagnostic]:
    bounds = [b for b in wish.bounds if b.metric.name == "bytes" and b.op in ("<=", "<")]
    if not bounds:
        return
    limits: list[tuple[Bound, float]] = []
    for bound in bounds:
        factor = Size.of(wish.session.skeleton(wish.recipe.models[bound.baseline])).bytes if bound.baseline else 1
        limits.append((bound, limit_in_unit(bound.limit, "B") * factor))
    lowest = min(limit for _, limit in limits)
    planned: dict[Candidate, int] = {}
    for candidate in _smallest(wish):
        if (plan := trials.plan_or_none(candidate)) is not None:
            planned[candidate] = sum(e.weight_bytes for e in plan.emissions)
            if ROOM * planned[candidate] <= lowest:  # further plans could say nothing else
                return
    if not planned:
        return
    candidate = min(planned, key=lambda c: planned[c])
    for bound, limit in limits:
        if ROOM * planned[candidate] > limit:
            yield unreachable_bound(
                f"`{bound_text(bound)}` allows {size(limit)}, and the smallest candidate is planned at "
                f"{size(planned[candidate])}",
                bound.span,
                note=f"smallest: {candidate.name}",
                help="allow more bytes, or write the steps yourself",
            )


def _smallest(wish: Wish) -> list[Candidate]:
    """Candidates among which the smallest is: those with the strongest change of shape, healed or not."""
    candidates = candidates_of(wish)
    return [c for c in candidates if c.shape.steps[:1] == candidates[-1].shape.steps[:1]]
