"""From an expression to a value of the type that a parameter asks for."""

import re
from dataclasses import replace
from typing import Any

from ..syntax import ast
from ..syntax.diagnostics import Diagnostic, Fault, Fix
from ..syntax.nearest import nearest_name
from ..syntax.quotes import missing_quotes_diagnostic
from .limits import validate_or_report
from .list_bounds import keeps_list_bounds_or_report
from .literals import InvalidLiteral, literal_value, parse_range_limits, parse_selector
from .scope import LABELS, POISON, Scope, ScopeEntry
from .type_phrases import PHRASES, example_remedy, expected_phrase, sample_value_text
from .value_text import plain_value_text, shortest_decimal, value_text
from .values import Bytes, DataRef, Duration, MetricRef, ModelRef, ProfileRef, Range, Ratio, Selector, Shares, StepRef
from .vocabulary import Param

type_mismatch = Fault("wrong-type", "A value is of another type than the parameter that it is given for.")
unit_mismatch = Fault("wrong-unit", "A number has another unit than the parameter asks for.")
base_mismatch = Fault("wrong-base", "A ratio is a share of something that the parameter doesn't count.")
missing_base = Fault("missing-base", "A ratio doesn't say what it is a share of, and there are several answers.")
unknown_choice = Fault("unknown-choice", "A word is none of those that the parameter lets you choose from.")

_COUNT_WORDS = {"K": "thousand", "M": "million", "B": "billion", "T": "trillion"}
CLASSES = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "string",
    Ratio: "ratio",
    Bytes: "bytes",
    Duration: "duration",
    Range: "range",
    Selector: "selector",
    Shares: "shares",
    MetricRef: "metric",
    DataRef: "data",
    ModelRef: "model",
    ProfileRef: "profile",
    StepRef: "step",
    tuple: "list",
}
NUMBERS = {"int", "float", "ratio", "bytes", "duration"}
HANDLES = {"data": DataRef, "model": ModelRef, "profile": ProfileRef, "step": StepRef}


def typed_value(expr: ast.Expr, param: Param, scope: Scope) -> Any:
    """The value of an expression typed for a parameter, or POISON after a fault was reported. `want.name` is what
    messages call it."""
    try:
        value = _evaluate_expression(expr, param, scope)
    except InvalidLiteral as error:
        scope.report(error.diagnostic)
        return POISON
    if value is POISON or not validate_or_report(value, param, expr.span, scope.report):
        return POISON
    return value


def _evaluate_expression(expr: ast.Expr, param: Param, scope: Scope) -> Any:
    match expr:
        case _ if all(t.startswith("list[") for t in param.types) and _fits_as_single_item(expr, param, scope):
            as_list = f"[{expr.span.text}]"
            message = f"`{param.name}` is one value, {expected_phrase(param)} is needed"
            raise InvalidLiteral(
                type_mismatch(message, expr.span, help=f"write `{as_list}`", fix=Fix(expr.span, as_list))
            )
        case ast.Name():
            return _value_of_name_or_poison(expr, param, scope)
        case ast.Call():
            return _evaluate_call(expr, param, scope)
        case ast.Items(items):
            return _evaluate_list(expr, items, param, scope)
        case ast.Pairs():
            return _evaluate_shares(expr, param, scope)
        case ast.Of(amount, base):
            return _evaluate_ratio_of(expr, amount, base, param, scope)
        case ast.Interval(low, high):
            limits = [_evaluate_literal_or_param(e, scope) for e in (low, high)]
            return POISON if POISON in limits else coerce_to_param_type(expr, parse_range_limits(expr, *limits), param)
        case ast.Combine() | ast.AllowEmpty():
            return coerce_to_param_type(expr, _evaluate_selector(expr, param), param)
        case ast.Text(value) if "selector" in param.types and value not in param.choices:
            return parse_selector(expr)
    return coerce_to_param_type(expr, literal_value(expr), param)


