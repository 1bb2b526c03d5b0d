"""From a wish to an ordinary recipe and its artifact."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ....dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ...artifacts.artifact import refuse_output_path
from ...artifacts.manifest import read_manifest
from ...artifacts.output_lock import check_outputs, output_paths
from ...core.cache import Cache
from ...core.events import Said
from ...core.quantity import count_text, measurement_text
from ..api import build
from ..judging.gate import bound_text
from ..pipeline import Result
from .alternatives import Candidate
from .feasibility import refuse_impossible
from .journal import Journal
from .search import Search
from .trials import Trial, Trials, judged
from .wish import Wish

COMPILED = 3  # candidates that may be compiled, one after the other, until one keeps its bounds on unread rows

wish_unmet = Fault(
    "wish-unmet",
    "No candidate of a search of steps keeps all bounds.\n\n"
    "The nearest ones are listed with the bounds that they miss. Give up as much of one, give the search more time, or "
    "leave more to choose from.",
    exit="gate",
)


@dataclass
class Tuned:
    """Result of a search of steps.

    candidate   the one that was compiled last; None where none was
    recipe      path of its recipe
    unmet       why there is no artifact that keeps all bounds
    missing     candidates that were compiled and missed a bound on rows that they were not chosen by
    """

    wish: Wish
    search: Search
    candidate: Candidate | None = None
    recipe: Path | None = None
    results: Sequence[Result] = ()
    unmet: list[Diagnostic] = field(default_factory=list)
    missing: dict[Candidate, str] = field(default_factory=dict)


def tune(wish: Wish, recipe: Path, out: Path, *, force: bool = False, name: str = "") -> Tuned:
    """Search the steps of a wish, write the best recipe to a path and compile it below `out`.

    With `name`, no search: the candidate of that name, whether it keeps the bounds or not.
    """
    cache = Cache(wish.session.settings.cache_dir)
    journal = Journal.of(wish, cache)
    refuse_output_path(recipe, force or journal.wrote(recipe), True)
    outputs = output_paths([wish.recipe], out, wish.session.registry.describes_artifacts)
    force = force or (journal.wrote(recipe) and all(_is_of_recipe(o.path, recipe) for o in outputs))
    check_outputs(outputs, force)
    scratch = wish.session.settings.cache_dir / "work"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="tune-") as folder:
        trials = Trials(wish, cache, Path(folder))
        refuse_impossible(wish, trials)
        search = Search(wish, trials, journal)
        tuned = Tuned(wish, search)
        try:
            ranked = [search.measure_named(name)] if name else search.run()
        except KeyboardInterrupt:
            _keep_best(search, trials, recipe)
            raise
        satisfying = [c for c in ranked if name or not search.violation(search.finals[c])]
        if not satisfying:
            tuned.unmet = [_unmet(wish, search, ranked)]
            return tuned
        for number, candidate in enumerate(satisfying[: max_compiled(wish)]):
            text = trials.text(candidate)
            journal.write_recipe(recipe, text)
            tuned.candidate, tuned.recipe = candidate, recipe
            tuned.results = build(wish.session_of(text, recipe), out, force=force or number > 0)
            tuned.unmet = [d for r in tuned.results for d in r.missed]
            if not tuned.unmet:
                return tuned
            tuned.missing[candidate] = "; ".join(d.message for d in tuned.unmet)
            message = f"{candidate.name} misses a bound on rows that it was not chosen by"
            wish.session.settings.on_event(Said(message))
    return tuned


def _is_of_recipe(artifact: Path, recipe: Path) -> bool:
    """Whether a path is free, or holds what was compiled from that very recipe."""
    if not artifact.exists():
        return True
    try:
        return read_manifest(artifact).recipe.get("text") == recipe.read_text(encoding="utf-8")
    except (Reject, OSError):
        return False


def max_compiled(wish: Wish) -> int:
    """Number of candidates that may be judged on the bounds' rows: one where a bound states its confidence, which a
    second look at its rows would lower."""
    return 1 if any(bound.confidence for bound in wish.bounds) else COMPILED


def _keep_best(search: Search, trials: Trials, recipe: Path) -> None:
    """Write the recipe of the best candidate so far; nothing where none keeps the bounds."""
    best = search.best
    if best is not None:
        search.journal.write_recipe(recipe, trials.text(best))
        message = f"best so far: {best.name}; its recipe is {recipe}, and the same command goes on"
        search.wish.session.settings.on_event(Said(message))


def _unmet(wish: Wish, search: Search, ranked: Sequence[Candidate]) -> Diagnostic:
    nearest = [f"{c.name}: {missed_text(wish, search.finals[c])}" for c in ranked[:3]]
    measured = sum(not trial.refused for trial in search.quick_trials.values())
    time = ", or give more time by `within:`" if search.out_of_time else ""
    return wish_unmet(
        f"none of {count_text(measured, 'candidate')} keeps all bounds",
        wish.step.call.span,
        note="nearest: " + "; ".join(nearest),
        help=f"loosen the bound that the nearest one misses{time}",
    )


def missed_text(wish: Wish, trial: Trial) -> str:
    """Bounds that a trial misses, each with the value, or with its share of the original's."""
    missed = [(o, o.value) for o in judged(wish, trial, wish.context) if not o.passed and o.value is not None]
    return ", ".join(
        f"`{bound_text(o.bound)}`: {value / o.original:.3g}"
        if o.original
        else f"`{bound_text(o.bound)}`: {measurement_text(value, o.unit)}"
        for o, value in missed
    )
