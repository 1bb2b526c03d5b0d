"""Values of options, read alike on the command line and from Python."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from ...dsl.checker.units import BYTES, DURATIONS
from ...dsl.syntax.diagnostics import Diagnostic, Fault, Reject

invalid_option = Fault(
    "bad-option",
    "An argument of `effc.check`, `effc.plan`, `effc.compile`, `effc.optimize` or `effc.load` means nothing there.\n\n"
    "Options are compared with what they may be before anything is read. Sizes and times may be numbers, of bytes and "
    "of seconds, or texts as on the command line: `20GiB`, `30m`.",
    exit="usage",
)

Rule = Callable[[Any], Any]
LIMIT = 2**62  # bytes, or seconds


class OptionError(ValueError):
    """A value that an option can't have: `fact` goes on after the value, `remedy` says what it can be."""

    def __init__(self, fact: str, remedy: str):
        super().__init__(f"{fact}: {remedy}")
        self.fact, self.remedy = fact, remedy


def apply_option_rules(
    options: Mapping[str, Any], rules: Mapping[str, Rule], fault: Fault = invalid_option
) -> dict[str, Any]:
    """Options as their rules read them. Raises Reject with all that can't be."""
    values, problems = {}, list[Diagnostic]()
    for name, value in options.items():
        try:
            values[name] = rules[name](value)
        except OptionError as error:
            problems.append(fault(f"`{name}={str(value)[:40]}` {error.fact}", help=error.remedy))
    if problems:
        raise Reject(*problems)
    return values


def optional_rule(rule: Rule) -> Rule:
    """Rule of an option that may be None."""
    return lambda value: None if value is None else rule(value)


def integer_rule(minimum: int, maximum: int) -> Rule:
    """Rule of whole numbers from `minimum` to `maximum`."""

    def rule(value: Any) -> int:
        number = _int_or_none(value)
        if number is None or not minimum <= number <= maximum:
            raise OptionError("is out of range", f"give a whole number from {minimum} to {maximum}")
        return number

    return rule


def share_rule(value: Any) -> float:
    """Rule of numbers from 0 to 1."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:  # a NaN is none, too
        raise OptionError("is out of range", "give a number from 0 to 1")
    return float(value)


def choice_rule(*names: str) -> Rule:
    """Rule of a few texts."""

    def rule(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise OptionError("is not known here", ", ".join(names))
        return value

    return rule


def boolean_rule(value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError("is neither True nor False", "give True or False")
    return value


def path_rule(value: Any) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise OptionError("is no path", "give a text, or a `pathlib.Path`")
    return Path(value)


def listener_rule(value: Any) -> Any:
    if not callable(value):
        raise OptionError("can't be called", "give a function of one event")
    return value


def parse_byte_count(value: Any) -> int:
    """Bytes of `20GiB`, `500MB`, `1073741824`, or of a number."""
    match = isinstance(value, str) and re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    units = {**BYTES, "": 1}
    number: float = _int_or_none(value) or 0
    if match and match[2] in units:
        number = float(match[1]) * units[match[2]]
    if not 1 <= number < LIMIT:
        raise OptionError("is no size", "write a number and a unit, such as 20GiB or 500MB")
    return int(number)


def parse_duration_with_unit(value: Any) -> float:
    """Seconds of `90s`, `30m` or `30min`, `2h`; on the command line a number alone has no meaning."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value)
    units = {**DURATIONS, "m": 60.0}
    if match and not match[2]:
        raise OptionError("has no unit", f"write {match[1]}s, {match[1]}m or {match[1]}h")
    number = float(match[1]) * units[match[2]] if match and match[2] in units else 0
    if not 0 < number < LIMIT:
        raise OptionError("is no time", "write a number and a unit, such as 90s, 30m or 2h")
    return number


def parse_seconds(value: Any) -> float:
    """Seconds of a number, or of a text as `parse_duration_with_unit` reads it."""
    if isinstance(value, str):
        return parse_duration_with_unit(value)
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0
    if not isfinite(number) or not 0 < number < LIMIT:
        raise OptionError("is no time", "give seconds, or a text such as 90s, 30m or 2h")
    return number


def text_list_option(value: Any) -> Sequence[str]:
    """Texts or paths, one at least; one alone is no list of its letters."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise OptionError("is no list", "give a list of texts")
    if not value or not all(isinstance(text, (str, Path)) and str(text) for text in value):
        raise OptionError("is no list of texts", "give a list of at least one text, none of them empty")
    return [str(text) for text in value]


MAX_WORKERS = 1024
_PORTS = range(1, 1 << 16)


def parse_worker_source(text: str) -> int | str:
    """Number of processes, or the address of a cluster, "" for a local one; reads the text alone."""
    if re.fullmatch(r"[0-9]{1,4}", text) and 1 <= int(text) <= MAX_WORKERS:
        return int(text)
    kind, colon, address = text.partition(":")
    if kind != "ray" or (colon and not address):
        fact = f"is neither a number from 1 to {MAX_WORKERS} nor a cluster"
        raise OptionError(fact, "write a number, `ray` or `ray:HOST:PORT`")
    host, _, port = address.rpartition(":")
    if address and not (host and re.fullmatch(r"[0-9]{1,5}", port) and int(port) in _PORTS):
        remedy = "write the address that `ray start --head` prints, such as ray:10.0.0.5:6379"
        raise OptionError("names no host and port", remedy)
    return address


def workers_rule(value: Any) -> str:
    """The text that `parse_worker_source` reads, also of a number; "" stands for no workers."""
    text = value if isinstance(value, str) else str(_int_or_none(value))
    if text:
        parse_worker_source(text)
    return text


def checked_device_name(value: Any) -> str:
    """Name of a device whose kind torch knows, whether there is one here or not; of "auto", the accelerator that torch
    finds here, or else the CPU."""
    if isinstance(value, str) and value == "cpu":
        return value
    import torch

    if isinstance(value, str) and value == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if accelerator is None else accelerator.type
    try:
        return str(torch.device(value))
    except (RuntimeError, TypeError) as error:
        raise OptionError("is no device that torch knows", "devices are auto, cpu, cuda, cuda:1, mps") from error


_SPLITS = {"balanced", "balanced_low_0", "sequential", "disk"}  # device maps of accelerate that spread a model


def single_device_of_map(device_map: Any) -> str:
    """Device of a `device_map` as transformers spells it, which names one here: "auto", "cuda", 0, {"": "cuda:1"}."""
    devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    numbered = (f"cuda:{d}" if isinstance(d, int) and not isinstance(d, bool) else str(d) for d in devices)
    names = sorted(set(numbered))
    if len(names) > 1 or _SPLITS.intersection(names):
        raise OptionError("splits a model", 'a model lies on one device: give "auto", "cpu", "cuda:1" or {"": 0}')
    return checked_device_name(names[0] if names else "")


def checked_float_dtype(value: Any) -> Any:
    """A dtype of torch for weights, also of its name."""
    import torch

    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise OptionError("is no dtype of weights", "give torch.float32, torch.bfloat16 or torch.float16")
    return dtype


def _int_or_none(value: Any) -> int | None:
    """A whole number, also of numpy and torch; None of others, of truth values too."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
