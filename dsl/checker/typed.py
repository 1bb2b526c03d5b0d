"""From an expression to a value of the type that a parameter asks for."""

import re
from dataclasses import replace
from typing import Any

from ..syntax import ast
from ..syntax.diagnostics import Diagnostic, Fault, Fix
from ..syntax.nearest import nearest
from ..syntax.quotes import quotes_for
from .limits import within
from .list_bounds import items_fit
from .literals import Unfit, interval, literal, selector
from .scope import LABELS, POISON, Entry, Scope
from .type_phrases import PHRASES, like, sample, wanted_phrase
from .value_text import number, plain, show
from .values import Bytes, DataRef, Duration, MetricRef, ModelRef, ProfileRef, Range, Ratio, Selector, Shares, StepRef
from .vocabulary import Param

wrong_type = Fault("wrong-type", "A value is of another type than the parameter that it is given for.")
wrong_unit = Fault("wrong-unit", "A number has another unit than the parameter asks for.")
wrong_base = Fault("wrong-base", "A ratio is a share of something that the parameter doesn't count.")
missing_base = Fault("missing-base", "A ratio doesn't say what it is a share of, and there are several answers.")
unknown_choice = Fault("unknown-choice", "A word is none of those that the parameter lets you choose from.")

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


def typed(expr: ast.Expr, want: Param, scope: Scope) -> Any:
    """The value, or POISON after a fault was reported. `want.name` is what messages call it."""
    try:
        value = _value(expr, want, scope)
    except Unfit as unfit:
        scope.report(unfit.diagnostic)
        return POISON
    if value is POISON or not within(value, want, expr.span, scope.report):
        return POISON
    return value


def _value(expr: ast.Expr, want: Param, scope: Scope) -> Any:
    match expr:
        case _ if all(t.startswith("list[") for t in want.types) and _is_one(expr, want, scope):
            told = f"[{expr.span.text}]"
            said = f"`{want.name}` is one value, {wanted_phrase(want)} is needed"
            raise Unfit(wrong_type(said, expr.span, help=f"write `{told}`", fix=Fix(expr.span, told)))
        case ast.Name():
            return _name(expr, want, scope)
        case ast.Call():
            return _call(expr, want, scope)
        case ast.Items(items):
            return _items(expr, items, want, scope)
        case ast.Pairs():
            return _pairs(expr, want, scope)
        case ast.Of(amount, base):
            return _of(expr, amount, base, want, scope)
        case ast.Interval(low, high):
            ends = [_plain(e, scope) for e in (low, high)]
            return POISON if POISON in ends else fit(expr, interval(expr, *ends), want)
        case ast.Combine() | ast.AllowEmpty():
            return fit(expr, _selection(expr, want), want)
        case ast.Text(value) if "selector" in want.types and value not in want.choices:
            return selector(expr)
    return fit(expr, literal(expr), want)


def _is_one(expr: ast.Expr, want: Param, scope: Scope) -> bool:
    """Whether an expression would do as the one item of the list that is asked for."""
    if isinstance(expr, ast.Items):
        return False
    quiet = replace(scope, session=replace(scope.session, faults=[]))
    return typed(expr, replace(want, types=tuple(t[5:-1] for t in want.types), least=0), quiet) is not POISON


def _plain(expr: ast.Expr, scope: Scope) -> Any:
    """The value of a literal or of a `param`, of whatever type it is."""
    if isinstance(expr, ast.Name):
        entry = scope.find(expr.path)
        if entry and entry.kind == "param":
            return entry.value
        _not_a_value(expr, entry, scope, ("param",), "param")
        return POISON
    if isinstance(expr, (ast.Number, ast.Text, ast.Bool)):
        return literal(expr)
    raise Unfit(wrong_type("a number is needed here", expr.span))


def _selection(expr: ast.Expr, want: Param) -> Selector:
    found = selector(expr)
    text = "string" in want.types and "selector" not in want.types
    if found is None and text and not re.search(r"\s", expr.span.text):
        raise Unfit(quotes_for(expr.span.text, expr.span))
    if found is None:
        raise Unfit(
            wrong_type(
                f"the selector of `{want.name}` joins something that is no glob",
                expr.span,
                help='join quoted globs: "*.mlp" - "layers.0.mlp"',
            )
        )
    return found


