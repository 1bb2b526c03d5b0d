"""Warnings of a run: kinds of them, and the form in which a step's result keeps its warnings."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ...dsl.syntax.diagnostics import Diagnostic, Fault
from ...dsl.syntax.source import Span

few_rows = Fault(
    "few-rows",
    "A search scores by so few tokens that it fits them: its choices cost other text more than the score says.\n\n"
    "Give the score's data more rows, or longer ones, of more than one kind of text.",
    severity="warning",
)
fitted_rows = Fault(
    "fitted-rows",
    "A search made its score better, or another metric much worse: it fitted the rows that it scores by.\n\n"
    "Give the score's data more rows; `check` measures others beside them.",
    severity="warning",
)
far_beyond = Fault(
    "far-beyond",
    "A search removed far more than the recipe says, since the parts that could go are that large.",
    severity="warning",
)
may_be_refused = Fault(
    "may-be-refused",
    "A target may refuse at the end of a compile what comes to it; only the compile can tell.",
    severity="warning",
)
other_level = Fault(
    "other-level", "A lock was written on a machine whose kernels are of another level.", severity="warning"
)
other_versions = Fault(
    "other-versions",
    "An artifact was written with versions of libraries that differ from those here.",
    severity="warning",
)
worker_left_out = Fault(
    "worker-left-out",
    "One of the workers of a compile may not work for it; the others do what there is to do.",
    severity="warning",
)
model_remark = Fault(
    "model-remark", "There is something to know about how a model is computed here.", severity="warning"
)

_OF_STEPS = {fault.slug: fault for fault in (few_rows, fitted_rows, far_beyond)}


def warnings_to_json(diagnostics: Iterable[Diagnostic]) -> list[dict[str, str]]:
    """Warnings of a step, as its result and a manifest keep them."""
    return [{"slug": d.slug, "message": d.message, "note": d.note, "help": d.help} for d in diagnostics]


def warning_sentence(record: Mapping[str, Any]) -> str:
    """Warning as one sentence, of a manifest that anybody may have written."""
    return "; ".join(text for name in ("message", "note", "help") if isinstance(text := record.get(name), str) and text)


def warnings_from_json(records: Iterable[Mapping[str, Any]], span: Span | None) -> Iterator[Diagnostic]:
    """Warnings of a step whose result is in the cache, at the step's place in the recipe."""
    for record in records:
        if (fault := _OF_STEPS.get(record["slug"])) is not None:
            yield fault(record["message"], span, help=record["help"], note=record["note"])
