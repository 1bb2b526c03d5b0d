"""Names of modules in an adapter's config, matched as peft does, by regular expressions that can't run for long."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

MAX_EXPRESSIONS = 256  # of a config
_PLAIN = re.compile(r"[\w.]+")
# No group, and no repetition but one `.*`: what remains is tried in steps as many as the square of a path's length.
_BOUNDED = re.compile(r"(?:[\w.^$|-]|\\[.dw]|\[[\w-]+\])*")
_LAYER = re.compile(r".*?\.[^.]*\.(\d{1,9})\.")


class UnreadPattern(ValueError):
    """A pattern that is not tried."""


class ModulePatterns:
    """Values by names: ends of modules' paths, or expressions. The first that matches a path has its value.

    Raises UnreadPattern for an expression that could run for long, or more than 256.
    Source: peft's `get_pattern_key`.
    """

    def __init__(self, value_by_pattern: Mapping[str, Any]):
        self._values = list(value_by_pattern.values())
        self._plain = {key: order for order, key in enumerate(value_by_pattern) if _PLAIN.fullmatch(key)}
        expressions = [(order, key) for order, key in enumerate(value_by_pattern) if key not in self._plain]
        if len(expressions) > MAX_EXPRESSIONS:
            raise UnreadPattern(f"{len(expressions)} expressions, more than {MAX_EXPRESSIONS}")
        self._expressions = [(order, compile_bounded(r"(.*\.)?({})$", key)) for order, key in expressions]

    def value_for_path(self, path: str, default: Any) -> Any:
        orders = [self._plain[end] for end in dotted_suffixes(path) if end in self._plain]
        orders += [order for order, expression in self._expressions if expression.match(path)]
        return self._values[min(orders)] if orders else default


def compile_bounded(template: str, expression: str) -> "re.Pattern[str]":
    """An expression in its frame. Raises UnreadPattern."""
    if len(expression) > 200 or not _BOUNDED.fullmatch(expression.replace(".*", "", 1)):
        raise UnreadPattern(f"`{expression:.80}`")
    try:
        return re.compile(template.replace("{}", expression))
    except re.error as error:
        raise UnreadPattern(f"`{expression:.80}`") from error


def paths_not_targeted(paths: Iterable[str], target_modules: list[str] | str) -> list[str]:
    """Paths that `target_modules` doesn't name: names are paths or their ends, a text is one expression, "all-linear"
    is all. An expression that could run for long is not tried, and counts as one that matches."""
    if not isinstance(target_modules, str):
        return [path for path in paths if set(target_modules).isdisjoint(dotted_suffixes(path))]
    try:
        expression = compile_bounded("(?:{})", target_modules)
    except UnreadPattern:
        return []
    return [] if target_modules == "all-linear" else [path for path in paths if not expression.fullmatch(path)]


def excluding_config_field(module_paths: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """The field by which a config leaves out a module of these, and None where it leaves out none.

    `exclude_modules` is names or an expression, `layers_to_transform` numbers of layers. An expression that could run
    for long is not tried.
    """
    named, layers, pattern = (config.get(n) for n in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    module_paths = list(module_paths)
    if isinstance(named, str) and named:
        try:
            expression = compile_bounded("(?:{})", named)
        except UnreadPattern:
            return None
        if any(expression.fullmatch(path) for path in module_paths):
            return "exclude_modules"
    if isinstance(named, list):
        names = {name for name in named if isinstance(name, str)}
        if any(not names.isdisjoint(dotted_suffixes(path)) for path in module_paths):
            return "exclude_modules"
    if layers is None or layers == [] or pattern:
        return None
    kept = {number for number in (layers if isinstance(layers, list) else [layers]) if type(number) is int}
    numbers = [int(match[1]) if (match := _LAYER.match(path)) else None for path in module_paths]
    return "layers_to_transform" if any(number not in kept for number in numbers) else None


def dotted_suffixes(path: str) -> list[str]:
    """A path, and what is left of it behind each of its dots."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
