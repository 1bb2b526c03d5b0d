"""Requirements of a word's header on its combined arguments, and on the steps before it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..syntax.diagnostics import Diagnostic, Fault
from .conditions import compared_in, condition_names, meets, phrase
from .pipelines import PipelineBuild, Stage
from .recipe import Emit, Invocation
from .scope import Scope
from .value_text import plain
from .values import DataRef, references_in
from .vocabulary import Word

unfit_choices = Fault("unfit-choices", "Parameters of a word are given values that can't go together.")
same_data = Fault(
    "same-data",
    "A result is to be judged on the rows that it was made from.\n\nSuch a number is too good: those rows are known.",
)
no_prompts = Fault(
    "no-prompts",
    "A step learns from answers to prompts, and the rows that it is to learn from don't say where a prompt ends.\n\n"
    "`pairs` makes rows of a prompt and its answer each.",
)
missing_step = Fault("missing-step", "A pass or a target needs what another pass makes, and no step before it does.")


def report_demands(line: PipelineBuild, emits: Sequence[Emit]) -> None:
    """Report steps and targets whose arguments don't go together, or that lack a step before them."""
    scope = line.scope
    for stage in line.stages:
        if stage.word is None:
            continue
        if stage.sound and stage.call:
            for fault in invalid_combination(stage.word, stage.call, scope):
                line.report(stage, fault)
        if stage.call and (lacking := _missing_pass(stage.word, stage.call, line.stages_up_to(stage.name)[:-1], scope)):
            line.report(stage, lacking)
    for emit in emits:
        word = scope.session.vocabulary.words("target")[emit.call.word]
        for fault in invalid_combination(word, emit.call, scope):
            scope.report(fault)
        if lacking := _missing_pass(word, emit.call, line.stages_up_to(emit.source), scope):
            scope.report(lacking)


def invalid_combination(plugin: Word, call: Invocation, scope: Scope) -> list[Diagnostic]:
    """The first choice that is unfit, at the parameter named first that the recipe gives; and data used twice."""
    args, faults = {p.name: p.default for p in plugin.params} | dict(call.args), []
    for conditions, (reason, help_) in plugin.facts.get("conflicts", {}).items():
        if meets(conditions, args):
            argument = next((name for name in condition_names(conditions) if name in call.spans), "")
            faults.append(
                unfit_choices(reason, call.where(argument), help=help_, note=_defaults(conditions, call, args))
            )
            break
    else:
        faults += _unread_parameters(plugin, call, args)
    data = scope.variant.data
    faults += _rows_without_prompts(plugin, call, args, scope)
    for judge, taught in plugin.facts.get("disjoint", {}).items():
        learned = {ref.name: data.get(ref.name, ref) for ref in references_in(args[taught], DataRef)}
        for ref in references_in(args[judge], DataRef):
            twin = next((name for name, rows in learned.items() if rows == data.get(ref.name, ref)), None)
            if twin is not None:
                repeat = "has too" if twin == ref.name else f"has as `{twin}`, too"
                faults.append(
                    same_data(
                        f"`{judge}` is of the rows of `{ref.name}`, which `{taught}` {repeat}",
                        call.where(judge),
                        related=((span, f"`{taught}`"),) if (span := call.where(taught)) else (),
                        help=f"name other rows, or leave `{judge}` out",
                    )
                )
                break
    return faults


def _defaults(conditions: str, call: Invocation, args: Mapping[str, Any]) -> str:
    """Numbers that conditions compare and nobody wrote: `clients` is 4 where it is left out."""
    silent = [name for name in dict.fromkeys(compared_in(conditions)) if name not in call.spans]
    return ", ".join(f"`{name}` is {plain(args[name])} where it is left out" for name in silent)


def _unread_parameters(plugin: Word, call: Invocation, args: Mapping[str, Any]) -> Iterator[Diagnostic]:
    """Parameters that are given and that other arguments leave without a meaning."""
    for name, condition in plugin.facts.get("only", {}).items():
        if name in call.spans and not meets(condition, args):
            silent = [n for n in condition_names(condition) if n not in call.spans and args[n] is not None]
            yield unfit_choices(
                f"nothing reads `{name}` here: it belongs to {phrase(condition)}",
                call.where(name),
                note=", ".join(f"`{n}` is {plain(args[n])} where it is left out" for n in silent),
                help=f"leave `{name}` out",
            )


def _rows_without_prompts(
    plugin: Word, call: Invocation, args: Mapping[str, Any], scope: Scope
) -> Iterator[Diagnostic]:
    """Rows that are to say where prompts end, and are of a kind that doesn't."""
    kinds = scope.session.vocabulary.words("data")
    for name in plugin.facts.get("answers", ()):
        for ref in references_in(args[name], DataRef):
            declared = scope.variant.data.get(ref.name)
            if declared is not None and not kinds[declared.word].facts.get("prompted"):
                prompted = " or ".join(f"`{n}`" for n, kind in sorted(kinds.items()) if kind.facts.get("prompted"))
                yield no_prompts(
                    f"`{ref.name}` does not say where a prompt ends and its answer begins",
                    call.where(name),
                    note=f"rows of `{declared.word}` are whole texts",
                    help=f"give rows of {prompted}",
                )


def _missing_pass(plugin: Word, call: Invocation, earlier_stages: list[Stage], scope: Scope) -> Diagnostic | None:
    """A fault where a pass must have run before this word and has not; None where all have, or nobody can tell."""
    if scope.session.broken or any(s.word is None for s in earlier_stages):
        return None
    done = {s.word.name for s in earlier_stages if s.word}
    args = {p.name: p.default for p in plugin.params} | dict(call.args)
    for key, reason in plugin.facts.get("needs", {}).items():
        name, _, conditions = key.partition(" & ")
        if name not in done and (not conditions or meets(conditions, args)):
            argument = next((n for n in condition_names(conditions) if n in call.spans), "") if conditions else ""
            message = f"`{plugin.name}` needs `{name}` before it"
            return missing_step(message, call.where(argument), note=reason, help=f"add a step `{name}(...)`")
    return None
