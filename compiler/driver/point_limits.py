"""Limit for the points of a front: a measure and an amount, as command-line text."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from ...dsl.checker.units import parse_number_with_unit
from ...dsl.checker.values import Bytes, Duration
from ...dsl.syntax.diagnostics import Fault
from ..core.quantity import BYTES_PER, SECONDS_PER

unmeasured_limit = Fault(
    "unmeasured-limit", "A limit is set on what was not measured of a front's points.", exit="usage"
)
several_measures = Fault(
    "several-measures", "A limit names a metric that a front has several measures of.", exit="usage"
)
no_amount = Fault(
    "no-amount",
    "A limit has no amount that can be read.\n\n"
    "Amounts are written as tables print them or as recipes do: 36.5k, 1.6M, 7B, 24MiB, 30ms or 85%.",
    exit="usage",
)

_AMOUNT = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-zµ%]*)")
_PRINTED = {"k": "K", "G": "B", "kB": "KB", "µs": "us"}  # units as tables print them
_HELP = "write it like 36.5k, 1.6M, 24MiB, 30ms or 85%"

Measures = Mapping[str, tuple[float, str, str]]


@dataclass(frozen=True)
class Limit:
    """`metric` as the recipe writes it, or its name alone; `value` as written, "1.6M" or "30ms"."""

    metric: str
    value: str

    def is_met(self, measures: Measures) -> bool:
        return self.relative_excess(measures) <= 0

    def relative_excess(self, measures: Measures) -> float:
        """Distance of a point from the limit, as a share of it; at most 0 where it is met."""
        from .judging.gate import limit_in_unit  # which imports torch: words are checked before

        value, unit, better = measures[self.matching_measure_name(measures)]
        limit = limit_in_unit(self.parse_amount(unit), unit)
        gap = (value - limit) if better == "lower" else (limit - value)
        return gap / (abs(limit) or 1.0)

    def is_inside_interval(self, interval: tuple[float, float], unit: str) -> bool:
        """Whether it lies inside an interval of a measure in this unit."""
        from .judging.gate import limit_in_unit

        return interval[0] < limit_in_unit(self.parse_amount(unit), unit) < interval[1]

    def matching_measure_name(self, measures: Measures) -> str:
        """The measure that is meant: that of this text, else the only one of this name."""
        if self.metric in measures:
            return self.metric
        named = [m for m in measures if m.partition("(")[0] == self.metric]
        if len(named) == 1:
            return named[0]
        if named:
            raise several_measures(
                f"the front has {len(named)} measures `{self.metric}`",
                help=f"say which: --limit '{named[0]}={self.value}'; there are {', '.join(named)}",
            ).rejection()
        raise unmeasured_limit(
            f"the front has no measure `{self.metric}`", help=f"it has {', '.join(measures)}"
        ).rejection()

    def parse_amount(self, unit: str | None = None) -> Any:
        """Parsed amount, of a measure in `unit` where that is known: `512 B` are bytes of some, and 7B billions."""
        match = _AMOUNT.fullmatch(self.value.strip())
        value = parse_number_with_unit(match[1], _PRINTED.get(match[2], match[2])) if match else None
        if match and match[2] == "B" and unit in BYTES_PER:
            value = Bytes(int(float(match[1])))
        plain = value.value if isinstance(value, Bytes) else value.seconds if isinstance(value, Duration) else value
        other = unit is not None and (
            (isinstance(value, Duration) and unit not in SECONDS_PER)
            or (isinstance(value, Bytes) and unit not in BYTES_PER)
        )
        if value is None or other or (isinstance(plain, float) and not isfinite(plain)):
            raise no_amount(f"`{self.value}` is no amount of `{self.metric}`", help=_HELP).rejection()
        return value


def parse_limits(texts: list[str]) -> tuple[Limit, ...]:
    """Limits of METRIC=VALUE, each with an amount that can be read."""
    result = []
    for text in texts:
        metric, _, value = text.rpartition("=")
        if not metric:
            raise no_amount(f"`{text}` sets no limit", help="write METRIC=VALUE: params=1.6M").rejection()
        result.append(Limit(metric.strip(), value))
        result[-1].parse_amount()
    return tuple(result)


def split_limit_texts(text: str) -> list[str]:
    """The limits of "params=1.6M,bytes=6MiB"; commas in a metric's brackets part nothing."""
    return re.split(r",(?![^(]*\))", text)
