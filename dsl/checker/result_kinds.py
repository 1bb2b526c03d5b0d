"""Kinds of results that steps accept and return and that targets accept, checked before anything runs."""

from collections.abc import Iterable, Set

from ..syntax.diagnostics import Fault
from ..syntax.source import Span
from .pipelines import PipelineBuild, Stage
from .recipe import Bound, Emit
from .value_text import plain_value_text
from .values import StepRef, references_in
from .vocabulary import Word

other_kind_of_result = Fault(
    "other-kind-of-result",
    "A pass or a target is handed a result that it can't work on.\n\n"
    "A step gives a model, adapters that belong to one, a front of several models with their measures, or a family "
    "with choices. `effc explain NAME` says what a pass takes and gives, and what a target holds.",
)
unknown_part = Fault(
    "unknown-part",
    "A bound names a part that the pipeline doesn't have.\n\n"
    "`in NAME` restricts a bound to one emitted artifact, by its target's name, or to one point of a front, by the "
    "name of the step that gave it; `in any` asks it of one point, and without it every point is asked.",
)

MODEL = "model"
_LABELS = {MODEL: "a model", "adapters": "adapters", "front": "a front of models", "family": "a family of models"}
POINTS = ("any", "all")


def result_label(kind: str) -> str:
    """A kind of result in a sentence."""
    return _LABELS.get(kind, f"a result of kind `{kind}`")


def result_kind_of(line: PipelineBuild, result_name: str) -> str:
    """The kind of a named result; the pipeline's model is a model."""
    return next((s.rules.result_kind() for s in line.stages if s.name == result_name), MODEL)


def report_unaccepted_results(build: PipelineBuild) -> None:
    """Report steps that follow, or name, a result of a kind that their pass does not take."""
    for stage in build.stages:
        accepted = stage.word.facts.get("accepts", (MODEL,)) if stage.word else ()
        refs = [ref.name for ref in references_in(stage.call.args, StepRef)] if stage.call else []
        names_steps = stage.word is not None and any("step" in t for p in stage.word.params for t in p.types)
        for name in dict.fromkeys(refs if names_steps else [stage.source]):
            kind = result_kind_of(build, name)
            if accepted and kind not in accepted:
                build.report(
                    stage,
                    other_kind_of_result(
                        f"`{stage.word.name}` takes {_labels_joined_with_or(accepted)}, "
                        f"and `{name}` gives {result_label(kind)}",
                        _span_naming_result(stage, name, names_steps),
                        related=_related_spans_of_result(build, name),
                        help=(_remedy_by_picking_one_model(build, kind, accepted) if not names_steps else "")
                        or _suitable_result_remedy(build, accepted, stage.name, names_steps)
                        + _remedy_by_leaving_out_argument(build, name, accepted),
                    ),
                )


def report_unholdable_result(plugin: Word, emit: Emit, build: PipelineBuild) -> None:
    """Report a target that can't hold the kind of result that it is to write."""
    holdable, kind = plugin.facts.get("result_kinds", (MODEL,)), result_kind_of(build, emit.source)
    if kind not in holdable:
        build.scope.report(
            other_kind_of_result(
                f"`{plugin.name}` holds {_labels_joined_with_or(holdable)}, "
                f"and `{emit.source}` gives {result_label(kind)}",
                emit.call.span,
                related=_related_spans_of_result(build, emit.source),
                help=_remedy_by_picking_one_model(build, kind, holdable)
                or _remedy_by_other_target(build, kind)
                + _suitable_result_remedy(build, holdable, "", False)
                + _remedy_by_leaving_out_argument(build, emit.source, holdable),
            )
        )


