"""From a call to an invocation: arguments bound to the parameters of a word."""

import re
from typing import Any, NamedTuple

from ..syntax import ast
from ..syntax.diagnostics import Diagnostic, Fault, Fix
from ..syntax.nearest import nearest_name, nearest_name_help
from ..syntax.source import Span
from ..syntax.syntax_error import is_unit, unexpected_sign
from .recipe import Invocation
from .scope import POISON, Scope
from .typed import typed_value
from .values import DataRef, MetricRef
from .vocabulary import Param, Word

unknown_word = Fault("unknown-word", "A call names a pass, target, metric, data or model that doesn't exist.")
unknown_parameter = Fault("unknown-parameter", "A call gives a parameter that the word doesn't have.")
missing_parameter = Fault("missing-parameter", "A call leaves out a parameter that has no default.")
repeated_parameter = Fault("repeated-parameter", "A call gives one parameter twice.")
other_kind_of_rows = Fault(
    "other-kind-of-rows",
    "A data set has rows of another kind than a parameter reads.\n\n"
    "`choice` scores questions with options, which `choices` makes; `retrieval` compares texts, which `texts` makes.",
)
short_rows = Fault("short-rows", "Rows of a data set have fewer tokens than a metric needs.")
padded_rows = Fault(
    "padded-rows",
    "Rows of a data set are padded to one length, and a metric needs rows that are text to their end, as of `text`.",
)
too_many_arguments = Fault("too-many-arguments", "A call has more arguments without a name than the word takes.")

NOUNS = {"pass": "pass", "target": "target", "metric": "metric", "data": "kind of data", "model": "model source"}


def check_plugin_call(kind: str, call: ast.Call, scope: Scope) -> tuple[Word | None, Invocation | None]:
    """The word that a call names and the checked call; None for what was reported as a fault.

    `from:` is left alone: it belongs to the statement, not to the word.
    """
    word, invocation, sound = check_plugin_call_with_recovery(kind, call, scope)
    return word, invocation if sound else None


class CheckedCall(NamedTuple):
    word: Word | None
    invocation: Invocation | None
    is_sound: bool


def check_plugin_call_with_recovery(kind: str, call: ast.Call, scope: Scope) -> CheckedCall:
    """The word that a call names, the checked call, and whether it is sound; of an unsound one its arguments without
    faults."""
    word = resolve_plugin_or_report(kind, call.name, scope)
    if word is None:
        _mark_argument_names_as_used(call, scope)
        return CheckedCall(None, None, False)
    return CheckedCall(word, *typed_arguments_of_call(word, call.args, scope, call.name.span, call.span))


def resolve_plugin_or_report(kind: str, name: ast.Name, scope: Scope) -> Word | None:
    words = scope.session.vocabulary.words(kind)
    if name.path in words:
        return words[name.path]
    if name.path == "" or scope.is_in_unreadable_module(name.path):
        return None
    if kind == "pass" and _reported_as_missing_module_pipeline(name, scope):
        return None
    if kind == "metric" and (split_unit := _detached_unit_diagnostic(name)):
        scope.report(split_unit)
        return None
    closest = nearest_name(name.path, words)
    other = next((k for k in NOUNS if k != kind and name.path in scope.session.vocabulary.words(k)), None)
    note = f"`{name.path}` is a {NOUNS[other]}" if other else ""
    scope.report(
        unknown_word(
            f"no {NOUNS[kind]} is called `{name.path}`",
            name.span,
            note=note,
            help=nearest_name_help(name.path, words, "there is"),
            fix=Fix(name.span, closest) if closest else None,
        )
    )
    return None


def _detached_unit_diagnostic(name: ast.Name) -> Diagnostic | None:
    """`bytes <= 24 GiB in hf` is two bounds to the grammar, of which the second measures GiB."""
    source, start = name.span.source, name.span.start
    number = re.search(r"([0-9][0-9.]*)([ \t]+)$", source.text[max(0, start - 40) : start])
    if number is None or not is_unit(name.path):
        return None
    gap = Span(source, start - len(number[2]), start)
    amount_span = Span(source, start - len(number[0]), name.span.end)
    help = f"write `{number[1]}{name.path}`"
    return unexpected_sign("a unit follows its number without a space", amount_span, help=help, fix=Fix(gap, ""))


