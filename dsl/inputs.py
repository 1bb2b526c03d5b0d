"""Sizes of a step against the widths of the modules that it works on: groups that divide inputs, ranks that fit."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .diagnostics import Diagnostic, Fault
from .pipelines import Line, Stage
from .skeleton import Part, Skeleton

if TYPE_CHECKING:
    from .structure import Things

unfit_group = Fault("unfit-group", "Groups of inputs that are to share a scale don't divide the inputs of a module.")
rank_too_large = Fault("rank-too-large", "An intervention has more coordinates than the hidden states are wide.")


def check_inputs(stage: Stage, chosen: "Things", skeleton: Skeleton, line: Line) -> None:
    """Report groups or a rank that modules are too narrow for; after a step that may narrow them, nothing is known."""
    facts, args = stage.word.facts, stage.call.args
    if any(s.word is None or s.word.facts.get("acts_on") not in ("", "linear") for s in line.before(stage.name)[:-1]):
        return
    group, rank = args.get(facts.get("divides", "")), args.get(facts.get("within", ""))
    if type(group) is int and group > 0:
        paths = set(chosen.paths)
        parts = [p for p in skeleton.parts if p.path in paths and (args.get("on") is not None or _inside(p, skeleton))]
        if fault := odd_groups(parts, group):
            line.report(stage, fault.at(stage.call.where(facts["divides"])))
    if type(rank) is int and (width := skeleton.facts.get("hidden")) and rank > width:
        line.report(stage, wide_rank(rank, width, "").at(stage.call.where(facts["within"])))


def odd_groups(parts: Sequence[Part], group: int) -> Diagnostic | None:
    """What is said of modules whose inputs a group doesn't divide."""
    odd = [part for part in parts if group and inputs(part) % group]
    if not odd:
        return None
    more = f", and {len(odd) - 1} more are like that" if len(odd) > 1 else ""
    width = inputs(odd[0])
    fits = max(n for n in range(1, min(group, width) + 1) if width % n == 0)
    return unfit_group(
        f"{odd[0].path} has {width} inputs, which groups of {group} don't divide{more}",
        help=f"write `group: {fits}`, `group: 0` for one scale an output, or leave it out of `on:`, as in "
        f"`* - {odd[0].path}`",
        argument="group",
    )


def wide_rank(rank: int, width: int, where: str) -> Diagnostic:
    return rank_too_large(
        f"`rank` is {rank}, and hidden states{where} are {width} wide",
        help=f"at most `rank: {width}`; 4 to 32 are usual",
        argument="rank",
    )


def inputs(part: Part) -> int:
    """How many inputs a linear module has."""
    shape = dict(part.tensors)["weight"]
    return shape[0] if part.kind == "Conv1D" else shape[1]


def _inside(part: Part, skeleton: Skeleton) -> bool:
    return any(part.path.startswith(f"{unit}.") for unit in skeleton.units)
