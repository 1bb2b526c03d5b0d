"""Rules of a word for its arguments together, for the steps before it, and for the rows that it names."""

from collections.abc import Iterator, Sequence

from ..syntax.diagnostics import Diagnostic, Fault
from ..syntax.source import Span
from .pipelines import PipelineBuild, Stage
from .recipe import Emit, Invocation
from .rules import Conflict, MissingStep, Unread
from .scope import Scope
from .value_text import plain_value_text
from .values import DataRef, references_in
from .vocabulary import Word

incompatible_choices = Fault("unfit-choices", "Parameters of a word are given values that can't go together.")
same_data = Fault(
    "same-data",
    "A result is to be judged on the rows that it was made from.\n\nSuch a number is too good: those rows are known.",
)
no_prompts = Fault(
    "no-prompts",
    "A step learns from answers to prompts, and the rows that it is to learn from don't say where a prompt ends.\n\n"
    "`pairs` makes rows of a prompt and its answer each.",
)
too_few_samples = Fault("too-few-samples", "The data of a target have fewer rows than it divides among its clients.")
missing_step = Fault("missing-step", "A pass or a target needs what another pass makes, and no step before it does.")


def report_conflicting_arguments_and_missing_steps(build: PipelineBuild, emits: Sequence[Emit]) -> None:
    """Report steps and targets whose arguments don't go together, or that lack a step before them."""
    scope = build.scope
    for stage in build.stages:
        if stage.word and stage.call and stage.sound:
            for fault in combination_faults(stage.word, stage.call, build.source_chain_of(stage.name)[:-1], scope):
                build.report(stage, fault)
    for emit in emits:
        word = scope.session.vocabulary.words("target")[emit.call.word]
        for fault in combination_faults(word, emit.call, build.source_chain_of(emit.source), scope):
            scope.report(fault)


def combination_faults(plugin: Word, call: Invocation, earlier_stages: list[Stage], scope: Scope) -> list[Diagnostic]:
    """Faults of arguments that don't go together, of a step that is missing before, and of data used twice."""
    args, data = call.args, scope.variant.data
    faults = [
        *_faults_by_plugin_rules(plugin, call, earlier_stages, scope),
        *_faults_of_rows_without_prompts(plugin, call, scope),
    ]
    faults = faults or [*_faults_of_few_samples(plugin, call, scope)]  # where the number of clients has no other fault
    for judge, taught in plugin.facts.get("disjoint", {}).items():
        learned = {ref.name: data.get(ref.name, ref) for ref in references_in(args[taught], DataRef)}
        for ref in references_in(args[judge], DataRef):
            twin = next((name for name, rows in learned.items() if rows == data.get(ref.name, ref)), None)
            if twin is not None:
                optional = not next(p.required for p in plugin.params if p.name == judge)
                repeat = "has too" if twin == ref.name else f"has as `{twin}`, too"
                faults.append(
                    same_data(
                        f"`{judge}` is of the rows of `{ref.name}`, which `{taught}` {repeat}",
                        call.argument_or_call_span(judge),
                        related=((span, f"`{taught}`"),) if (span := call.argument_or_call_span(taught)) else (),
                        help="name other rows" + (f", or leave `{judge}` out" if optional else ""),
                    )
                )
                break
    return faults


def _faults_by_plugin_rules(
    plugin: Word, call: Invocation, earlier_stages: list[Stage], scope: Scope
) -> Iterator[Diagnostic]:
    """Problems by the word's own rules: the first conflict, else each unread parameter; a missing step."""
    problems = list(plugin.rules(call.args).problems())
    conflict = next((problem for problem in problems if isinstance(problem, Conflict)), None)
    if conflict:
        note = _values_left_out_text(conflict.params, call)
        yield incompatible_choices(
            conflict.message, _span_of_first_argument(conflict.params, call), help=conflict.help, note=note
        )
    for problem in problems:
        if isinstance(problem, Unread) and not conflict:
            for name in problem.params:
                if name in call.spans:
                    message = f"nothing reads `{name}` here: it belongs to {problem.home}"
                    note = _values_left_out_text(problem.deciding, call)
                    yield incompatible_choices(
                        message, call.argument_or_call_span(name), note=note, help=f"leave `{name}` out"
                    )
        elif isinstance(problem, MissingStep) and _has_no_earlier_pass(problem.step, earlier_stages, scope):
            message = f"`{plugin.name}` needs `{problem.step}` before it"
            span, help_text = _span_of_first_argument(problem.params, call), f"add a step `{problem.step}(...)`"
            yield missing_step(message, span, note=problem.reason, help=help_text)


def _span_of_first_argument(argument_names: Sequence[str], call: Invocation) -> Span | None:
    """Place of the first of these arguments that the recipe gives; of the call where it gives none."""
    return call.argument_or_call_span(next((name for name in argument_names if name in call.spans), ""))


def _values_left_out_text(argument_names: Sequence[str], call: Invocation) -> str:
    """Values that count and that nobody wrote: `clients` is 4 where it is left out."""
    silent = {name: call.args[name] for name in argument_names if name not in call.spans}
    return ", ".join(
        f"`{name}` is {plain_value_text(value)} where it is left out" for name, value in silent.items() if value
    )


def _has_no_earlier_pass(pass_name: str, earlier_stages: list[Stage], scope: Scope) -> bool:
    """Whether no earlier step runs the pass `pass_name`; False after syntax errors, since steps may be unread."""
    return not scope.session.broken and all(s.word and s.word.name != pass_name for s in earlier_stages)


def _faults_of_few_samples(plugin: Word, call: Invocation, scope: Scope) -> Iterator[Diagnostic]:
    """Data whose `samples` are together fewer than the rows that the word needs of them."""
    needed = plugin.rules(call.args).min_rows()
    declared = (
        [scope.variant.data.get(ref.name) for ref in references_in(call.args.get("data"), DataRef)] if needed else []
    )
    samples = [rows.args.get("samples") if rows else None for rows in declared]
    n_rows = sum(n for n in samples if isinstance(n, int))
    if samples and n_rows < needed and all(isinstance(n, int) for n in samples):
        yield too_few_samples(
            f"`{plugin.name}` needs {needed:,} rows or more here, and `data` has {n_rows:,}",
            call.argument_or_call_span("data"),
            help="declare `data` with more `samples`",
        )


def _faults_of_rows_without_prompts(plugin: Word, call: Invocation, scope: Scope) -> Iterator[Diagnostic]:
    """Rows that are to say where prompts end, and are of a kind that doesn't."""
    kinds = scope.session.vocabulary.words("data")
    for name in plugin.facts.get("answers", ()):
        for ref in references_in(call.args[name], DataRef):
            declared = scope.variant.data.get(ref.name)
            if declared is not None and not kinds[declared.word].facts.get("prompted"):
                prompted = " or ".join(f"`{n}`" for n, kind in sorted(kinds.items()) if kind.facts.get("prompted"))
                yield no_prompts(
                    f"`{ref.name}` does not say where a prompt ends and its answer begins",
                    call.argument_or_call_span(name),
                    note=f"rows of `{declared.word}` are whole texts",
                    help=f"give rows of {prompted}",
                )