def _reported_as_missing_module_pipeline(name: ast.Name, scope: Scope) -> bool:
    """Whether the name begins with a module's, which has no such pipeline: reported here."""
    alias, dot, remainder = name.path.partition(".")
    module = scope.local_entry(alias) if dot else None
    if module is None or module.kind != "module":
        return False
    module.used = True
    pipelines = [n for n, e in module.scope.names.items() if e.kind == "pipeline"]
    scope.report(
        unknown_word(
            f"`{alias}` has no pipeline `{remainder}`",
            name.span,
            help=nearest_name_help(remainder, pipelines, "it has"),
        )
    )
    return True


def _mark_argument_names_as_used(call: ast.Call, scope: Scope) -> None:
    """Mark names in the arguments of an unknown word as used, so that they aren't reported as well."""
    for arg in call.args:
        for name in names_in_expression(arg.value):
            scope.resolve_name(name.path)


def names_in_expression(expr: ast.Expr) -> list[ast.Name]:
    match expr:
        case ast.Name():
            return [expr]
        case ast.Call(_, args):
            return [n for a in args for n in names_in_expression(a.value)]
        case ast.Items(items):
            return [n for i in items for n in names_in_expression(i)]
        case ast.Pairs(entries):
            return [n for e in entries for n in names_in_expression(e.value)]
        case ast.Interval(low, high):
            return names_in_expression(low) + names_in_expression(high)
        case ast.Of(amount, _):
            return names_in_expression(amount)
    return []


class CheckedArguments(NamedTuple):
    invocation: Invocation
    is_sound: bool


def typed_arguments_of_call(
    plugin: Word, args: tuple[ast.Arg, ...], scope: Scope, name_span: Span, call_span: Span
) -> CheckedArguments:
    """All parameters of a word with their values, those with a fault left out; and whether there was no fault."""
    arguments, sound = _arguments_by_parameter(plugin, args, scope)
    values: dict[str, Any] = {}
    spans: dict[str, Span] = {}
    for param in plugin.params:
        arg = arguments.get(param.name)
        if arg is not None:
            value = typed_value(arg.value, param, scope)
            spans[param.name] = arg.value.span
            if value is POISON or _has_other_kind_of_rows_and_report(plugin, param, value, arg.value.span, scope):
                sound = False
            else:
                values[param.name] = value
        elif not param.required:
            values[param.name] = param.default
        elif sound:
            sample = f"{param.name}: ..." if not param.positional else param.name
            scope.report(
                missing_parameter(
                    f"`{plugin.name}` needs `{param.name}`",
                    name_span,
                    help=f"`{sample}`: {param.doc[0].lower()}{param.doc[1:].rstrip('.')}",
                )
            )
            sound = False
    return CheckedArguments(Invocation(plugin.name, values, call_span, spans), sound)


def _has_other_kind_of_rows_and_report(plugin: Word, param: Param, value: Any, span: Span, scope: Scope) -> bool:
    """Whether a data set is reported that has no rows of the kind which a parameter reads."""
    data = scope.variant.data.get(value.name) if param.rows_kind and isinstance(value, DataRef) else None
    word = scope.session.vocabulary.word("data", data.word) if data else None
    if word is None or word.facts.get("rows_kind") == param.rows_kind:
        return False
    words = scope.session.vocabulary.words("data")
    makers = [name for name, maker in words.items() if maker.facts.get("rows_kind") == param.rows_kind]
    scope.report(
        other_kind_of_rows(
            f"`{plugin.name}` reads {param.rows_kind}, and `{value.name}` has none",
            span,
            help=f"declare it with `{'` or `'.join(makers)}`",
        )
    )
    return True


def _arguments_by_parameter(plugin: Word, args: tuple[ast.Arg, ...], scope: Scope) -> tuple[dict[str, ast.Arg], bool]:
    """Arguments by parameter, and whether each of them has a place of its own."""
    out: dict[str, ast.Arg] = {}
    slots = [p.name for p in plugin.params if p.positional]
    position, sound = 0, True
    for arg in args:
        if arg.name == "from":
            continue
        name = arg.name
        if not name:
            if position == len(slots):
                sound = _report_excess_positional_argument(plugin, arg, len(slots), out, scope)
                continue
            name = slots[position]
            position += 1
        if plugin.param(name) is None:
            sound = _report_unknown_parameter(plugin, arg, scope)
        elif name in out:
            sound = False
            scope.report(
                repeated_parameter(
                    f"`{name}` is given twice",
                    arg.span,
                    related=((out[name].span, "the first"),),
                    help="drop one of them",
                )
            )
        else:
            out[name] = arg
    return out, sound