def _fits_as_single_item(expr: ast.Expr, param: Param, scope: Scope) -> bool:
    """Whether an expression would do as the one item of the list that is asked for."""
    if isinstance(expr, ast.Items):
        return False
    quiet = replace(scope, session=replace(scope.session, faults=[]))
    return typed_value(expr, replace(param, types=tuple(t[5:-1] for t in param.types), least=0), quiet) is not POISON


def _evaluate_literal_or_param(expr: ast.Expr, scope: Scope) -> Any:
    """The value of a literal or of a `param`, of whatever type it is."""
    if isinstance(expr, ast.Name):
        entry = scope.resolve_name(expr.path)
        if entry and entry.kind == "param":
            return entry.value
        _report_not_a_value(expr, entry, scope, ("param",), "param")
        return POISON
    if isinstance(expr, (ast.Number, ast.Text, ast.Bool)):
        return literal_value(expr)
    raise InvalidLiteral(type_mismatch("a number is needed here", expr.span))


def _evaluate_selector(expr: ast.Expr, param: Param) -> Selector:
    parsed = parse_selector(expr)
    text = "string" in param.types and "selector" not in param.types
    if parsed is None and text and not re.search(r"\s", expr.span.text):
        raise InvalidLiteral(missing_quotes_diagnostic(expr.span.text, expr.span))
    if parsed is None:
        raise InvalidLiteral(
            type_mismatch(
                f"the selector of `{param.name}` joins something that is no glob",
                expr.span,
                help='join quoted globs: "*.mlp" - "layers.0.mlp"',
            )
        )
    return parsed


def coerce_to_param_type(expr: ast.Expr, value: Any, param: Param) -> Any:
    """The value as the first of the wanted types that it has; raises Conflict where it has none of them."""
    kind = CLASSES[type(value)]
    if kind == "string" and "choice" in param.types and value in param.choices:
        return value
    for name in param.types:
        if name == "ratio" and kind == "ratio":
            return with_ratio_base(expr, value, param)
        if name == "shares" and kind == "shares":
            from .shares import checked_named_shares

            return checked_named_shares(expr, value, param)
        if name == "float" and kind in ("int", "float"):
            return float(value)
        if name == kind:
            return value
    raise InvalidLiteral(type_mismatch_diagnostic(expr, value, param))


def with_ratio_base(expr: ast.Expr, ratio: Ratio, param: Param) -> Ratio:
    """The ratio with its base checked, and filled in where there is only one."""
    bases = ", ".join(param.of[:-1]) + (" or " if len(param.of) > 1 else "") + "".join(param.of[-1:])
    if ratio.of is None:
        if len(param.of) > 1:
            raise InvalidLiteral(
                missing_base(
                    f"`{param.name}` is {value_text(ratio)}, but doesn't say of what: {bases}",
                    expr.span,
                    help=f"write `{expr.span.text} of {param.of[0]}`",
                    offer=Fix(expr.span, f"{expr.span.text} of {param.of[0]}"),
                )
            )
        return Ratio(ratio.value, param.of[0]) if param.of else ratio
    if ratio.of in param.of:
        return ratio
    span = expr.base.span if isinstance(expr, ast.Of) else expr.span
    if not param.of:
        raise InvalidLiteral(
            base_mismatch(
                f"`{param.name}` is a plain ratio, not a share of {ratio.of}",
                span,
                help=f"write `{value_text(Ratio(ratio.value))}`",
            )
        )
    closest = nearest_name(ratio.of, param.of) or (param.of[0] if len(param.of) == 1 else "")
    raise InvalidLiteral(
        base_mismatch(
            f"`{param.name}` is a share of {bases}, not of {ratio.of}",
            span,
            help=f"write `of {closest}`" if closest else f"write `of {param.of[0]}`, if that is what you count",
            fix=Fix(span, closest) if closest and isinstance(expr, ast.Of) else None,
        )
    )


