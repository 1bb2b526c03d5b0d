"""Mistakes of recipes with open steps that are known without weights: `effc check` reports them, too."""

from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from ....dsl.checker.recipe import Pipeline, Recipe
from ....dsl.checker.value_text import bound_text
from ....dsl.checker.values import DataRef, references_in
from ....dsl.syntax.diagnostics import Diagnostic, Fault
from ....dsl.syntax.nearest import nearest_name_help
from .alternatives import Alternative, all_alternatives
from .wish import Wish, is_open, model_emits, not_open

if TYPE_CHECKING:
    from ..api import Session


unmatched_pattern = Fault(
    "unmatched-pattern",
    "A pattern of `among` leads to no change: it names no pass and no format of the target, or a change that it names "
    "needs others that no pattern names.",
)
rows_read_before = Fault(
    "rows-read-before",
    "A bound reads rows that the search of steps reads, too.\n\n"
    "What was chosen by rows looks better on them than on others: `data`, `choose` and the rows of bounds are three "
    "data sets.",
)


def open_step_faults(session: "Session", recipe: Recipe) -> Iterator[Diagnostic]:
    """Faults of all pipelines of a recipe that have open steps."""
    for pipeline in recipe.pipelines.values():
        opened = [step for step in pipeline.steps if is_open(step)]
        if not opened:
            continue
        faults = [*_open_step_and_target_faults(session, pipeline)]
        yield from faults
        if not faults:
            wish = Wish(session, recipe, pipeline, opened[0], model_emits(session, pipeline)[0])
            yield from _ineffective_pattern_faults(wish)
            yield from shared_rows_faults(wish, lambda ref: (recipe.data[ref.name].folder, repr(recipe.data[ref.name])))


def _open_step_and_target_faults(session: "Session", pipeline: Pipeline) -> Iterator[Diagnostic]:
    """Faults of a pipeline with several open steps, or without the one target that they are searched for."""
    opened, emits = [step for step in pipeline.steps if is_open(step)], model_emits(session, pipeline)
    if len(opened) > 1:
        related = tuple((step.call.span, "open, too") for step in opened[:-1] if step.call.span)
        message = f"`{pipeline.name}` has {len(opened)} open steps, and a search is of one"
        help_text = "keep one: it may choose several passes"
        yield not_open(message, opened[-1].call.span, related=related, help=help_text)
    if len(emits) != 1:
        yield not_open(
            f"steps are searched for one target, and `{pipeline.name}` emits {len(emits) or 'no model'}",
            emits[1].call.span if emits else pipeline.span,
            help="emit one that holds a model; the recipe that comes out can get more",
        )
    elif len(pipeline.emits) > 1 and opened[0].call.args["against"] is not None:
        message = f"a front has several artifacts of one target, and `{pipeline.name}` emits more"
        other = next(emit for emit in pipeline.emits if emit is not emits[0])
        yield not_open(message, other.call.span, help="leave the others out")


def _ineffective_pattern_faults(wish: Wish) -> Iterator[Diagnostic]:
    """Faults of patterns of `among` without which the search would be the same."""
    model = wish.recipe.models[wish.pipeline.model]
    alternatives = all_alternatives(wish, wish.session.stored_skeleton(model))
    span, target = wish.step.call.argument_or_call_span("among"), wish.emit.call.word
    for pattern in wish.step.call.args["among"]:
        matching = [a for a in alternatives if any(fnmatch(word, pattern) for word in a.words)]
        if not matching:
            words = sorted({word for a in alternatives for word in a.words})
            message = f"`{pattern}` names nothing that `{target}` can be tuned by"
            yield unmatched_pattern(message, span, help=nearest_name_help(pattern, words, "there is"))
        elif not any(wish.allows_all(a.words) for a in matching):
            nearest = min(matching, key=lambda a: len(_words_not_allowed(wish, a)))
            unnamed = " and ".join(f'`"{word}"`' for word in _words_not_allowed(wish, nearest))
            message = f"`{pattern}` leads to no change: `{nearest.name}` needs {unnamed}, too"
            yield unmatched_pattern(message, span, help=f"add {unnamed} to `among`")


def _words_not_allowed(wish: Wish, alternative: Alternative) -> list[str]:
    return [word for word in alternative.words if not wish.allows_all([word])]


def shared_rows_faults(wish: Wish, identity: Callable[[DataRef], object]) -> Iterator[Diagnostic]:
    """Faults of bounds on rows that the search reads; `identity` says which data sets are equal."""
    read = {identity(ref): ("data", wish.emit.call) for ref in references_in(wish.emit.call.args, DataRef)}
    rows = {name: wish.step.call.args[name] for name in ("train", "choose", "data")}
    read |= {identity(ref): (name, wish.step.call) for name, ref in rows.items() if ref}
    for bound in wish.bounds:
        for ref in references_in(dict(bound.metric.args), DataRef):
            name, reader = read.get(identity(ref), ("", None))
            if reader is not None:
                message = f"`{bound_text(bound)}` reads `{ref.name}`, the rows that the search reads by `{name}`"
                related = ((span, f"`{name}`"),) if (span := reader.argument_or_call_span(name)) else ()
                yield rows_read_before(message, bound.span, related=related, help="judge by other rows")
