"""Lists as parameters ask for them: enough items, none twice, falling from one to the next, from the whole."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from ..syntax import ast
from ..syntax.diagnostics import Diagnostic, Fault, Fix
from .units import comparable_number
from .value_text import plain_value_text, value_text
from .values import Ratio
from .vocabulary import Param

too_few_items = Fault("too-few-items", "A list has fewer items than its parameter needs.")
repeated_item = Fault("repeated-item", "A list whose items are to differ names one of them twice.")
rising_items = Fault("rising-items", "A list is to fall from each item to the next, and does not.")
partial_items = Fault("partial-items", "A list of shares is to begin with the whole, 100%, and does not.")


def keeps_list_bounds_or_report(
    expr: ast.Items, values: tuple[Any, ...], param: Param, report: Callable[[Diagnostic], None]
) -> bool:
    """Whether a list is as its parameter declares; reports the first thing that is not, at the item."""
    if len(values) < param.least:
        report(_too_few_items_diagnostic(expr, values, param))
        return False
    for i, value in enumerate(values):
        if param.distinct and value in values[:i]:
            first = expr.items[values.index(value)].span
            report(
                repeated_item(
                    f"`{plain_value_text(value)}` stands twice in `{param.name}`",
                    expr.items[i].span,
                    related=((first, "the first"),),
                    help="drop one of them, or name another",
                )
            )
            return False
    if (param.falling or param.starts_full) and any(
        comparable_number(b) >= comparable_number(a) for a, b in pairwise(values)
    ):
        fallen = sorted(set(values), key=comparable_number, reverse=True)
        help_text = f"write `{param.name}: {value_text(tuple(fallen))}`" if len(fallen) > 1 else ""
        offer = Fix(expr.span, value_text(tuple(fallen))) if help_text else None
        message = f"`{param.name}` does not fall from each item to the next"
        report(rising_items(message, expr.span, help=help_text, offer=offer))
        return False
    if param.starts_full and values and values[0].value != 1.0:
        proper = [value for value in values if 0 < value.value < 1]
        right = value_text((Ratio(1.0), *proper))
        message = f"`{param.name}` begins with {value_text(values[0])}, not with 100%"
        help_text, offer = (f"write `{param.name}: {right}`", Fix(expr.span, right)) if proper else ("", None)
        report(partial_items(message, expr.items[0].span, help=help_text, offer=offer))
        return False
    return True


def _too_few_items_diagnostic(expr: ast.Items, values: tuple[Any, ...], param: Param) -> Diagnostic:
    noun = _item_noun(param)
    count = f"{len(values)} {noun}{'' if len(values) == 1 else 's'}" if values else "empty"
    message = f"`{param.name}` {'has' if values else 'is'} {count}, the least is {param.least}"
    return too_few_items(message, expr.span, help=_example_list_remedy(expr, param))


def _item_noun(param: Param) -> str:
    inner = param.types[0][5:-1]
    return inner if inner in ("step", "metric", "ratio") else "item"


def _example_list_remedy(expr: ast.Items, param: Param) -> str:
    """Example of such a list."""
    samples = {
        "list[step]": f"{param.name}: [{expr.items[0].span.text if expr.items else 'slim'}, lean]",
        "list[metric]": f"{param.name}: [params]",
        "list[ratio]": f"{param.name}: [100%, 75%]",
        "list[int]": f"{param.name}: [32, 16]",
    }
    sample = samples.get(param.types[0])
    return f"write it like `{sample}`" if sample else "leave it out, or give more"
