"""Wishes that nothing can fulfil, refused before any weight is read."""

from collections.abc import Iterator
from dataclasses import replace

from ....dsl.checker.contradictions import unreachable_bound
from ....dsl.checker.recipe import Bound, Emit
from ....dsl.checker.value_text import bound_text
from ....dsl.syntax.diagnostics import Diagnostic, Reject
from ...analysis.planning import keys
from ...analysis.planning.cost import Emission
from ...analysis.planning.plan import Plan
from ...core.environment import check_modules
from ...core.quantity import measurement_text
from ..judging.gate import judge_bound
from ..judging.planned_sizes import UNITS, is_missed, original_size, planned_size
from .alternatives import Candidate, allowed_candidates
from .open_steps import shared_rows_faults
from .trials import Trial, Trials, relative_bound_miss
from .wish import Wish

HOPELESS = 0.5  # share of a limit by which the original misses it, so that no candidate is tried


def refuse_impossible(wish: Wish, trials: Trials) -> None:
    """Raise Reject for bounds that are out of reach, or judge by rows that are read before, and for a target whose
    packages are missing."""
    word = wish.session.registry.vocabulary.words("target")[wish.emit.call.word]
    check_modules(word.facts.get("requires", ()), word.facts.get("extra", ""), f"the target `{word.name}`")
    shared = shared_rows_faults(wish, lambda ref: keys.data_identity(ref, wish.context))
    faults = [*shared] or [*_unreachable_bounds(wish, trials)]
    if faults:
        raise Reject(*faults)


def refuse_bounds_far_from_the_original(wish: Wish, unchanged: Trial) -> None:
    """Raise Reject for bounds on quality that the original itself misses by far: healing makes up for what pruning
    lost, and such a bound nearly always lacks `* base`."""
    faults = []
    for bound in wish.bounds:
        _, original = unchanged.values[wish.metric_text_on_choose_rows(bound.metric)]
        if bound.baseline is not None or "data" not in dict(bound.metric.args):
            continue
        unit = wish.context.metric(bound.metric).unit
        if relative_bound_miss(judge_bound(bound, None, original, unit)) > HOPELESS:
            relative = replace(bound, baseline=wish.pipeline.model, span=None)
            faults.append(
                unreachable_bound(
                    f"the original has {measurement_text(original, unit)}, far from `{bound_text(bound)}`",
                    bound.span,
                    help=f"compare with the original: `{bound_text(relative)}`",
                )
            )
    if faults:
        raise Reject(*faults)


def _unreachable_bounds(wish: Wish, trials: Trials) -> Iterator[Diagnostic]:
    """A diagnostic for each bound on a size that the smallest candidate misses by its plan."""
    bounds = [b for b in wish.bounds if b.metric.name in UNITS and b.op in ("<=", "<")]
    smallest: dict[str, tuple[float, Candidate, Plan]] = {}  # by metric
    for candidate in _candidates_of_smallest_shape(wish) if bounds else []:
        if (plan := trials.plan_or_none(candidate)) is None:
            continue
        for metric in {b.metric.name for b in bounds}:
            planned = planned_size(plan, *_target_and_its_emission(wish, plan), metric)
            if metric not in smallest or planned < smallest[metric][0]:
                smallest[metric] = planned, candidate, plan
        if smallest and not any(_is_missed_by(wish, bound, *smallest[bound.metric.name]) for bound in bounds):
            return  # further plans could say nothing else
    for bound in bounds if smallest else []:
        planned, candidate, plan = smallest[bound.metric.name]
        if _is_missed_by(wish, bound, planned, candidate, plan):
            unit = UNITS[bound.metric.name]
            limit = judge_bound(bound, original_size(wish.session, plan, bound), planned, unit).limit
            yield unreachable_bound(
                f"`{bound_text(bound)}` allows {limit}, and the smallest candidate is planned at "
                f"{measurement_text(planned, unit)}",
                bound.span,
                note=f"smallest: {candidate.name}",
                help="allow more, or write the steps yourself",
            )


def _is_missed_by(wish: Wish, bound: Bound, planned_size: float, candidate: Candidate, plan: Plan) -> bool:
    return is_missed(bound, original_size(wish.session, plan, bound), planned_size)


def _target_and_its_emission(wish: Wish, plan: Plan) -> tuple[Emit, Emission]:
    """The target that steps are searched for, and its plan."""
    pairs = zip(plan.pipeline.emits, plan.emissions, strict=True)
    return next(pair for pair in pairs if pair[0].call.word == wish.emit.call.word)


def _candidates_of_smallest_shape(wish: Wish) -> list[Candidate]:
    """Candidates among which the smallest is: those with the strongest change of shape. Healing leaves sizes alone."""
    candidates = allowed_candidates(wish)
    return [c for c in candidates if c.shape.steps == candidates[-1].shape.steps[:1]]
