"""Lists as parameters ask for them: enough items, none twice, falling from one to the next, from the whole."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from ..syntax import ast
from ..syntax.diagnostics import Diagnostic, Fault, Fix
from .units import magnitude
from .value_text import plain, show
from .values import Ratio
from .vocabulary import Param

too_few_items = Fault("too-few-items", "A list has fewer items than its parameter needs.")
repeated_item = Fault("repeated-item", "A list whose items are to differ names one of them twice.")
rising_items = Fault("rising-items", "A list is to fall from each item to the next, and does not.")
partial_items = Fault("partial-items", "A list of shares is to begin with the whole, 100%, and does not.")


def items_fit(expr: ast.Items, values: tuple[Any, ...], want: Param, report: Callable[[Diagnostic], None]) -> bool:
    """Whether a list is as its parameter declares; reports the first thing that is not, at the item."""
    if len(values) < want.least:
        report(_too_few(expr, values, want))
        return False
    for i, value in enumerate(values):
        if want.distinct and value in values[:i]:
            first = expr.items[values.index(value)].span
            report(
                repeated_item(
                    f"`{plain(value)}` stands twice in `{want.name}`",
                    expr.items[i].span,
                    related=((first, "the first"),),
                    help="drop one of them, or name another",
                )
            )
            return False
    if (want.falling or want.whole) and any(magnitude(b) >= magnitude(a) for a, b in pairwise(values)):
        fallen = sorted(set(values), key=magnitude, reverse=True)
        told = f"write `{want.name}: {show(tuple(fallen))}`" if len(fallen) > 1 else ""
        offer = Fix(expr.span, show(tuple(fallen))) if told else None
        said = f"`{want.name}` does not fall from each item to the next"
        report(rising_items(said, expr.span, help=told, offer=offer))
        return False
    if want.whole and values and values[0].value != 1.0:
        rest = [value for value in values if 0 < value.value < 1]
        right = show((Ratio(1.0), *rest))
        said = f"`{want.name}` begins with {show(values[0])}, not with 100%"
        told, offer = (f"write `{want.name}: {right}`", Fix(expr.span, right)) if rest else ("", None)
        report(partial_items(said, expr.items[0].span, help=told, offer=offer))
        return False
    return True


def _too_few(expr: ast.Items, values: tuple[Any, ...], want: Param) -> Diagnostic:
    noun = _noun(want)
    count = f"{len(values)} {noun}{'' if len(values) == 1 else 's'}" if values else "empty"
    said = f"`{want.name}` {'has' if values else 'is'} {count}, the least is {want.least}"
    return too_few_items(said, expr.span, help=_more(expr, want))


def _noun(want: Param) -> str:
    inner = want.types[0][5:-1]
    return inner if inner in ("step", "metric", "ratio") else "item"


def _more(expr: ast.Items, want: Param) -> str:
    """How such a list is written."""
    samples = {
        "list[step]": f"{want.name}: [{expr.items[0].span.text if expr.items else 'slim'}, lean]",
        "list[metric]": f"{want.name}: [params]",
        "list[ratio]": f"{want.name}: [100%, 75%]",
        "list[int]": f"{want.name}: [32, 16]",
    }
    sample = samples.get(want.types[0])
    return f"write it like `{sample}`" if sample else "leave it out, or give more"
