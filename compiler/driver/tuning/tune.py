"""From a wish to an ordinary recipe and its artifact."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ....dsl.checker.value_text import bound_text
from ....dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ...artifacts.artifact import refuse_output_path
from ...artifacts.manifest import read_manifest
from ...artifacts.output_lock import OutputPath, check_outputs, output_paths
from ...core.cache import Cache
from ...core.events import Event, Listener, Said, Warned
from ...core.quantity import count_text, measurement_text
from ...core.stopping import before_stopping
from ..api import build
from ..pipeline import Result
from .alternatives import Candidate
from .feasibility import refuse_impossible
from .journal import Journal
from .search import Search
from .trials import Trial, Trials, judge_trial
from .wish import Wish, metric_on_data

COMPILED = 3  # candidates that may be compiled, one after the other, until one keeps its bounds on unread rows

wish_unmet = Fault(
    "wish-unmet",
    "No candidate of a search of steps keeps all bounds.\n\n"
    "The nearest ones are listed with the bounds that they miss. Give up as much of one, give the search more time, or "
    "leave more to choose from.",
    exit="gate",
)


@dataclass(frozen=True)
class Compiled:
    """A candidate that was compiled. `missed` says which bounds it misses on rows that it was not chosen by."""

    recipe: Path
    results: Sequence[Result]
    missed: str = ""


@dataclass
class Tuned:
    """Result of a search of steps.

    compiled   candidates that were compiled, in that order
    unmet      why there is no artifact that keeps all bounds
    """

    wish: Wish
    search: Search
    compiled: dict[Candidate, Compiled] = field(default_factory=dict)
    unmet: list[Diagnostic] = field(default_factory=list)

    @property
    def chosen(self) -> dict[Candidate, Compiled]:
        """Candidates whose artifacts keep all bounds: one, or the points of a front; else the one compiled last."""
        keeping = {c: compiled for c, compiled in self.compiled.items() if not compiled.missed}
        return keeping or dict(list(self.compiled.items())[-1:])


@dataclass(frozen=True)
class Outputs:
    """Paths that a search may write: a recipe and what its targets emit, of a front with a suffix for each point."""

    wish: Wish
    journal: Journal
    recipe: Path
    out: Path
    force: bool

    def recipe_path(self, suffix: str) -> Path:
        return self.recipe.with_name(f"{self.recipe.stem}{suffix}{self.recipe.suffix}")

    def may_replace_outputs_or_reject(self, suffix: str) -> bool:
        """Whether outputs may be replaced. Raises Reject where what is there was not written by this search."""
        recipe = self.recipe_path(suffix)
        refuse_output_path(recipe, self.force or self.journal.has_recorded_file(recipe), True)
        outputs = [
            replace(o, call=replace(o.call, args={**o.call.args, "path": f"{o.call.args['path']}{suffix}"}))
            if o.call.word == self.wish.emit.call.word
            else o
            for o in output_paths([self.wish.recipe], self.out, self.wish.session.registry.describes_artifacts)
            if o.call in [emit.call for emit in self.wish.pipeline.emits]
        ]
        replaceable = [
            self.force or (self.journal.has_recorded_file(recipe) and self._is_replaceable(o)) for o in outputs
        ]
        for output, may_replace in zip(outputs, replaceable, strict=True):
            check_outputs([output], may_replace)
        return self.force or all(replaceable)

    def _is_replaceable(self, output: OutputPath) -> bool:
        """Whether a path is free, or holds what was compiled from a recipe that this search wrote."""
        if output.describes_artifacts or not os.path.lexists(output.path):
            return self.journal.has_recorded_file(output.path) or not os.path.lexists(output.path)
        try:
            return self.journal.has_recorded_text(read_manifest(output.path).recipe.get("text", ""))
        except (Reject, OSError):
            return False


def tune(wish: Wish, recipe: Path, out: Path, *, force: bool = False, name: str = "") -> Tuned:
    """Search the steps of a wish, write the best recipe to a path and compile it below `out`; of a front all of it.

    With `name`, no search: the candidate of that name, whether it keeps the bounds or not.
    """
    cache = Cache(wish.session.settings.cache_dir)
    journal = Journal.read_or_make(wish, cache)
    outputs = Outputs(wish, journal, recipe, out, force)
    scratch = wish.session.settings.cache_dir / "work"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="tune-") as folder:
        trials = Trials(wish, cache, Path(folder))
        refuse_impossible(wish, trials)
        search = Search(wish, trials, journal)
        suffixes = {c.suffix for c in search.candidates} if search.is_front and not name else {""}
        refuse_output_path(
            recipe, force or journal.has_recorded_file(recipe), True
        )  # what an interrupted search leaves
        for suffix in suffixes:
            outputs.may_replace_outputs_or_reject(suffix)
        tuned = Tuned(wish, search)
        with before_stopping(lambda: _write_and_announce_best_recipe(search, trials, recipe)):
            ranked = [search.measure_named(name)] if name else search.run()
        satisfying = [c for c in ranked if name or not search.worst_bound_violation(search.finals[c])]
        if not satisfying:
            tuned.unmet = [_unmet_diagnostic(wish, search, ranked)]
        elif search.is_front and not name:
            _compile_front(tuned, outputs)
        else:
            _compile_best(tuned, satisfying[: max_num_compiled(wish)], outputs)
    return tuned


def _compile_best(tuned: Tuned, candidates: Sequence[Candidate], outputs: Outputs) -> None:
    """Compile candidates one after the other, until one keeps all bounds."""
    for candidate in candidates:
        tuned.unmet = _compile_candidate(tuned, candidate, outputs, "", may_replace=bool(tuned.compiled))
        if not tuned.unmet:
            return


def _compile_front(tuned: Tuned, outputs: Outputs) -> None:
    """Compile all candidates of the front. What misses a bound leaves it."""
    front = tuned.search.select_front(tuned.search.finals)
    missed = [_compile_candidate(tuned, candidate, outputs, candidate.suffix) for candidate in front]
    if all(missed):
        tuned.unmet = missed[0]


def _drop_repeated_warnings(wish: Wish) -> Listener:
    """The session's listener without the warnings of the wish, which its candidates have as well."""
    repeated, on_event = {Warned(d).message for d in wish.warnings}, wish.session.settings.on_event

    def forward(event: Event) -> None:
        if not (isinstance(event, Warned) and event.message in repeated):
            on_event(event)

    return forward