def _report_excess_positional_argument(
    plugin: Word, arg: ast.Arg, limit: int, out: dict[str, ast.Arg], scope: Scope
) -> bool:
    free = [p.name for p in plugin.params if p.name not in out and not p.positional]
    count = f"{limit} argument{'' if limit == 1 else 's'}" if limit else "no arguments"
    help = (
        f"name it: `{free[0]}: {arg.value.span.text}`"
        if len(free) == 1
        else (f"name it; `{plugin.name}` has {', '.join(f'`{n}`' for n in free)}" if free else "drop it")
    )
    scope.report(too_many_arguments(f"`{plugin.name}` takes {count} without a name", arg.span, help=help))
    for name in names_in_expression(arg.value):
        scope.resolve_name(name.path)
    return False


_PACKED = "a step makes numbers smaller: `quantize.gptq`, `native(weights: int4)`"
_OF_TRANSFORMERS = {  # arguments of `from_pretrained` that a recipe says elsewhere
    "device_map": "a model lies on one device, which is an option of the run: `effc compile --device cuda`",
    "load_in_4bit": _PACKED,
    "load_in_8bit": _PACKED,
    "quantization_config": _PACKED,
}


def _report_unknown_parameter(plugin: Word, arg: ast.Arg, scope: Scope) -> bool:
    names = [p.name for p in plugin.params]
    closest = nearest_name(arg.name, names)
    span = arg.name_span or arg.span
    help = nearest_name_help(arg.name, names, "it has") or "it takes no parameters"
    opposite = {"remove": "keep", "keep": "remove"}.get(arg.name, "")
    if opposite in names:  # the amount is another then: no fix of the name alone
        closest, help = "", f"`{opposite}` says what {'stays' if opposite == 'keep' else 'goes'}"
    if arg.name in _OF_TRANSFORMERS:
        closest, help = "", _OF_TRANSFORMERS[arg.name]
    scope.report(
        unknown_parameter(
            f"`{plugin.name}` has no parameter `{arg.name}`",
            span,
            help=help,
            fix=Fix(span, closest) if closest else None,
        )
    )
    for name in names_in_expression(arg.value):
        scope.resolve_name(name.path)
    return False


def metric_ref(expr: ast.Name | ast.Call, scope: Scope) -> MetricRef | Any:
    """A metric with the arguments that differ from their defaults, in order of declaration; or POISON."""
    call = expr if isinstance(expr, ast.Call) else ast.Call(expr, (), span=expr.span)
    word, invocation = check_plugin_call("metric", call, scope)
    if word is None or invocation is None or _reported_short_or_padded_rows(word, invocation, scope):
        return POISON
    non_default = tuple(
        (p.name, invocation.args[p.name]) for p in word.params if p.required or invocation.args[p.name] != p.default
    )
    return MetricRef(word.name, non_default)


def _reported_short_or_padded_rows(metric: Word, call: Invocation, scope: Scope) -> bool:
    """Whether a metric is reported that needs longer rows than those its data set has, or rows without padding."""
    data, needed = call.args.get("data"), metric.rules(call.args).min_row_tokens()
    declared = scope.variant.data.get(data.name) if isinstance(data, DataRef) else None
    if declared is None or not needed:
        return False
    if scope.session.vocabulary.words("data")[declared.word].facts.get("padded"):
        scope.report(
            padded_rows(
                f"`{metric.name}` counts the last tokens of each row here, and rows of `{data.name}` end in padding",
                call.span,
                note=f"rows of `{declared.word}` are padded to one length",
                help="name rows of `text`",
            )
        )
        return True
    length = declared.args.get("length")
    if not isinstance(length, int) or length >= needed:
        return False
    scope.report(
        short_rows(
            f"`{metric.name}` needs rows of {needed:,} tokens or more, and those of `{data.name}` have {length:,}",
            call.span,
            help=f"declare `{data.name}` with `length: {needed}`, or ask for fewer tokens",
        )
    )
    return True
