"""Summary of a search of steps: every candidate with its measures, why it was left, and what the next step costs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ....dsl.checker.values import DataRef
from ...core.quantity import change_text, count_text, measurement_text
from .alternatives import Candidate
from .search import Search
from .trials import Trial
from .tune import Tuned, missed_bounds_text

BETTER = 0.05  # share by which a neighbour must be better for a sentence


@dataclass(frozen=True)
class Row:
    """A candidate that was measured. `cells` has a text for each metric, `state` why it was chosen or left, `trial` the
    measurement."""

    name: str
    cells: tuple[str, ...]
    state: str
    trial: Trial
    ratios: tuple[float, ...] = ()


def metric_names(search: Search) -> tuple[str, ...]:
    """Metrics of a table, on the rows that they were measured on, the objectives first."""
    return (*search.objectives, *(name for name in search.trials.metrics if name not in search.objectives))


def reason_of_unmeasured(search: Search) -> str:
    """Why the candidates that were not measured were not."""
    if search.is_named:
        return "this one was asked for by its name"
    if search.out_of_time:
        return "time ran out before the others were judged, and the same command with more time goes on"
    rejected = count_text(search.refused_count, "candidate")
    sentence = "the others were predicted to be no better"
    return f"{rejected} refused by the target or a pass; {sentence}" if search.refused_count else sentence


def measured_twice_text(tuned: Tuned) -> str:
    """Sentence on why the table of candidates has other figures of what was compiled; "" where nothing was."""
    sentence = "Figures of the search, on its rows and in its races; the compiled artifact was measured again."
    return sentence if tuned.compiled else ""


def table_rows(tuned: Tuned) -> list[Row]:
    """Candidates, best first; those that were refused come last."""
    search = tuned.search
    trials = {**search.quick_trials, **search.finals}
    ranked = [
        *search.rank_measured_feasible_first(search.finals),
        *(c for c in search.rank_measured_feasible_first(search.quick_trials) if c not in search.finals),
    ]
    rejected = [Row(c.name, (), f"refused: {t.refused}", t) for c, t in trials.items() if t.refused]
    return [_row(tuned, c, trials[c]) for c in ranked if c in trials and not trials[c].refused] + rejected


def _row(tuned: Tuned, candidate: Candidate, trial: Trial) -> Row:
    search, names = tuned.search, metric_names(tuned.search)
    units = [search.wish.context.metric(search.trials.metrics[name]).unit for name in names]
    cells = tuple(
        _value_and_change_text(*trial.values[name], unit, trial.rows) for name, unit in zip(names, units, strict=True)
    )
    return Row(
        candidate.name,
        cells,
        _candidate_state_text(tuned, candidate, trial),
        trial,
        tuple(trial.ratio_to_original(n) for n in names),
    )


def _value_and_change_text(value: float, original: float, unit: str, num_quick_rows: int) -> str:
    """Value and change; of a first look the change alone, as its rows are fewer than those of others."""
    change = change_text(original, value) if original else ""
    if num_quick_rows and change:
        return change
    return measurement_text(value, unit) + (f" ({change})" if change else "")


def _candidate_state_text(tuned: Tuned, candidate: Candidate, trial: Trial) -> str:
    compiled = tuned.compiled.get(candidate)
    if compiled:
        return f"compiled: {compiled.missed}" if compiled.missed else "chosen"
    missed = missed_bounds_text(tuned.search.wish, trial)
    if missed:
        return f"misses {missed}"
    if tuned.search.lacks_final_trial(candidate):
        return "time ran out before it was measured on all rows"
    if tuned.search.is_front:
        return "not on the front"
    return "" if tuned.search.is_named else f"no better at {tuned.search.objectives[0]}"


def trade_off_sentences(tuned: Tuned) -> Iterator[str]:
    """Sentences on what more of the objective, and of the first bound's quality, would cost; of a front none."""
    search, candidate = tuned.search, next(iter(tuned.chosen), None)
    quality = next((n for n, ref in search.trials.metrics.items() if _has_data_argument(ref)), None)
    trials = {c: t for c, t in {**search.quick_trials, **search.finals}.items() if not t.refused}
    if candidate not in trials or quality is None or search.is_front:
        return
    chosen, (objective,) = trials[candidate], search.objectives
    for gain, price in ((objective, quality), (quality, objective)):
        better = {c: t for c, t in trials.items() if _signed_relative_change(search, t, chosen, gain) < -BETTER}
        cheapest = min(better, key=lambda c: _signed_relative_change(search, better[c], chosen, price), default=None)
        if cheapest is not None:
            won = change_text(chosen.ratio_to_original(gain), better[cheapest].ratio_to_original(gain))
            cost = change_text(chosen.ratio_to_original(price), better[cheapest].ratio_to_original(price))
            yield f"{gain} {won} costs {price} {cost}: {cheapest.name}"


def indistinguishable_finalists_text(tuned: Tuned) -> str:
    """Sentence on finalists that timing can't tell from the chosen one; "" where there is none, and of a front."""
    search, name = tuned.search, tuned.search.objectives[0]
    chosen = next((search.finals.get(c) for c in tuned.chosen), None)
    if chosen is None or name not in chosen.ranges or search.is_front:
        return ""
    low, high = chosen.ranges[name]
    tied = [
        c.name
        for c, trial in search.finals.items()
        if trial is not chosen and name in trial.ranges and not search.worst_bound_violation(trial)
        if trial.ranges[name][0] <= high and trial.ranges[name][1] >= low
    ]
    if not tied:
        return ""
    interval = f"{low:.3g} to {high:.3g} of the original"
    return f"{name} can't be told from that of {', '.join(f'`{rival}`' for rival in tied)} on this machine ({interval})"


def _has_data_argument(ref: Any) -> bool:
    return any(isinstance(value, DataRef) for _, value in ref.args)


def _signed_relative_change(search: Search, trial: Trial, reference: Trial, metric: str) -> float:
    """Relative change against another trial, so that less is better."""
    sign = 1.0 if search.wish.context.metric(search.trials.metrics[metric]).better == "lower" else -1.0
    before = reference.ratio_to_original(metric)
    return sign * (trial.ratio_to_original(metric) - before) / max(abs(before), 1e-12)


def to_json(tuned: Tuned) -> dict[str, Any]:
    """Summary as `effc tune --format json` prints it.

    A candidate has for each metric its `values`, [candidate, original], and `ratios`, on `rows` rows or on all (0).
    """
    points = [{"name": c.name, "recipe": str(compiled.recipe)} for c, compiled in tuned.chosen.items()]
    return {
        "recipe": points[0]["recipe"] if points else None,
        "chosen": points[0]["name"] if points else None,
        "front": points if tuned.search.is_front else [],
        "seconds": round(tuned.search.seconds, 1),
        "candidates": [_row_json(row, metric_names(tuned.search)) for row in table_rows(tuned)],
        "out_of_time": tuned.search.out_of_time,
        "not_measured": len(tuned.search.candidates) - tuned.search.measured_count,
        "neighbours": list(trade_off_sentences(tuned)),
        "tied": indistinguishable_finalists_text(tuned),
    }


def _row_json(row: Row, names: Sequence[str]) -> dict[str, Any]:
    measured = [name for name in names if name in row.trial.values]
    return {
        "name": row.name,
        "state": row.state,
        "rows": row.trial.rows,
        "values": {name: list(row.trial.values[name]) for name in measured},
        "ratios": {name: row.trial.ratio_to_original(name) for name in measured},
    }
