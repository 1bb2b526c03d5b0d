"""Sizes of a step against the widths of the modules that it works on: groups that divide inputs, ranks that fit."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..syntax.diagnostics import Diagnostic, Fault
from .pipelines import PipelineBuild, Stage
from .skeleton import Part, Skeleton
from .values import Ratio

if TYPE_CHECKING:
    from .structure import Selectable

PATTERNS = {"2:4": (2, 4), "4:8": (4, 8)}  # of so many neighbours along the inputs so many become zero: (2, 4)
SMALLEST_GROUP = 16  # that is proposed: scales of smaller ones take more than codes save, and `MatMulNBits` has none

incompatible_group = Fault(
    "unfit-group", "Groups of inputs that are to share a scale don't divide the inputs of a module."
)
incompatible_pattern = Fault(
    "unfit-pattern",
    "A pattern of zeros can't be had in a module, or not with the share of zeros that is asked for.\n\n"
    "`2:4` zeroes two of every four neighbours along the inputs and `4:8` four of eight: always a half, and of "
    "modules whose number of inputs is a multiple of four or eight.",
)
incompatible_ranks = Fault("unfit-ranks", "A rank of elastic adapters is larger than a module that it is for.")
rank_too_large = Fault("rank-too-large", "The rank of an intervention or an adapter is above what it changes.")


def report_incompatible_module_widths(
    stage: Stage, selected: "Selectable", skeleton: Skeleton, build: PipelineBuild
) -> None:
    """Report groups or a rank that modules are too narrow for; after a step that may narrow them, nothing is known."""
    facts, args = stage.word.facts, stage.call.args
    if any(
        s.word is None or s.word.facts.get("acts_on") not in ("", "linear")
        for s in build.source_chain_of(stage.name)[:-1]
    ):
        return
    group, rank = args.get(facts.get("divides", "")), args.get(facts.get("rank_param", ""))
    paths, everywhere = set(selected.paths), args.get("on") is not None
    parts = [p for p in skeleton.parts if p.path in paths and (everywhere or _is_inside_unit(p, skeleton))]
    if type(group) is int and group > 0 and (fault := group_size_diagnostic(parts, group)):
        build.report(stage, fault.at(stage.call.argument_or_call_span(facts["divides"])))
    if isinstance(group, str) and isinstance(sparsity := args.get("sparsity"), Ratio):
        for fault in sparsity_pattern_diagnostics(parts, group, sparsity, args.get("allocation", "uniform")):
            build.report(stage, fault.at(stage.call.argument_or_call_span(fault.argument)))
    if isinstance(rank, list | tuple) and rank and (fault := rank_too_large_diagnostic(parts, rank)):
        build.report(stage, fault.at(stage.call.argument_or_call_span(facts["rank_param"])))
    if type(rank) is int and (width := skeleton.facts.get("hidden")) and rank > width:
        build.report(
            stage, wide_rank_diagnostic(rank, width, "").at(stage.call.argument_or_call_span(facts["rank_param"]))
        )


def group_size_diagnostic(parts: Sequence[Part], group_size: int) -> Diagnostic | None:
    """Diagnostic for modules whose inputs a group doesn't divide."""
    misfits = [part for part in parts if group_size and in_features_of(part) % group_size]
    if not misfits:
        return None
    width = in_features_of(misfits[0])
    fits = max(
        n for n in range(1, min(group_size, width) + 1) if all(in_features_of(part) % n == 0 for part in misfits)
    )
    smaller = f"`group: {fits}`, or " if fits >= SMALLEST_GROUP else ""
    return incompatible_group(
        f"{misfits[0].path} has {width} inputs, which groups of {group_size} don't divide{_more_misfits_text(misfits)}",
        help=f"write {smaller}`group: 0` for one scale an output{_excluding_selector(misfits, parts)}",
        argument="group",
    )


def sparsity_pattern_diagnostics(
    parts: Sequence[Part], pattern: str, sparsity: Ratio, allocation: str
) -> list[Diagnostic]:
    """Diagnostics for a pattern that modules, sparsity or allocation don't allow."""
    if pattern not in PATTERNS:
        return []
    zeros, of = PATTERNS[pattern]
    implied, requested, faults = f"{100 * zeros / of:g}%", f"{100 * sparsity.value:g}%", []
    if sparsity.value != zeros / of:
        faults.append(
            incompatible_pattern(
                f'`pattern: "{pattern}"` makes {implied} of the weights zero, and {requested} are asked for',
                help=f"write `sparsity: {implied} of weights`, or `pattern: any`",
                argument="sparsity",
            )
        )
    if allocation != "uniform":
        faults.append(
            incompatible_pattern(
                f'`pattern: "{pattern}"` leaves every layer the same share of zeros, so '
                f"`allocation: {allocation}` has nothing to decide",
                help="leave `allocation` out, or write `pattern: any`",
                argument="allocation",
            )
        )
    misfits = [part for part in parts if in_features_of(part) % of]
    if misfits:
        faults.append(
            incompatible_pattern(
                f"{misfits[0].path} has {in_features_of(misfits[0])} inputs, "
                f"which groups of {of} don't divide{_more_misfits_text(misfits)}",
                help=f"write `pattern: any`{_excluding_selector(misfits, parts)}",
                argument="pattern",
            )
        )
    return faults


def _more_misfits_text(misfits: Sequence[Part]) -> str:
    return f", and {len(misfits) - 1} more are like that" if len(misfits) > 1 else ""


def _excluding_selector(misfits: Sequence[Part], parts: Sequence[Part]) -> str:
    """Selector that leaves them out: `; or leave it out: on: "layers.*" - "*.down_proj"`; "" where none is left."""
    names = list(dict.fromkeys(part.path.rpartition(".")[2] for part in misfits))
    fitting = {part.path for part in parts} - {part.path for part in misfits}
    if not fitting:
        return ""
    mixed = any(path.rpartition(".")[2] in names for path in fitting)  # one layer's is odd, another's is not
    globs = [part.path for part in misfits] if mixed else [f"*.{name}" for name in names]
    if len(globs) > 4:
        return ""
    unit = re.match(r"(.*?)\.\d+\.", misfits[0].path)
    pattern = f"{unit[1]}.*" if unit else "*"
    them = "them" if len(misfits) > 1 else "it"
    chosen = " - ".join(f'"{glob}"' for glob in (pattern, *globs))
    return f"; or leave {them} out: `on: {chosen}`"


def wide_rank_diagnostic(rank: int, width: int, subject_suffix: str) -> Diagnostic:
    return rank_too_large(
        f"`rank` is {rank}, and hidden states{subject_suffix} are {width} wide",
        help=f"at most `rank: {width}`; 4 to 32 are usual",
        argument="rank",
    )


def rank_too_large_diagnostic(parts: Sequence[Part], ranks: Sequence[int]) -> Diagnostic | None:
    """Diagnostic for modules that are narrower than the largest rank."""
    for part in parts:
        narrow = min(dict(part.tensors)["weight"])
        if narrow < max(ranks):
            return incompatible_ranks(
                f"rank {max(ranks)} is more than {part.path} has: it is {narrow} wide",
                help=f"give `ranks` of at most {narrow}, or leave it out of `on:`",
                argument="ranks",
            )
    return None


def in_features_of(part: Part) -> int:
    """Number of inputs of a linear module."""
    shape = dict(part.tensors)["weight"]
    return shape[0] if part.kind == "Conv1D" else shape[1]


def _is_inside_unit(module: Part, skeleton: Skeleton) -> bool:
    return any(module.path.startswith(f"{unit}.") for unit in skeleton.units)