def report_unknown_bound_parts(bounds: Iterable[Bound], targets: Set[str], build: PipelineBuild) -> None:
    """Report bounds that name neither one of the emitted targets nor a point of a front."""
    fronts = [s for s in build.stages if s.rules.result_kind() == "front"]
    points = {ref.name for s in fronts for ref in references_in(s.call.args, StepRef)}
    for bound in bounds:
        known = sorted(targets | points | (set(POINTS) if fronts else set()))
        if bound.part and bound.part not in known:
            help_text = f"there is {', '.join(known)}" if known else "emit the pipeline's result to a target first"
            message = f"`{bound.part}` is no part of what this pipeline emits"
            build.scope.report(unknown_part(message, bound.part_span or bound.span, help=help_text))


def _span_naming_result(stage: Stage, name: str, is_explicit: bool) -> Span:
    """Span that names the result: `from:`, or an argument; else the next word."""
    if is_explicit:
        arguments = (
            p for p, v in stage.call.args.items() if any(ref.name == name for ref in references_in(v, StepRef))
        )
        return stage.call.argument_or_call_span(next(arguments, "")) or stage.span
    return stage.origin or stage.span


def _remedy_by_leaving_out_argument(build: PipelineBuild, name: str, accepted: tuple[str, ...]) -> str:
    """`, or leave `merge: false` out`, where the step would then give what is wanted."""
    stage = next((s for s in build.stages if s.name == name and s.word and s.call), None)
    for param in stage.call.spans if stage else ():
        remaining = {n: value for n, value in stage.call.args.items() if n != param}
        if stage.word.rules(remaining).result_kind() in accepted:
            return f", or leave `{param}: {plain_value_text(stage.call.args[param])}` out of `{name}`"
    return ""


def _remedy_by_picking_one_model(build: PipelineBuild, kind: str, accepted: tuple[str, ...]) -> str:
    """Remedy for a result of several models: a pass that picks one, and targets that accept them; "" of other
    results."""
    if MODEL not in accepted:
        return ""
    words = build.scope.session.vocabulary.words
    takers = [
        w.name for w in words("pass").values() if kind in w.facts.get("accepts", ()) and _gives_model_by_default(w)
    ]
    holders = [w.name for w in words("target").values() if kind in w.facts.get("result_kinds", ()) and w.name == kind]
    picked = [f"take one out of it with `{name}`" for name in sorted(takers)]
    emitted = [f'emit it with `{name}("{name}")`, from which `effc pick` takes a model' for name in holders]
    return ", or ".join(picked + emitted)


def _remedy_by_other_target(build: PipelineBuild, kind: str) -> str:
    """Beginning of a remedy: the targets that hold a kind of result; "" where none does."""
    targets = build.scope.session.vocabulary.words("target").values()
    facts = [(w.name, w.facts) for w in targets if kind in w.facts.get("result_kinds", (MODEL,))]
    names = sorted(f"`{name}`" for name, f in facts if not f.get("describes_artifacts"))
    return f"emit it with {' or '.join(names)}, " if names else ""


def _gives_model_by_default(plugin: Word) -> bool:
    return MODEL in plugin.facts.get("results", (MODEL,))


def _labels_joined_with_or(result_kinds: tuple[str, ...]) -> str:
    return " or ".join(map(result_label, result_kinds))


def _related_spans_of_result(line: PipelineBuild, name: str) -> tuple[tuple[Span, str], ...]:
    return tuple((s.span, f"gives {result_label(s.rules.result_kind())}") for s in line.stages if s.name == name)


def _suitable_result_remedy(build: PipelineBuild, accepted: tuple[str, ...], end: str, is_explicit: bool) -> str:
    """The last result before the step `end` that would do."""
    names = [s.name for s in build.stages]
    earlier = build.stages[: names.index(end)] if end else build.stages
    fit = [s.name for s in earlier if s.rules.result_kind() in accepted]
    if is_explicit:
        return f"name steps that give {_labels_joined_with_or(accepted)}" + (f": {', '.join(fit)}" if fit else "")
    if fit:
        return f"write `from: {fit[-1]}`"
    return (
        f"write `from: {build.input}`"
        if MODEL in accepted
        else f"add a step that gives {_labels_joined_with_or(accepted)}"
    )
