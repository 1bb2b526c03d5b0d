"""Values of params from outside the recipe: `--set`, a `--params` file and `EFFC_PARAM_name`.

Precedence, weakest first: the recipe's default, the params file, the environment, `--set`. Each value is text
until the declared `param` gives it a type.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import TypeAlias

from ..syntax import ast
from ..syntax.diagnostics import Diagnostic, Fault
from ..syntax.source import Source, Span

invalid_override = Fault(
    "bad-override", "A `--set` or a params file can't be read: `--set name=value`, or one JSON object.", exit="usage"
)
unknown_override = Fault(
    "unknown-override", "A value is given from outside for a param that the recipe doesn't declare.", exit="usage"
)
incompatible_override = Fault(
    "unfit-override", "A value given from outside doesn't fit the type or the bounds of its param.", exit="usage"
)

PREFIX = "EFFC_PARAM_"
_NUMBER = re.compile(r"([+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(%|[A-Za-z]+)?\Z")
_WORD = re.compile(r"[A-Za-z_]\w*\Z")
_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*\Z")

# JSON as `json.loads` decodes it where an object becomes its pairs.
JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | tuple[tuple[str, JsonValue], ...] | None"


@dataclass(frozen=True)
class Override:
    """A value for the param `name`; `origin` is what gave it, as a person would call it."""

    name: str
    value: ast.Expr
    origin: str
    name_span: Span


@dataclass(frozen=True)
class Overrides:
    """The strongest override of every param, and what could not be read."""

    by_name: Mapping[str, Override] = field(default_factory=dict)
    diagnostics: tuple[Diagnostic, ...] = ()


def read_overrides(
    set_options: Iterable[str] = (), params_source: Source | None = None, environment: Mapping[str, str] | None = None
) -> Overrides:
    """Overrides of a command line; `environment` is os.environ or a part of it."""
    by_name: dict[str, Override] = {}
    faults: list[Diagnostic] = []
    overrides = list(_parse_json_params(params_source, faults)) if params_source else []
    for name, text in sorted((environment or {}).items()):
        if name.startswith(PREFIX):
            source = Source(name, text)
            overrides.append(
                Override(name[len(PREFIX) :], parse_value_from(source, 0), name, Span(source, 0, len(text)))
            )
    overrides += [o for text in set_options if (o := _parse_set_option(text, faults))]
    for override in overrides:
        by_name[override.name] = override
    return Overrides(by_name, tuple(faults))


def _parse_set_option(text: str, faults: list[Diagnostic]) -> Override | None:
    source = Source("--set", text)
    name, equals, _ = text.partition("=")
    if not equals or not _NAME.match(name.strip()):
        faults.append(
            invalid_override(
                f"`--set {text}` names no param", Span(source, 0, len(text)), help="write `--set name=value`"
            )
        )
        return None
    return Override(name.strip(), parse_value_from(source, len(name) + 1), "--set", Span(source, 0, len(name)))


def _parse_json_params(source: Source, faults: list[Diagnostic]) -> Iterable[Override]:
    import json

    try:
        table = json.loads(source.text, object_pairs_hook=tuple)  # a name given twice is not lost
    except ValueError as error:
        at = getattr(error, "pos", 0)
        faults.append(
            invalid_override(
                f"the params file is no JSON: {str(error).partition(':')[0].lower()}",
                Span(source, at, min(at + 1, len(source.text))),
            )
        )
        return
    if not isinstance(table, tuple):
        faults.append(
            invalid_override(
                "the params file holds no object", Span(source, 0, len(source.text)), help='write {"keep": "80%"}'
            )
        )
        return
    for name, value in table:
        span = _key_span(source, name)
        if (expr := _decoded_json_to_expression(value, span)) is None:
            faults.append(
                invalid_override(
                    f"`{name}` of the params file is no value of a param",
                    span,
                    help="write a string, a finite number, a bool, or a list or an object of them",
                )
            )
            continue
        yield Override(name, expr, source.name, span)


def _key_span(source: Source, name: str) -> Span:
    match = re.search(rf'"{re.escape(name)}"\s*:', source.text)
    start = match.start() if match else 0
    return Span(source, start, start + len(name) + 2 if match else len(source.text))


def _decoded_json_to_expression(value: JsonValue, span: Span) -> ast.Expr | None:
    if isinstance(value, bool):
        return ast.Bool(value, span=span)
    if isinstance(value, (int, float)):
        return ast.Number(repr(value), span=span) if isfinite(value) else None
    if isinstance(value, str):
        return parse_unquoted_value(value, span)
    if isinstance(value, list):
        items = [item for v in value if (item := _decoded_json_to_expression(v, span)) is not None]
        return ast.Items(tuple(items), span=span) if len(items) == len(value) else None
    if isinstance(value, tuple):  # an object
        named = [(name, item) for name, v in value if (item := _decoded_json_to_expression(v, span)) is not None]
        sound = named and len(named) == len(value) and all(_WORD.match(name) for name, _ in named)
        return _pairs_node(named, span) if sound else None
    return None


def parse_value_from(source: Source, start_offset: int) -> ast.Expr:
    return parse_unquoted_value(source.text[start_offset:], Span(source, start_offset, len(source.text)))


def parse_unquoted_value(text: str, span: Span) -> ast.Expr:
    """A value as a shell would pass it: quotes are not needed, and what is nothing else is a string."""
    text = text.strip()
    if match := _NUMBER.match(text):
        return ast.Number(match[1], match[2] or "", span=span)
    if text in ("true", "false"):
        return ast.Bool(text == "true", span=span)
    amount, of, base = text.rpartition(" of ")
    if of and _NUMBER.match(amount.strip()) and _NAME.match(base.strip()):
        return ast.Of(parse_unquoted_value(amount, span), ast.Name(base.strip(), span=span), span=span)
    if text.startswith("[") and text.endswith("]"):
        parts = [p for p in text[1:-1].split(",") if p.strip()]
        return ast.Items(tuple(parse_unquoted_value(p, span) for p in parts), span=span)
    if text.startswith("{") and text.endswith("}"):
        entries = [p.partition(":") for p in text[1:-1].split(",") if p.strip()]
        if entries and all(colon and _WORD.match(name.strip()) for name, colon, _ in entries):  # else a glob: `{q,k}`
            return _pairs_node([(name.strip(), parse_unquoted_value(value, span)) for name, _, value in entries], span)
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1]
    return ast.Text(text, span=span)


def _pairs_node(values_by_name: Iterable[tuple[str, ast.Expr]], span: Span) -> ast.Pairs:
    entries = (ast.Entry(ast.Name(name, span=span), value, span=span) for name, value in values_by_name)
    return ast.Pairs(tuple(entries), span=span)