def _compile_candidate(
    tuned: Tuned, candidate: Candidate, outputs: Outputs, suffix: str, may_replace: bool = False
) -> list[Diagnostic]:
    """Write and compile the recipe of a candidate; the bounds that its artifact misses."""
    may_replace = may_replace or outputs.may_replace_outputs_or_reject(suffix)
    path, text = outputs.recipe_path(suffix), tuned.search.trials.recipe_text(candidate, suffix)
    outputs.journal.write_recipe(path, text)
    session = replace(tuned.wish.session_with_text(text, path), pipelines=(tuned.wish.pipeline.name,))
    session.settings = replace(session.settings, on_event=_drop_repeated_warnings(tuned.wish))
    results = build(session, outputs.out, force=may_replace)
    for page in (page for result in results for page in result.reports):
        outputs.journal.note_written(page.path.read_text(encoding="utf-8"))
    missed = [d for r in results for d in r.missed]
    tuned.compiled[candidate] = Compiled(path, results, "; ".join(d.message for d in missed))
    if missed:
        message = f"{candidate.name} misses a bound on rows that it was not chosen by"
        tuned.wish.session.settings.on_event(Said(message))
    return missed


def max_num_compiled(wish: Wish) -> int:
    """Number of candidates that may be judged on the bounds' rows: one where a bound states its confidence, which a
    second look at its rows would lower."""
    return 1 if any(bound.confidence for bound in wish.bounds) else COMPILED


def _write_and_announce_best_recipe(search: Search, trials: Trials, recipe: Path) -> None:
    """Write the recipe of the best candidate so far; nothing where none keeps the bounds."""
    best = search.best
    if best is not None:
        search.journal.write_recipe(recipe, trials.recipe_text(best))
        message = f"best so far: {best.name}; its recipe is {recipe}, and the same command goes on"
        search.wish.session.settings.on_event(Said(message))


def _unmet_diagnostic(wish: Wish, search: Search, ranked: Sequence[Candidate]) -> Diagnostic:
    nearest = [f"{c.name}: {missed_bounds_text(wish, search.finals[c])}" for c in ranked[:3]]
    time = ", or give more time by `within:`" if search.out_of_time else ""
    return wish_unmet(
        f"none of {count_text(search.measured_count, 'candidate')} keeps all bounds",
        wish.step.call.span,
        note="nearest: " + "; ".join(nearest),
        help=f"loosen the bound that the nearest one misses{time}",
    )


def missed_bounds_text(wish: Wish, trial: Trial) -> str:
    """Bounds that a trial misses on the rows that it was measured on, each with the value or its share of the
    original's."""
    missed = [(o, o.value) for o in judge_trial(wish, trial, wish.context) if not o.passed and o.value is not None]
    return ", ".join(
        f"`{bound_text(replace(o.bound, metric=metric_on_data(o.bound.metric, wish.choose), span=None))}`: "
        + (f"{value / o.original:.5g}" if o.original else measurement_text(value, o.unit))
        for o, value in missed
    )
