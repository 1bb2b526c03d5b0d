"""Mistakes in the data files of a recipe, all at once: whatever reading them into rows refuses."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ...dsl.checker.recipe import Pipeline, Recipe
from ...dsl.checker.values import DataRef, references_in
from ...dsl.syntax.diagnostics import Diagnostic, Reject
from ..inputs.windows import no_file

if TYPE_CHECKING:
    from .api import Session


def unreadable_data_diagnostics(session: "Session", recipes: Sequence[Recipe]) -> list[Diagnostic]:
    """Faults of files that steps, targets and bounds read, each once.

    A file that is not there has a warning of its own.
    """
    faults: list[Diagnostic] = []
    for recipe in recipes:
        for pipeline in recipe.pipelines.values():
            for name in _names_of_file_data(session, recipe, pipeline):
                try:
                    session.context(recipe, pipeline).tokenize_rows_once(name)
                except Reject as rejection:
                    faults += [d for d in rejection.diagnostics if d.fault is not no_file]
    return list(dict.fromkeys(faults))


def _names_of_file_data(session: "Session", recipe: Recipe, pipeline: Pipeline) -> Iterator[str]:
    """Names of the data sets that a pipeline uses and that are read from files."""
    used = [step.call.args for step in pipeline.steps] + [emit.call.args for emit in pipeline.emits]
    used += [dict(bound.metric.args) for bound in pipeline.expects]
    words = session.registry.vocabulary.words("data")
    for name in dict.fromkeys(ref.name for ref in references_in(used, DataRef)):
        if words[recipe.data[name].word].facts.get("reads"):
            yield name
