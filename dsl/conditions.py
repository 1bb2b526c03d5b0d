"""Conditions in headers: what a pass makes or gives, and what a target refuses, may depend on its arguments."""

from collections.abc import Mapping
from typing import Any

from .show import plain


def holds(condition: str, args: Mapping[str, Any]) -> bool:
    """Whether arguments meet a condition: "" always, "score" where it is given, "unit: branch" by value."""
    if not condition:
        return True
    name, colon, wanted = condition.partition(":")
    value = args.get(name.strip())
    return plain(value) == wanted.strip() if colon else value not in (None, False)


def meets(conditions: str, args: Mapping[str, Any]) -> bool:
    """Whether arguments meet all of `strategy: ffa & not trains: lora`."""
    return all(
        not holds(term.removeprefix("not "), args) if term.startswith("not ") else holds(term, args)
        for term in (part.strip() for part in conditions.split("&"))
    )


def named_in(conditions: str) -> list[str]:
    """The parameters that conditions are about, in their order."""
    return [part.strip().removeprefix("not ").partition(":")[0].strip() for part in conditions.split("&")]
