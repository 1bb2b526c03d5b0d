"""The syntax tree: one frozen dataclass per construct, each with its span. Syntax only, nothing is resolved."""

from dataclasses import dataclass, field

from .source import Source, Span


def _span() -> Span:
    return field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Number:
    """`12`, `3e-4`, `85%`, `24GiB`, `30ms`, `0.8B`. `digits` is the number as written, `unit` what follows it."""

    digits: str
    unit: str = ""
    span: Span = _span()

    @property
    def value(self) -> float | int:
        """The bare number, the unit not applied."""
        return int(self.digits) if self.digits.lstrip("+-").replace("_", "").isdigit() else float(self.digits)


@dataclass(frozen=True)
class Text:
    value: str
    span: Span = _span()


@dataclass(frozen=True)
class Bool:
    value: bool
    span: Span = _span()


@dataclass(frozen=True)
class Name:
    """A dotted name: `calib`, `prune.blocks`, `decode.p50`."""

    path: str
    span: Span = _span()


@dataclass(frozen=True)
class Arg:
    """One argument of a call; `name` is empty for a positional one."""

    name: str
    value: "Expr"
    span: Span = _span()
    name_span: Span | None = field(default=None, compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Call:
    name: Name
    args: tuple[Arg, ...]
    span: Span = _span()


@dataclass(frozen=True)
class Items:
    """A list: `[32, 24, 16]`."""

    items: tuple["Expr", ...]
    span: Span = _span()


@dataclass(frozen=True)
class Pairs:
    """Named shares: `{blocks: 44, channels: 52, heads: 4}`."""

    entries: tuple["Entry", ...]
    span: Span = _span()


@dataclass(frozen=True)
class Interval:
    """`60%..100%`, both ends included."""

    low: "Expr"
    high: "Expr"
    span: Span = _span()


@dataclass(frozen=True)
class Of:
    """`85% of channels`, `keep of channels`."""

    amount: "Expr"
    base: Name
    span: Span = _span()


@dataclass(frozen=True)
class Combine:
    """Selectors joined by `|` (union), `-` (difference) or `&` (intersection), left to right."""

    op: str
    left: "Expr"
    right: "Expr"
    span: Span = _span()


@dataclass(frozen=True)
class AllowEmpty:
    """`"*.bias" allow empty`: a selector that may match nothing."""

    selector: "Expr"
    span: Span = _span()


Expr = Number | Text | Bool | Name | Call | Items | Pairs | Interval | Of | Combine | AllowEmpty


@dataclass(frozen=True)
class Use:
    """`use std.text`, `use "./mine.effspec" as mine`. `target` is the dotted name or the quoted path."""

    target: Name | Text
    alias: Name | None
    span: Span = _span()


@dataclass(frozen=True)
class Param:
    """`param keep: ratio = 85% in 60%..100% "share of channels"`."""

    name: Name
    type: Name
    default: Expr
    bounds: Interval | Items | None  # a range, or a list of the values allowed
    doc: Text | None
    span: Span = _span()


@dataclass(frozen=True)
class Declare:
    """`model base = hf(...)` or `data calib = text(...)`; `kind` is "model" or "data"."""

    kind: str
    name: Name
    call: Call
    span: Span = _span()


@dataclass(frozen=True)
class Entry:
    """`threads: 2` inside a profile, a matrix or named shares."""

    name: Name
    value: Expr
    span: Span = _span()


@dataclass(frozen=True)
class Profile:
    name: Name
    entries: tuple[Entry, ...]
    span: Span = _span()


@dataclass(frozen=True)
class Matrix:
    """`matrix keep: [80%, 85%]` or `matrix { keep: [...] seed: [...] }`."""

    entries: tuple[Entry, ...]
    span: Span = _span()


@dataclass(frozen=True)
class Step:
    """`thin = prune.channels(...)` inside a pipeline."""

    name: Name
    call: Call
    span: Span = _span()


@dataclass(frozen=True)
class Pipeline:
    name: Name
    model: Name
    doc: Text | None
    steps: tuple[Step, ...]
    span: Span = _span()


@dataclass(frozen=True)
class Limit:
    """`1.15 * base` (factor and baseline) or a plain value (baseline None)."""

    amount: Expr
    baseline: Name | None = None
    span: Span = _span()


@dataclass(frozen=True)
class Bound:
    """`decode.p50 <= 0.5 * base in native on zen4`; `op` is <=, <, >=, >, == or in.

    confidence   95% of `... with 95% confidence`
    """

    metric: Name | Call
    op: str
    limit: Limit
    part: Name | None
    profile: Name | None
    confidence: Number | None = None
    span: Span = _span()


@dataclass(frozen=True)
class Expect:
    pipeline: Name
    bounds: tuple[Bound, ...]
    span: Span = _span()


@dataclass(frozen=True)
class Emit:
    pipeline: Name
    targets: tuple[Call, ...]
    span: Span = _span()


Statement = Use | Param | Declare | Profile | Matrix | Pipeline | Expect | Emit


@dataclass(frozen=True)
class Comment:
    """`# text`; `own_line` is false where code stands before it on its line."""

    text: str
    own_line: bool
    span: Span = _span()


@dataclass(frozen=True)
class File:
    source: Source = field(compare=False, repr=False)
    edition: int
    doc: Text | None
    statements: tuple[Statement, ...]
    comments: tuple[Comment, ...] = field(default=(), compare=False)
