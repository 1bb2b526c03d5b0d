"""Preview of a search of steps: what it would try first, by plans alone."""

from dataclasses import dataclass

from ....dsl.syntax.diagnostics import Reject
from ...core.cache import Cache
from .alternatives import Candidate, allowed_candidates, candidate_named
from .feasibility import refuse_impossible
from .search import disk_bytes
from .trials import Trials
from .wish import Wish


@dataclass(frozen=True)
class PlannedChange:
    """A single change: passes and arguments of the target, planned seconds and bytes on disk, or why it is refused."""

    name: str
    steps: str
    seconds: float = 0.0
    disk_bytes: int = 0
    refused: str = ""


def planned_changes_and_num_combinations(wish: Wish, candidate_name: str = "") -> tuple[list[PlannedChange], int]:
    """Single changes, the quickest first and those that are refused last, and the number of combinations; with a name
    that candidate alone. Raises Reject (unknown-candidate)."""
    trials, rows = Trials(wish, Cache(wish.session.settings.cache_dir)), []
    refuse_impossible(wish, trials)
    candidates = allowed_candidates(wish)
    for candidate in (
        [candidate_named(candidate_name, candidates)] if candidate_name else [c for c in candidates if c.changes <= 1]
    ):
        text = _steps_text(wish, candidate)
        try:
            plan = trials.plan(candidate)
        except Reject as rejection:
            rows.append(PlannedChange(candidate.name, text, refused=rejection.diagnostics[0].message))
        else:
            rows.append(PlannedChange(candidate.name, text, plan.seconds, disk_bytes(plan)))
    return sorted(rows, key=lambda row: (bool(row.refused), row.seconds)), sum(c.changes > 1 for c in candidates)


def _steps_text(wish: Wish, candidate: Candidate) -> str:
    passes = [step.partition(" = ")[2].partition("(")[0] for step in candidate.steps(wish.data.name)]
    return ", ".join([*passes, *([candidate.numbers.arguments] if candidate.numbers.arguments else [])])
