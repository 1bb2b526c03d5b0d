"""Typed values of a checked recipe. Plain data: hashable, comparable, printable, JSON both ways."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Ratio:
    """A share, 0.85 for `85%`; `of` is what it is a share of (`channels`, `params`, `weights`, `heads`)."""

    value: float
    of: str | None = None


@dataclass(frozen=True)
class Bytes:
    value: int


@dataclass(frozen=True)
class Duration:
    seconds: float


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both included."""

    low: Any
    high: Any


@dataclass(frozen=True)
class Selector:
    """Globs over module paths with set operators, as canonical text, e.g. `"*.mlp" - "layers.0.*"`."""

    terms: tuple[tuple[str, str], ...]  # (operator, glob): the first operator is "|"; applied left to right
    allow_empty: bool = False


@dataclass(frozen=True)
class Shares:
    """Shares by name, in the numbers as written; only their proportions count."""

    parts: tuple[tuple[str, float], ...]

    def share(self, name: str) -> float:
        """Share of `name` in 1; 0 where it is absent."""
        total = sum(part for _, part in self.parts)
        assert total > 0, f"nothing is shared out by {self.parts}"
        return dict(self.parts).get(name, 0.0) / total


@dataclass(frozen=True)
class DataRef:
    name: str


@dataclass(frozen=True)
class ModelRef:
    name: str


@dataclass(frozen=True)
class ProfileRef:
    name: str


@dataclass(frozen=True)
class StepRef:
    name: str


@dataclass(frozen=True)
class MetricRef:
    """A metric with its arguments: `perplexity(calib)`, `decode.p50`."""

    name: str
    args: tuple[tuple[str, Any], ...] = ()

    def get(self, name: str, default=None) -> Any:
        return dict(self.args).get(name, default)


_KINDS = {
    c.__name__: c
    for c in (Ratio, Bytes, Duration, Range, Selector, Shares, DataRef, ModelRef, ProfileRef, StepRef, MetricRef)
}


def value_to_json(value: Any) -> Any:
    """Plain JSON that tells types apart: `{"Ratio": {"value": 0.85, "of": "channels"}}`."""
    if type(value) in _KINDS.values():
        return {type(value).__name__: {f.name: value_to_json(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, (tuple, list)):
        return [value_to_json(v) for v in value]
    assert value is None or isinstance(value, (bool, int, float, str)), f"no recipe value: {value!r}"
    return value


def value_from_json(data: Any) -> Any:
    """The inverse of `value_to_json`; lists become tuples. Raises KeyError or TypeError on other data."""
    if isinstance(data, list):
        return tuple(value_from_json(v) for v in data)
    if isinstance(data, dict):
        ((name, body),) = data.items()
        return _KINDS[name](**{k: value_from_json(v) for k, v in body.items()})
    return data


def is_value_json(data: Any) -> bool:
    """Whether it is what `value_to_json` makes of a value."""
    try:
        value_from_json(data)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return True


def references_in(value: Any, reference_class: type) -> list[Any]:
    """Every handle of a class inside an argument, in order, those in a metric's own arguments included."""
    direct = [value] if isinstance(value, reference_class) else []
    if isinstance(value, MetricRef):
        return direct + references_in(dict(value.args), reference_class)
    if isinstance(value, Mapping):
        return [h for v in value.values() for h in references_in(v, reference_class)]
    if isinstance(value, (list, tuple)):
        return [h for v in value for h in references_in(v, reference_class)]
    return direct
