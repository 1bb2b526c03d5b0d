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
