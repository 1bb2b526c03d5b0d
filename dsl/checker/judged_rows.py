"""Rows of bounds against the rows that steps before them have seen."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..syntax.diagnostics import Diagnostic, Fault
from ..syntax.source import Span
from .demands import same_data
from .pipelines import PipelineBuild
from .recipe import Bound, Emit, Invocation
from .values import DataRef, MetricRef, references_in

known_rows = Fault(
    "known-rows",
    "A bound may be judged on rows that the result was made or chosen by.\n\n"
    "A search that cuts by a score on some rows suits those rows, and two samples of one file may share rows. Either "
    "makes a result look better than it is on other rows; what was trained or calibrated on the very rows is refused "
    "(`same-data`).",
    severity="warning",
)
_PARTS = ("path", "name", "config", "split", "revision")  # what says where rows are from


def report_judged_rows(line: PipelineBuild, bounds: Sequence[Bound], emits: Sequence[Emit]) -> None:
    """Report bounds on rows that a step of an emitted result learned from, was chosen by, or may have seen."""
    emitted = {emit.source for emit in emits} or ({line.stages[-1].name} if line.stages else set())
    names = {stage.name for end in emitted for stage in line.source_chain_of(end)}
    stages = [stage for stage in line.stages if stage.name in names and stage.sound]
    reported = set()
    readers = [
        _Reader(s.name, s.call, s.word.facts) for s in stages if s.call and s.word and s.word.facts.get("changes")
    ]
    words = line.scope.session.vocabulary.words("target")
    writers = [_Reader(e.call.word, e.call, word.facts) for e in emits if (word := words.get(e.call.word))]
    for bound in bounds:
        judged = [w for w in writers if bound.part == w.name or (not bound.part and not w.facts.get("later"))]
        seen_by = [*readers, *(writer for writer in judged if writer.facts.get("calibrates"))]
        for ref in references_in(bound.metric, DataRef):
            fault = next((f for reader in seen_by for f in _shared_rows_faults(bound, ref, reader, line)), None)
            if fault is not None and (bound.metric, ref) not in reported:
                reported.add((bound.metric, ref))
                line.scope.report(fault)


@dataclass(frozen=True)
class _Reader:
    """A step that changes the model, or a target that rounds it by rows."""

    name: str
    call: Invocation
    facts: Mapping[str, Any]


def _shared_rows_faults(bound: Bound, ref: DataRef, reader: _Reader, line: PipelineBuild) -> Iterator[Diagnostic]:
    """Faults of a bound's rows against those of one step or target, the worst first."""
    call, data = reader.call, line.scope.variant.data
    metric, rows = bound.metric.name, data.get(ref.name)
    learned = {name: value for name, value in call.args.items() if name not in reader.facts.get("disjoint", {})}
    uses = [
        (name, used, data.get(used.name), bool(references_in(value, MetricRef)))
        for name, value in learned.items()
        for used in references_in(value, DataRef)
    ]
    span, help = _reference_span(bound, ref), f"judge by rows that `{reader.name}` has not seen"
    for name, used, other, scored in sorted(uses, key=lambda use: use[3]):
        related = (
            ((argument_span, f"`{name}` of `{reader.name}`"),)
            if (argument_span := call.argument_or_call_span(name))
            else ()
        )
        if used == ref or (rows is not None and rows == other and rows.folder == other.folder):
            alias = "" if used == ref else f", there `{used.name}`"
            verb, fault = ("was chosen by", known_rows) if scored else ("learned from", same_data)
            message = f"`{metric}` is of the rows of `{ref.name}`, which `{reader.name}` {verb}{alias}"
            yield fault(message, span, related=related, help=help)
        elif not scored and rows is not None and other is not None and _may_share_rows(rows, other):
            message = (
                f"`{metric}` may be of rows that `{reader.name}` learned from: `{used.name}` is of the same source"
            )
            yield known_rows(message, span, related=related, help=help)


def _may_share_rows(first: Invocation, second: Invocation) -> bool:
    """Whether two data sets are drawn from one file, or from one part of a data set."""
    sources = [{part: call.args[part] for part in _PARTS if part in call.args} for call in (first, second)]
    return first.word == second.word and sources[0] == sources[1] != {} and first.folder == second.folder


def _reference_span(bound: Bound, ref: DataRef) -> Span | None:
    """Place of a data set's name in a bound; the bound where it is not written there."""
    span = bound.span
    if span is None or (at := span.text.find(ref.name)) < 0:
        return span
    return Span(span.source, span.start + at, span.start + at + len(ref.name))
