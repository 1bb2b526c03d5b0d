"""Typed values as recipe text: `85% of channels`, `24GiB`, `"*.mlp" - "layers.0.*"`, `perplexity(calib)`."""

from collections.abc import Callable
from typing import Any

from .recipe import Bound
from .units import BYTES, DURATIONS, parse_times_power_of_ten
from .values import Bytes, DataRef, Duration, MetricRef, ModelRef, ProfileRef, Range, Ratio, Selector, Shares, StepRef


def value_text(value: Any) -> str:
    """The text that a recipe would say it with; an absent value is `none`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return shortest_decimal(value)
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(value_text(v) for v in value)}]"
    return _FORMATTERS[type(value)](value)


def plain_value_text(value: Any) -> str:
    """Like `value_text`, but words of a choice stand without quotes."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(plain_value_text(v) for v in value)}]"
    return value if isinstance(value, str) and value.isidentifier() else value_text(value)


def shortest_decimal(value: float) -> str:
    """Shortest decimal that reads back as the same number, without a trailing `.0`."""
    text = repr(round(value, 12) if abs(value) > 1e-6 else value)
    return text[:-2] if text.endswith(".0") else text


def percent_text(share: float) -> str:
    """`85%`, with one digit after the point where it needs one: `87.5%`, `83.3%`."""
    return f"{shortest_decimal(round(share * 100, 1))}%"


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t") + '"'


def _ratio_text(ratio: Ratio) -> str:
    percent = parse_times_power_of_ten(repr(ratio.value), 2)
    return f"{shortest_decimal(round(percent, 10))}%" + (f" of {ratio.of}" if ratio.of else "")


def _bytes_text(size: Bytes) -> str:
    """In the unit that gives the shortest whole number; binary units and large ones first among equals."""
    units = ("TiB", "GiB", "MiB", "KiB", "TB", "GB", "MB", "KB")
    whole = [f"{size.value // BYTES[unit]}{unit}" for unit in units if size.value and size.value % BYTES[unit] == 0]
    return min(whole, key=lambda text: len(text.rstrip("TGMKiB")), default=f"{shortest_decimal(size.value / 1024)}KiB")


def _duration_text(duration: Duration) -> str:
    seconds = duration.seconds
    unit = "s"
    for name in ("d", "h", "min"):
        if seconds and seconds % DURATIONS[name] == 0:
            unit = name
            break
    else:
        unit = next((u for u in ("s", "ms", "us") if seconds >= DURATIONS[u]), "ns" if seconds else "s")
    return shortest_decimal(round(seconds / DURATIONS[unit], 9)) + unit


def _selector_text(selector: Selector) -> str:
    (_, first), *remainder = selector.terms
    text = quoted(first) + "".join(f" {op} {quoted(glob)}" for op, glob in remainder)
    return text + (" allow empty" if selector.allow_empty else "")


def _metric_text(metric: MetricRef) -> str:
    """Handles stand without their name: `perplexity(heldout)`, `decode.p50(tokens: 64)`."""
    args = [value_text(v) if isinstance(v, DataRef) else f"{name}: {plain_value_text(v)}" for name, v in metric.args]
    return f"{metric.name}({', '.join(args)})" if args else metric.name


_FORMATTERS: dict[type, Callable[[Any], str]] = {
    Ratio: _ratio_text,
    Bytes: _bytes_text,
    Duration: _duration_text,
    Range: lambda r: f"{value_text(r.low)}..{value_text(r.high)}",
    Selector: _selector_text,
    Shares: lambda shares: f"{{{', '.join(f'{name}: {shortest_decimal(part)}' for name, part in shares.parts)}}}",
    DataRef: lambda ref: ref.name,
    ModelRef: lambda ref: ref.name,
    ProfileRef: lambda ref: ref.name,
    StepRef: lambda ref: ref.name,
    MetricRef: _metric_text,
}


def bound_text(bound: Bound) -> str:
    """A bound as it was written."""
    if bound.span:
        return " ".join(bound.span.text.split())
    limit = value_text(bound.limit)
    factor = f"{limit} * {bound.baseline}" if bound.baseline else limit
    where = f" on {bound.profile}" if bound.profile else ""
    sure = f" with {100 * bound.confidence:g}% confidence" if bound.confidence is not None else ""
    return f"{value_text(bound.metric)} {bound.op} {factor}{where}{sure}"
