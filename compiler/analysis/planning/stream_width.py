"""Width of the residual stream: the skeleton with fewer of its channels, and how many fit a share of the model."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace

from ....dsl.checker.skeleton import Group, Member, Part, Skeleton
from ....dsl.checker.value_text import value_text
from ....dsl.checker.values import Ratio
from ....dsl.syntax.diagnostics import Diagnostic, Fault
from ...core.quantity import count_text
from . import shrink
from .amount import SPARE, overshoots

fixed_width = Fault(
    "fixed-width",
    "The residual stream of a model can't be narrowed.\n\n"
    "Every layer reads it and adds to it, so a channel goes from all of them at once. It stays where a layer does "
    "something with it that effc doesn't know, where layers have streams of several widths, or where the model returns "
    "it, as one without a head does.",
)

too_narrow = Fault("too-narrow", "A share leaves the residual stream less than one step of `align`.")


def require_stream(skeleton: Skeleton) -> Group:
    """The stream's channels; Reject (fixed-width), with the reason, where they can't go."""
    if skeleton.stream is None:
        reason = skeleton.facts.get("fixed_stream") or "a step before has changed what reads it"
        raise fixed_stream_diagnostic(skeleton.model_type, reason).rejection()
    return skeleton.stream


def fixed_stream_diagnostic(model: str, reason: str) -> Diagnostic:
    return fixed_width(
        f"the residual stream of {model} keeps its width: {reason}",
        help="narrow what is inside of layers: `prune.channels`, `prune.heads`, `prune.multi`",
    )


def with_stream_width(skeleton: Skeleton, count: int) -> Skeleton:
    """The skeleton when the stream keeps `count` of its channels; tied tensors follow."""
    stream = require_stream(skeleton)
    removed = stream.count - count
    first = {name: same[0] for same in skeleton.tied for name in same}
    gone = {(m.tensor, m.axis): removed * sum(size for _, size in m.segments) for m in stream.members}

    def narrowed(part: Part) -> Part:
        named = [(name, shape, f"{part.path}.{name}".lstrip(".")) for name, shape in part.tensors]
        return replace(
            part,
            tensors=tuple(
                (name, tuple(n - gone.get((first.get(full, full), axis), 0) for axis, n in enumerate(shape)))
                for name, shape, full in named
            ),
        )

    return replace(
        skeleton,
        parts=tuple(map(narrowed, skeleton.parts)),
        stream=replace(stream, count=count, members=tuple(_members_after(stream, removed))),
        facts={**skeleton.facts, "hidden": count},
    )


def _members_after(stream: Group, removed: int) -> Iterator[Member]:
    for member in stream.members:
        segments = [
            (start - removed * sum(size for other, size in member.segments if other < start), size)
            for start, size in member.segments
        ]
        yield replace(member, segments=tuple(segments))


def remaining_width(skeleton: Skeleton, keep: Ratio, align: int) -> int:
    """Channels of the stream that stay: the most, in steps of `align`, that are no more than the share.

    Raises Reject (too-narrow, overshoots) where none are, or where far more would go than the share says.
    """
    stream = require_stream(skeleton)
    width = _max_width_within(skeleton, keep, align)
    if width is None:
        step = min(math.lcm(align, stream.multiple), stream.count)
        least = _share_at_width(skeleton, step, keep.of)
        raise too_narrow(
            f"`keep: {value_text(keep)}` is less than one step, and a stream of {count_text(step, 'channel')} keeps "
            f"{least:.1%}",
            help=f"keep at least {_percent_rounded_up(least)}" + (", or let `align` be less" if align > 1 else ""),
            argument="keep",
        ).rejection()
    left = _share_at_width(skeleton, width, keep.of)
    if _is_far_below(left, keep):
        finer = next((n for n in range(align - 1, 0, -1) if align % n == 0 and _is_near(skeleton, keep, n)), None)
        raise overshoots(
            f"`keep: {value_text(keep)}` in steps of `align: {align}` leaves {width} of {stream.count} channels, "
            f"{left:.1%} of {keep.of}",
            help=(f"write `align: {finer}`, or " if finer else "write ")
            + f"`keep: {_percent_rounded_up(left)} of {keep.of}`",
            argument="keep",
        ).rejection()
    return width


def _max_width_within(skeleton: Skeleton, keep: Ratio, align: int) -> int | None:
    """The most channels, in steps of `align`, that are at most a share; None where one step is more."""
    stream = require_stream(skeleton)
    step = math.lcm(align, stream.multiple)
    limit = keep.value * (1 + 1e-9)  # 0.85 * 20 is 16.999999999999996
    widths = range(step, stream.count + 1, step)
    fitting = bisect_right(widths, limit, key=lambda width: _share_at_width(skeleton, width, keep.of))
    return widths[fitting - 1] if fitting else None


def _is_near(skeleton: Skeleton, keep: Ratio, align: int) -> bool:
    width = _max_width_within(skeleton, keep, align)
    return width is not None and not _is_far_below(_share_at_width(skeleton, width, keep.of), keep)


def _is_far_below(remaining_share: float, keep: Ratio) -> bool:
    return 1 - remaining_share > (1 + SPARE) * (1 - keep.value) + 1e-9


def _share_at_width(skeleton: Skeleton, width: int, of: str | None) -> float:
    """Share of the channels, or of the parameters, that a stream of some width keeps."""
    if of != "params":
        return width / require_stream(skeleton).count
    return shrink.param_count(with_stream_width(skeleton, width)) / shrink.param_count(skeleton)


def _percent_rounded_up(share: float) -> str:
    """The share with one digit after the point, and enough."""
    return f"{math.ceil(1000 * share - 1e-9) / 10:g}%"
