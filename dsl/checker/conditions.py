"""Conditions in headers: what a pass makes or gives, and what a target refuses, may depend on its arguments.

A term is `score` (given), `unit: branch | layer` (of one of these values), `not` one of them, or compares two numbers:
`clients < 3`, `count ranks != clients`, `share * clients < 1`, `most budgets < 100%`. Terms are joined by `&`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from math import inf, prod
from typing import Any

from .value_text import plain
from .values import Bytes, Duration, Ratio

_COMPARED = re.compile(r"\s(<|>|!=)\s")
_OF_LISTS: dict[str, Callable[[list[Any]], float]] = {"count": len, "most": max}


def is_met(condition: str, args: Mapping[str, Any]) -> bool:
    """Whether arguments meet a condition: "" always, "score" where it is given, "unit: branch | layer" by value."""
    if not condition:
        return True
    name, colon, expected = condition.partition(":")
    value = args.get(name.strip())
    return plain(value) in [one.strip() for one in expected.split("|")] if colon else value not in (None, False, ())


def meets(conditions: str, args: Mapping[str, Any]) -> bool:
    """Whether arguments meet all of `strategy: ffa & not trains: lora`."""
    return all(_is_met(term, args) for term in _terms(conditions))


def condition_names(conditions: str) -> list[str]:
    """The parameters that conditions are about, in their order."""
    names: list[str] = []
    for term in _terms(conditions):
        operands = _COMPARED.split(term)[::2]
        names += [_name(f) for side in operands for f in side.split("*")] if len(operands) > 1 else [_named(term)]
    return [name for name in names if name.isidentifier()]


def compared_in(conditions: str) -> list[str]:
    """Parameters whose numbers are compared."""
    return [name for term in _terms(conditions) if _COMPARED.search(term) for name in condition_names(term)]


def phrase(condition: str) -> str:
    """`strategy: abm & not ranks` as people read it: `strategy: abm` without `ranks`."""
    terms = [term.strip() for term in condition.split("&")]
    required = " and ".join(f"`{t.replace(' | ', '` or `')}`" for t in terms if not t.startswith("not "))
    barred = " or ".join(f"`{t.removeprefix('not ')}`" for t in terms if t.startswith("not "))
    return " ".join(part for part in (required or "calls", f"without {barred}" if barred else "") if part)


def _terms(conditions: str) -> list[str]:
    return [part.strip() for part in conditions.split("&")]


def _named(term: str) -> str:
    return term.removeprefix("not ").partition(":")[0].strip()


def _name(factor: str) -> str:
    return factor.split()[-1]


def _is_met(term: str, args: Mapping[str, Any]) -> bool:
    if operator := _COMPARED.search(term):
        left, right = (_number(side, args) for side in (term[: operator.start()], term[operator.end() :]))
        return {"<": left < right, ">": left > right, "!=": left != right}[operator[1]]
    return not is_met(term.removeprefix("not "), args) if term.startswith("not ") else is_met(term, args)


def _number(side: str, args: Mapping[str, Any]) -> float:
    return prod(_count_factor(f.split(), args) for f in side.split("*"))


def _count_factor(words: Sequence[str], args: Mapping[str, Any]) -> float:
    """Of `3`, `100%`, `clients`, or `count ranks`: how many there are, one where it is no list."""
    name = words[-1]
    if not name.isidentifier():
        return float(name.removesuffix("%")) / (100 if name.endswith("%") else 1)
    value = args[name]
    if len(words) > 1:
        values = value if isinstance(value, (list, tuple)) else [value]
        value = _OF_LISTS[words[0]]([_plain(v) for v in values])
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, (Bytes, Duration)):
        return inf  # nobody knows yet what share of the whole that is
    return value.value if isinstance(value, Ratio) else value
