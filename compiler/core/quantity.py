"""Numbers as a person would write them: `134.5 M`, `23.4 MB`, `1.2 s`."""

import math

_LARGE = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BYTES = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
SECONDS_PER = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "min": 60.0, "h": 3600.0}
BYTES_PER = {
    "B": 1,
    "byte": 1,
    "bytes": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "kB": 1000,
    "MB": 10**6,
    "GB": 10**9,
}


def significant_digits(value: float, figures: int = 4) -> str:
    """Format a number with at most `figures` significant digits, no exponent between 1e-4 and 1e6, integers whole."""
    if isinstance(value, bool) or not math.isfinite(value):
        return str(value).lower()
    if float(value).is_integer() and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.{figures}g}" if abs(value) < 1e6 else f"{value:.{figures - 1}e}"


def si_count(value: float) -> str:
    """`134.5 M` for 134515008; small whole numbers as they are."""
    for scale, letter in _LARGE:
        if abs(value) >= scale and (scale > 1e3 or abs(value) >= 1e4):
            return f"{value / scale:.{_num_decimals(value / scale)}f} {letter}"
    return significant_digits(value)


def signed_count(value: float) -> str:
    """A count that something moved by: `-3.10 M`, `+512`."""
    return f"{'+' if value > 0 else ''}{si_count(value)}"


def size_text(num_bytes: float) -> str:
    """Bytes in binary units: `256.6 MiB`."""
    for scale, name in _BYTES:
        if abs(num_bytes) >= scale:
            return f"{num_bytes / scale:.{_num_decimals(num_bytes / scale)}f} {name}"
    return f"{num_bytes:.0f} B"


def duration_text(seconds: float) -> str:
    """`0.8 ms`, `1.24 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds == 0:
        return "0 s"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.{1 if seconds < 0.1 else 0}f} ms"
    if seconds < 60:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    rounded = round(seconds)
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60} min"


def with_article(noun: str) -> str:
    """`an int`, `a list`."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def measurement_text(value: float, unit: str = "") -> str:
    """A metric's value with its unit."""
    if not math.isfinite(value):
        return significant_digits(value)
    if unit in SECONDS_PER:
        return duration_text(value * SECONDS_PER[unit])
    if unit in BYTES_PER:
        return size_text(value * BYTES_PER[unit])
    if unit in ("params", "parameters", "", "FLOP", "FLOPs") and abs(value) >= 1e4:
        return f"{si_count(value)} {unit}".rstrip() if unit.startswith("FLOP") else si_count(value)
    if unit == "%":
        return f"{significant_digits(value)}%"
    return f"{significant_digits(value)} {unit}".rstrip()


def distinguishable_value_texts(first_value: float, second_value: float, unit: str = "") -> tuple[str, str]:
    """Format two values of a metric with as many digits as tell them apart: `1,542,273` and `1,542,272`."""
    short = measurement_text(first_value, unit), measurement_text(second_value, unit)
    if short[0] != short[1] or first_value == second_value:
        return short
    texts = [f"{v:,.0f}" if float(v).is_integer() else f"{v:.12g}" for v in (first_value, second_value)]
    behind = "" if unit in ("params", "parameters") else f" {unit}".rstrip()
    return f"{texts[0]}{behind}", f"{texts[1]}{behind}"


def interval_text(value: float, interval: tuple[float, float]) -> str:
    """`0.97 (0.90 to 1.02)`, with the decimals of `range_text`."""
    low, high = interval
    if low == high:
        return significant_digits(value)
    return f"{value:.{_num_interval_decimals(low, high)}f} ({range_text(low, high)})"


def range_text(low: float, high: float) -> str:
    """`0.90 to 1.02`: as many decimals as give the width two digits."""
    decimals = _num_interval_decimals(low, high)
    return f"{low:.{decimals}f} to {high:.{decimals}f}"


def _num_interval_decimals(low: float, high: float) -> int:
    return min(max(1 - math.floor(math.log10(abs(high - low) or 1.0)), 0), 8)


def change_text(before: float, after: float) -> str:
    """`-20.4 %`, `+3.0 %`, `same`."""
    if before == after:
        return "same"
    if not before or not math.isfinite(before) or not math.isfinite(after):
        return ""
    share = 100 * (after / before - 1)
    return f"{share:+.{0 if abs(share) >= 100 else 1}f} %"


def count_text(count: int, noun: str) -> str:
    """`1 step`, `3 steps`."""
    return f"{count} {noun if count == 1 else noun + 's'}"


def _num_decimals(value: float) -> int:
    return 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2
