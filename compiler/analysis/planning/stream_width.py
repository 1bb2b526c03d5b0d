"""Width of the residual stream: the skeleton with fewer of its channels, and how many fit a share of the model."""

import math
from collections.abc import Iterator
from dataclasses import replace

from ....dsl.checker.skeleton import Group, Member, Part, Skeleton
from ....dsl.syntax.diagnostics import Diagnostic, Fault
from . import shrink
from .amount import Amount

fixed_width = Fault(
    "fixed-width",
    "The residual stream of a model can't be narrowed.\n\n"
    "Every layer reads it and adds to it, so a channel goes from all of them at once. It stays where a layer does "
    "something with it that effc doesn't know, where layers have streams of several widths, or where the model returns "
    "it, as one without a head does.",
)

too_narrow = Fault("too-narrow", "A share of the parameters leaves the residual stream less than one step of `align`.")


def require_stream(skeleton: Skeleton) -> Group:
    """The stream's channels; Reject (fixed-width), with the reason, where they can't go."""
    if skeleton.stream is None:
        reason = skeleton.facts.get("fixed_stream") or "a step before has changed what reads it"
        raise fixed_stream(skeleton.model_type, reason).rejection()
    return skeleton.stream


def fixed_stream(model: str, reason: str) -> Diagnostic:
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


def remaining_width(skeleton: Skeleton, amount: Amount, align: int) -> int:
    """Channels of the stream that stay: of a share of the parameters the most, in steps of `align`, that fit."""
    stream = require_stream(skeleton)
    step = math.lcm(align, stream.multiple)
    if amount.of != "params":
        return amount.remaining_count(stream.count, step)
    full = shrink.params(skeleton)
    limit = amount.remaining_count(full)
    widths = range(stream.count // step * step, 0, -step)
    fits = next((n for n in widths if shrink.params(with_stream_width(skeleton, n)) <= limit), None)
    if fits is None:
        least = shrink.params(with_stream_width(skeleton, min(step, stream.count)))
        raise too_narrow(
            f"{limit / full:.1%} of params are to stay, and a stream of {step} channels keeps {least / full:.1%}",
            help=f"keep at least {math.ceil(1000 * least / full) / 10:g}% of params, or let `align` be less",
            argument="keep",
        ).rejection()
    return fits