def type_mismatch_diagnostic(expr: ast.Expr, value: Any, param: Param) -> Diagnostic:
    """Diagnostic of what was given and what is needed, with a rewrite where there is a sure one."""
    value_type = CLASSES[type(value)]
    if value_type == "string" and "choice" in param.types:
        return _unknown_choice_diagnostic(expr, value, param)
    expected = expected_phrase(param)
    if value_type in NUMBERS and NUMBERS & set(param.types):
        fix = _certain_unit_fix(expr, value, param)
        help = f"write `{fix.text}`" if fix else f"write it like `{sample_value_text(param)}`"
        if value_type in ("int", "float") and "duration" in param.types:
            help = f"write `{value_text(value)}s`, `{value_text(value)}min` or another unit of time"
        if value_type in ("int", "float") and "bytes" in param.types and expr.span.text[-1:] in _COUNT_WORDS:
            unit = expr.span.text[-1]
            help = f"`{unit}` is a {_COUNT_WORDS[unit]} here; write a size with KB, MB, GB or KiB, MiB, GiB"
        return unit_mismatch(
            f"`{param.name}` is {value_text(value)}, {expected} is needed", expr.span, help=help, fix=fix
        )
    return type_mismatch(
        f"`{param.name}` is {PHRASES[value_type]}, {expected} is needed", expr.span, help=example_remedy(param)
    )


def _certain_unit_fix(expr: ast.Expr, value: Any, param: Param) -> Fix | None:
    """0.85 for a ratio was surely 85%, and 3% for a float 0.03."""
    if not isinstance(expr, ast.Number):
        return None
    if isinstance(value, float) and "ratio" in param.types and 0 <= value <= 1:
        return Fix(expr.span, value_text(Ratio(value)))
    if isinstance(value, Ratio) and "float" in param.types:
        return Fix(expr.span, shortest_decimal(value.value))
    return None


def _unknown_choice_diagnostic(expr: ast.Expr, text: str, param: Param) -> Diagnostic:
    closest = nearest_name(text, param.choices)
    return unknown_choice(
        f"`{param.name}` is `{text}`, which is none of {', '.join(param.choices)}",
        expr.span,
        help=f"did you mean `{closest}`?" if closest else _choices_remedy(param),
        fix=Fix(expr.span, closest) if closest.isidentifier() and isinstance(expr, ast.Name) else None,
        offer=Fix(expr.span, plain_value_text(closest or param.choices[0])) if param.choices else None,
    )


def kind_mismatch_diagnostic(name: ast.Name, entry: ScopeEntry, expectation_text: str) -> Diagnostic:
    """Diagnostic for a name of another kind of thing; `expectation_text` goes on with what belongs there."""
    fact = f"`{name.path}` is {LABELS[entry.kind]}{expectation_text}"
    return type_mismatch(fact, name.span, related=((entry.span, "declared here"),))


def _choices_remedy(param: Param) -> str:
    """Allowed values of a choice: all of them where they are few."""
    texts = [f"`{param.name}: {choice}`" for choice in param.choices]
    return f"write {' or '.join(texts)}" if len(texts) <= 3 else f"write it like {texts[0]}"


def _value_of_name_or_poison(expr: ast.Name, param: Param, scope: Scope) -> Any:
    """A choice, a param's value, a handle or a metric without arguments."""
    from .calls import metric_ref

    if "choice" in param.types and expr.path in param.choices:
        return expr.path
    entry = scope.resolve_name(expr.path)
    if entry is None and "metric" in param.types and expr.path in scope.session.vocabulary.words("metric"):
        return metric_ref(expr, scope)
    if entry is None or entry.kind not in ("param", *HANDLES):
        if entry is None and "choice" in param.types and not scope.is_in_unreadable_module(expr.path):
            raise InvalidLiteral(_unknown_choice_diagnostic(expr, expr.path, param))
        _report_not_a_value(expr, entry, scope, _accepted_entry_kinds(param), _first_type_phrase(param), param)
        return POISON
    if entry.kind == "param":
        return POISON if entry.value is POISON else _coerce_value_of_named_param(expr, entry, param)
    if entry.kind not in param.types:
        raise InvalidLiteral(
            kind_mismatch_diagnostic(expr, entry, f", {expected_phrase(param)} is needed for `{param.name}`")
        )
    return HANDLES[entry.kind](scope.variant.add_module_entry(entry, scope.instance))


