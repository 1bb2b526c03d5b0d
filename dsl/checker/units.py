"""Units of numbers: what `85%`, `24GiB`, `30ms` and `0.8B` stand for."""

from math import isfinite
from typing import Any

from .values import Bytes, Duration, Ratio

COUNTS = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}  # powers of ten
BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
DURATIONS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
# as people spell them; a remedy has the unit in place of it
SPOKEN_DURATIONS = {
    spelling: unit
    for unit, spellings in {
        "s": ("sec", "secs", "second", "seconds"),
        "min": ("mins", "minute", "minutes"),
        "h": ("hr", "hrs", "hour", "hours"),
        "d": ("day", "days"),
    }.items()
    for spelling in spellings
}
ALL = ("%", *[u for u in COUNTS if u], *BYTES, *DURATIONS)


def parse_number_with_unit(digits: str, unit: str) -> Any:
    """The value of a number as written: int, float, Ratio, Bytes or Duration; None for an unknown unit.

    Powers of ten move into the exponent: 0.7% and 0.1B are the nearest floats, not a rounded product.
    """
    if unit == "%":
        return Ratio(parse_times_power_of_ten(digits, -2))
    if unit in COUNTS:
        if digits.lstrip("+-").isdigit():
            return int(digits) * 10 ** COUNTS[unit]
        value = parse_times_power_of_ten(digits, COUNTS[unit])
        return int(value) if unit and value.is_integer() else value
    if unit in BYTES:
        size = float(digits) * BYTES[unit]
        return Bytes(round(size) if isfinite(size) else size)  # type: ignore[arg-type] # the caller refuses infinity
    if unit in DURATIONS:
        return Duration(float(digits) * DURATIONS[unit])
    return None


def parse_times_power_of_ten(digits: str, power: int) -> float:
    mantissa, _, exponent = digits.lower().partition("e")
    return float(f"{mantissa}e{int(exponent or 0) + power}")


def comparable_number(value: Any) -> float:
    """The number that bounds compare: a share, bytes, seconds or the number itself."""
    if isinstance(value, (Ratio, Bytes)):
        return value.value
    return value.seconds if isinstance(value, Duration) else value