def fit(expr: ast.Expr, value: Any, want: Param) -> Any:
    """The value as the first of the wanted types that it has; raises Unfit where it has none of them."""
    kind = CLASSES[type(value)]
    if kind == "string" and "choice" in want.types and value in want.choices:
        return value
    for name in want.types:
        if name == "ratio" and kind == "ratio":
            return based(expr, value, want)
        if name == "shares" and kind == "shares":
            from .shares import named

            return named(expr, value, want)
        if name == "float" and kind in ("int", "float"):
            return float(value)
        if name == kind:
            return value
    raise Unfit(misfit(expr, value, want))


def based(expr: ast.Expr, ratio: Ratio, want: Param) -> Ratio:
    """The ratio with its base checked, and filled in where there is only one."""
    bases = ", ".join(want.of[:-1]) + (" or " if len(want.of) > 1 else "") + "".join(want.of[-1:])
    if ratio.of is None:
        if len(want.of) > 1:
            raise Unfit(
                missing_base(
                    f"`{want.name}` is {show(ratio)}, but doesn't say of what: {bases}",
                    expr.span,
                    help=f"write `{expr.span.text} of {want.of[0]}`",
                    offer=Fix(expr.span, f"{expr.span.text} of {want.of[0]}"),
                )
            )
        return Ratio(ratio.value, want.of[0]) if want.of else ratio
    if ratio.of in want.of:
        return ratio
    place = expr.base.span if isinstance(expr, ast.Of) else expr.span
    if not want.of:
        raise Unfit(
            wrong_base(
                f"`{want.name}` is a plain ratio, not a share of {ratio.of}",
                place,
                help=f"write `{show(Ratio(ratio.value))}`",
            )
        )
    near = nearest(ratio.of, want.of) or (want.of[0] if len(want.of) == 1 else "")
    raise Unfit(
        wrong_base(
            f"`{want.name}` is a share of {bases}, not of {ratio.of}",
            place,
            help=f"write `of {near}`" if near else f"write `of {want.of[0]}`, if that is what you count",
            fix=Fix(place, near) if near and isinstance(expr, ast.Of) else None,
        )
    )


def misfit(expr: ast.Expr, value: Any, want: Param) -> Diagnostic:
    """Says what was given and what is needed, with a rewrite where there is a sure one."""
    given = CLASSES[type(value)]
    if given == "string" and "choice" in want.types:
        return _no_choice(expr, value, want)
    wanted = wanted_phrase(want)
    if given in NUMBERS and NUMBERS & set(want.types):
        fix = _rescaled(expr, value, want)
        help = f"write `{fix.text}`" if fix else f"write it like `{sample(want)}`"
        return wrong_unit(f"`{want.name}` is {show(value)}, {wanted} is needed", expr.span, help=help, fix=fix)
    return wrong_type(f"`{want.name}` is {PHRASES[given]}, {wanted} is needed", expr.span, help=like(want))


def _rescaled(expr: ast.Expr, value: Any, want: Param) -> Fix | None:
    """0.85 for a ratio was surely 85%, and 3% for a float 0.03."""
    if not isinstance(expr, ast.Number):
        return None
    if isinstance(value, float) and "ratio" in want.types and 0 <= value <= 1:
        return Fix(expr.span, show(Ratio(value)))
    if isinstance(value, Ratio) and "float" in want.types:
        return Fix(expr.span, number(value.value))
    return None


def _no_choice(expr: ast.Expr, text: str, want: Param) -> Diagnostic:
    near = nearest(text, want.choices)
    return unknown_choice(
        f"`{want.name}` is `{text}`, which is none of {', '.join(want.choices)}",
        expr.span,
        help=f"did you mean `{near}`?" if near else _legal(want),
        fix=Fix(expr.span, near) if near.isidentifier() and isinstance(expr, ast.Name) else None,
        offer=Fix(expr.span, plain(near or want.choices[0])) if want.choices else None,
    )


def _legal(want: Param) -> str:
    """How a choice is written: all of them where they are few."""
    texts = [f"`{want.name}: {choice}`" for choice in want.choices]
    return f"write {' or '.join(texts)}" if len(texts) <= 3 else f"write it like {texts[0]}"