def _first_type_phrase(param: Param) -> str:
    """Name of the first expected type, without its article."""
    return expected_phrase(replace(param, types=param.types[:1])).removeprefix("a ")


def _coerce_value_of_named_param(expr: ast.Name, entry: ScopeEntry, param: Param) -> Any:
    try:
        return coerce_to_param_type(expr, entry.value, param)
    except InvalidLiteral as error:
        raise InvalidLiteral(replace(error.diagnostic, related=((entry.span, "the param"),), fix=None)) from None


def _accepted_entry_kinds(param: Param) -> tuple[str, ...]:
    return ("param", *(t for t in param.types if t in HANDLES))


def _report_not_a_value(
    expr: ast.Name,
    entry: ScopeEntry | None,
    scope: Scope,
    accepted_kinds: tuple[str, ...],
    expected: str,
    param: Param | None = None,
) -> None:
    """Report a name that is unknown, or one that stands for something without a value."""
    if entry is None:
        metrics = scope.session.vocabulary.words("metric") if param and "metric" in param.types else ()
        scope.report_unknown_name(
            expr,
            accepted_kinds,
            metrics,
            expected,
            is_string_accepted=param is not None and "string" in param.types,
            value_help=example_remedy(param) if param is not None else "",
        )
    else:
        scope.report(kind_mismatch_diagnostic(expr, entry, f", {expected} is needed"))


def _evaluate_call(expr: ast.Call, param: Param, scope: Scope) -> Any:
    from .calls import metric_ref

    if "metric" in param.types:
        return metric_ref(expr, scope)
    raise InvalidLiteral(type_mismatch(f"`{param.name}` is a call, {expected_phrase(param)} is needed", expr.span))


def _evaluate_list(expr: ast.Items, items: tuple[ast.Expr, ...], param: Param, scope: Scope) -> Any:
    inner = tuple(t[5:-1] for t in param.types if t.startswith("list["))
    if not inner:
        raise InvalidLiteral(type_mismatch(f"`{param.name}` is a list, {expected_phrase(param)} is needed", expr.span))
    one = replace(param, types=inner)
    values = tuple(typed_value(item, one, scope) for item in items)
    sound = all(v is not POISON for v in values) and keeps_list_bounds_or_report(expr, values, param, scope.report)
    return values if sound else POISON


def _evaluate_shares(expr: ast.Pairs, param: Param, scope: Scope) -> Any:
    from .shares import typed_shares

    if "shares" in param.types:
        return typed_shares(expr, param, scope)
    raise InvalidLiteral(
        type_mismatch(
            f"`{param.name}` is {PHRASES['shares']}, {expected_phrase(param)} is needed",
            expr.span,
            help=example_remedy(param),
        )
    )


def _evaluate_ratio_of(expr: ast.Of, amount: ast.Expr, base: ast.Name, param: Param, scope: Scope) -> Any:
    value = _evaluate_literal_or_param(amount, scope)
    if value is POISON:
        return POISON
    if not isinstance(value, Ratio):
        if type(value) is float and 0 <= value <= 1 and isinstance(amount, ast.Number):
            fix = Fix(amount.span, value_text(Ratio(value)))
            raise InvalidLiteral(
                unit_mismatch(
                    f"{value_text(value)} is no ratio, only a ratio is a share of something",
                    amount.span,
                    help=f"write `{fix.text} of {base.path}`",
                    fix=fix,
                )
            )
        raise InvalidLiteral(
            unit_mismatch(
                f"{plain_value_text(value)} is no ratio, only a ratio is a share of something",
                amount.span,
                help="write it like `85% of channels`, or drop the `of`",
            )
        )
    if value.of is not None and value.of != base.path:
        raise InvalidLiteral(
            base_mismatch(f"`{amount.span.text}` is a share of {value.of}, not of {base.path}", base.span)
        )
    return coerce_to_param_type(expr, Ratio(value.value, base.path), param)
