"""Preview of a search of steps: what it would try first, by plans alone."""

import math

from ....dsl.syntax.diagnostics import Reject
from ...core.quantity import duration_text, size
from .alternatives import Candidate, candidates_of
from .feasibility import refuse_impossible
from .search import disk_bytes
from .trials import Trials
from .wish import Wish

Row = tuple[str, str, str, str]


def preview(wish: Wish) -> list[Row]:
    """Name, steps and arguments, planned time and bytes on disk of single changes, the quickest first; then a row
    for combinations."""
    from ...core.cache import Cache

    folder = wish.session.settings.cache_dir
    trials, rows = Trials(wish, Cache(folder), folder), []
    refuse_impossible(wish, trials)
    candidates = candidates_of(wish)
    for candidate in (c for c in candidates if c.changes <= 1):
        name, text = candidate.name, _text(wish, candidate)
        try:
            plan = trials.plan(candidate)
        except Reject as rejection:
            rows.append((math.inf, (name, text, "refused", rejection.diagnostics[0].message)))
            continue
        rows.append((plan.seconds, (name, text, duration_text(plan.seconds), size(disk_bytes(plan)))))
    combined = sum(c.changes > 1 for c in candidates)
    return [row for _, row in sorted(rows, key=lambda r: r[0])] + [
        ("combinations", f"the best predicted of {combined}", "the rest", "")
    ]


def _text(wish: Wish, candidate: Candidate) -> str:
    passes = [step.partition(" = ")[2].partition("(")[0] for step in candidate.steps(wish.data.name)]
    return ", ".join([*passes, *([candidate.numbers.arguments] if candidate.numbers.arguments else [])])