def _name(expr: ast.Name, want: Param, scope: Scope) -> Any:
    """A choice, a param's value, a handle or a metric without arguments."""
    from .calls import metric_ref

    if "choice" in want.types and expr.path in want.choices:
        return expr.path
    entry = scope.find(expr.path)
    if entry is None and "metric" in want.types and expr.path in scope.session.vocabulary.words("metric"):
        return metric_ref(expr, scope)
    if entry is None or entry.kind not in ("param", *HANDLES):
        if entry is None and "choice" in want.types and not scope.poisoned(expr.path):
            raise Unfit(_no_choice(expr, expr.path, want))
        _not_a_value(expr, entry, scope, _fitting(want), _first_phrase(want), want)
        return POISON
    if entry.kind == "param":
        return POISON if entry.value is POISON else _from_param(expr, entry, want)
    if entry.kind not in want.types:
        raise Unfit(
            wrong_type(
                f"`{expr.path}` is {LABELS[entry.kind]}, {wanted_phrase(want)} is needed for `{want.name}`",
                expr.span,
                related=((entry.span, "declared here"),),
            )
        )
    return HANDLES[entry.kind](scope.variant.reach(entry, scope.instance))


def _first_phrase(want: Param) -> str:
    """What the first of the wanted types is called, without its article."""
    return wanted_phrase(replace(want, types=want.types[:1])).removeprefix("a ")


def _from_param(expr: ast.Name, entry: Entry, want: Param) -> Any:
    try:
        return fit(expr, entry.value, want)
    except Unfit as unfit:
        raise Unfit(replace(unfit.diagnostic, related=((entry.span, "the param"),), fix=None)) from None


def _fitting(want: Param) -> tuple[str, ...]:
    return ("param", *(t for t in want.types if t in HANDLES))


def _not_a_value(
    expr: ast.Name, entry: Entry | None, scope: Scope, kinds: tuple[str, ...], what: str, want: Param | None = None
) -> None:
    """Report a name that is unknown, or one that stands for something without a value."""
    if entry is None:
        metrics = scope.session.vocabulary.words("metric") if want and "metric" in want.types else ()
        scope.unknown(expr, kinds, metrics, what, quotes=want is not None and "string" in want.types)
    else:
        scope.report(
            wrong_type(
                f"`{expr.path}` is {LABELS[entry.kind]}, {what} is needed",
                expr.span,
                related=((entry.span, "declared here"),),
            )
        )


def _call(expr: ast.Call, want: Param, scope: Scope) -> Any:
    from .calls import metric_ref

    if "metric" in want.types:
        return metric_ref(expr, scope)
    raise Unfit(wrong_type(f"`{want.name}` is a call, {wanted_phrase(want)} is needed", expr.span))


def _items(expr: ast.Items, items: tuple[ast.Expr, ...], want: Param, scope: Scope) -> Any:
    inner = tuple(t[5:-1] for t in want.types if t.startswith("list["))
    if not inner:
        raise Unfit(wrong_type(f"`{want.name}` is a list, {wanted_phrase(want)} is needed", expr.span))
    one = replace(want, types=inner)
    values = tuple(typed(item, one, scope) for item in items)
    sound = all(v is not POISON for v in values) and items_fit(expr, values, want, scope.report)
    return values if sound else POISON


def _pairs(expr: ast.Pairs, want: Param, scope: Scope) -> Any:
    from .shares import shares

    if "shares" in want.types:
        return shares(expr, want, scope)
    raise Unfit(
        wrong_type(f"`{want.name}` is {PHRASES['shares']}, {wanted_phrase(want)} is needed", expr.span, help=like(want))
    )


def _of(expr: ast.Of, amount: ast.Expr, base: ast.Name, want: Param, scope: Scope) -> Any:
    value = _plain(amount, scope)
    if value is POISON:
        return POISON
    if not isinstance(value, Ratio):
        if type(value) is float and 0 <= value <= 1 and isinstance(amount, ast.Number):
            fix = Fix(amount.span, show(Ratio(value)))
            raise Unfit(
                wrong_unit(
                    f"{show(value)} is no ratio, only a ratio is a share of something",
                    amount.span,
                    help=f"write `{fix.text} of {base.path}`",
                    fix=fix,
                )
            )
        raise Unfit(
            wrong_unit(
                f"{plain(value)} is no ratio, only a ratio is a share of something",
                amount.span,
                help="write it like `85% of channels`, or drop the `of`",
            )
        )
    if value.of is not None and value.of != base.path:
        raise Unfit(wrong_base(f"`{amount.span.text}` is a share of {value.of}, not of {base.path}", base.span))
    return fit(expr, Ratio(value.value, base.path), want)
