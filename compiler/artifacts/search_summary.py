"""Summary line of each search of an artifact: evaluations made and skipped."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.quantity import count_text, si_count


def search_summary_lines(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for every step that searched; decisions are untrusted, and what is no count is passed over."""
    lines = []
    for step in steps:
        summary = search_summary_text(step.get("decisions", ()))
        if summary:
            lines.append(f"{step.get('name', '')}: {summary}")
    return lines


def search_summary_text(decisions: Sequence[Any]) -> str:
    """ "12 cuts, 40 scores; 96 candidates left out by estimates, of which 2 of 24 were too high"; "" of no search."""
    rounds = [d for d in decisions if isinstance(d, Mapping) and isinstance(d.get("scores"), Mapping)]
    if not rounds:
        return ""
    total = sum(len(d["scores"]) for d in rounds)
    summary = f"{count_text(len(rounds), 'cut')}, {count_text(total, 'score')}"
    left = [d["left_out"] for d in rounds if isinstance(d.get("left_out"), int)]
    if not left:
        return summary
    missed = sum(len(d["below"]) for d in rounds if isinstance(d.get("below"), list))
    of = f"; {count_text(missed, 'estimate')} too high, which widened the bound" if missed else ""
    return f"{summary}; {si_count(left[-1])} candidates never scored, as estimates showed them to lose{of}"
