"""Dials that discovery gives: which widths and layers of a model may be chosen, and what goes first."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from ....dsl.checker.skeleton import Branch, Group, Skeleton
from ....dsl.checker.values import Ratio, Selector
from ....dsl.syntax.diagnostics import Fault, Reject
from ...analysis.discovery.bypass import other_operand_of_join
from ...analysis.discovery.discover import skeleton_of
from ...analysis.planning.amount import Amount
from ...analysis.planning.selection import branches, layers, searchable_branch_groups_by_kind
from ..editing.dry_run import copy_on_meta, layer_needed
from ..editing.rewrite import Rewriter
from ..search.importance import ascending_indices, l1_importance
from ..search.routing import refuse_too_few_experts
from ..search.savings import step_count_of, steps_per_cut
from ..search.uniform_widths import split_cuttable_and_uncuttable
from .choices import BLOCKS, KERNEL, LAYERS, ElasticDim
from .kernels import reduced_padding_attributes
from .mixtures import EXPERTS
from .subnet_masks import can_be_masked

if TYPE_CHECKING:
    from ...ir.program import Program

one_choice = Fault(
    "one-choice",
    "A family would have one choice alone, so that there is nothing to search.\n\n"
    "The model has no part of the kinds that are asked for, or all shares come to the same number of items.",
)


def width_dims(
    groups: Sequence[Group], remaining_shares: Sequence[Ratio], shared_by: Literal["layer", "model"], align: int
) -> list[ElasticDim]:
    """A dimension for each group, or one for all groups of a size; a group in which all shares are the same has
    none."""
    sites: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for group in groups:
        values = sorted(
            {
                Amount(share).remaining_count(step_count_of(group), steps_per_cut(group, align))
                for share in remaining_shares
            },
            reverse=True,
        )
        name = f"{group.site}:{group.kind}" if shared_by == "layer" else f"{group.kind} of {step_count_of(group)}"
        if len(values) > 1:
            sites.setdefault((name, tuple(values)), []).append(group.site)
    kinds = {f"{g.site}:{g.kind}": g.kind for g in groups} | {f"{g.kind} of {step_count_of(g)}": g.kind for g in groups}
    return [ElasticDim(name, kinds[name], values, tuple(sites_of)) for (name, values), sites_of in sites.items()]


def narrowable_groups(skeleton: Skeleton, selector: Selector | None, kind: str) -> tuple[Group, ...]:
    """Groups that a family may narrow: "channels", or "heads", which are KV heads where a model has them."""
    return searchable_branch_groups_by_kind(skeleton, selector).get(kind, ())


def maskable_groups(program: "Program", groups: Sequence[Group], dims: Sequence[ElasticDim]) -> list[Group]:
    """Groups that masks can represent, and that allow the largest cut of their dimension."""
    least = {(site, d.kind): d.values[-1] for d in dims for site in d.places}
    narrow = [g for g in groups if (g.site, g.kind) in least and can_be_masked(program, g)]
    cuttable_groups, _ = split_cuttable_and_uncuttable(
        program, [(g, step_count_of(g) - least[g.site, g.kind]) for g in narrow]
    )
    return cuttable_groups


def depth_dims(program: "Program", selector: Selector | None, layers_or_blocks: str) -> list[ElasticDim]:
    """A dimension for each layer, or residual branch, that may be left out: all but the first that is selected, as long
    as the model runs without all of them together."""
    bare, skeleton, dims = copy_on_meta(program), skeleton_of(program), []
    if layers_or_blocks == LAYERS:
        for unit in reversed(layers(skeleton, selector)[1:]):
            if _try_edit_unless_layer_needed(lambda unit=unit: Rewriter(bare).drop_layer(unit)):
                dims.append(ElasticDim(f"{unit}:{LAYERS}", LAYERS, (1, 0), (unit,)))
    else:
        for branch in reversed(branches(skeleton, selector)[1:]):
            if _try_edit_unless_layer_needed(lambda branch=branch: _drop(bare, branch)):
                dims.append(ElasticDim(f"{branch.site}:{BLOCKS}", BLOCKS, (1, 0), (branch.site,)))
    return dims[::-1]


def _drop(meta_program: "Program", branch: Branch) -> None:
    """A branch alone, tried on the program as it is: what joins them changes names when another has gone."""
    trial = copy_on_meta(meta_program)
    keep = other_operand_of_join(trial.units[branch.unit].graph, branch)
    Rewriter(trial).drop_branch(branch.unit, branch.join, keep=keep)


def _try_edit_unless_layer_needed(edit: Callable[..., None]) -> bool:
    try:
        edit()
    except Reject as rejection:
        if any(d.fault is not layer_needed for d in rejection.diagnostics):
            raise
        return False
    return True


def require_larger_kernels(smaller_sizes: Sequence[int], skeleton: Skeleton, selector: Selector | None) -> None:
    """Reject (one-choice) sizes that no convolution is larger than."""
    if smaller_sizes and not sizes_of_larger_kernels(skeleton, selector, smaller_sizes):
        raise one_choice(
            f"no convolution that is selected has a square kernel larger than {smaller_sizes[-1]}",
            help="leave `kernels` out, or give smaller sizes",
            argument="kernels",
        ).rejection()


def sizes_of_larger_kernels(
    skeleton: Skeleton, selector: Selector | None, smaller_sizes: Sequence[int]
) -> dict[str, int]:
    """Convolutions with a square kernel of odd size, and that size, where it is larger than one that is asked for.

    Those that share a weight are left out.
    """
    inside = None if selector is None else {path for branch in branches(skeleton, selector) for path in branch.parts}
    tied, result = {name for names in skeleton.tied for name in names}, {}
    for part in skeleton.parts:
        shape = dict(part.tensors).get("weight", ())
        square = len(shape) == 4 and shape[2] == shape[3] and shape[2] % 2 and "Transpose" not in part.kind
        chosen = (inside is None or part.path in inside) and f"{part.path}.weight" not in tied
        if square and chosen and shape[2] > min(smaller_sizes):
            result[part.path] = shape[2]
    return result


def kernel_dims(
    program: "Program", selector: Selector | None, smaller_sizes: Sequence[int], shared_by: Literal["layer", "model"]
) -> list[ElasticDim]:
    """A dimension for each convolution whose zeros around can shrink with it, or one for all of a size."""
    sites: dict[tuple[str, int], list[str]] = {}
    for path, full_size in (
        sizes_of_larger_kernels(skeleton_of(program), selector, smaller_sizes) if smaller_sizes else {}
    ).items():
        if all(
            reduced_padding_attributes(program, path, (full_size - size) // 2) is not None
            for size in smaller_sizes
            if size < full_size
        ):
            sites.setdefault((path if shared_by == "layer" else f"of {full_size}", full_size), []).append(path)
    return [
        ElasticDim(
            f"{name}:{KERNEL}" if shared_by == "layer" else f"{KERNEL} {name}",
            KERNEL,
            (full_size, *(size for size in smaller_sizes if size < full_size)),
            tuple(paths),
        )
        for (name, full_size), paths in sites.items()
    ]


def require_enough_experts(remaining_shares: Sequence[Ratio], skeleton: Skeleton, selector: Selector | None) -> None:
    """Reject (too-few-experts) shares that would leave fewer than are chosen for a token."""
    for group in narrowable_groups(skeleton, selector, EXPERTS) if remaining_shares else ():
        left = Amount(remaining_shares[-1]).remaining_count(step_count_of(group)) * group.count // step_count_of(group)
        refuse_too_few_experts(skeleton, group, left, EXPERTS)


def items_least_important_first(
    program: "Program",
    groups: Sequence[Group],
    router_sums_by_site: Mapping[str, Tensor] = MappingProxyType({}),
    importance_of: Callable[["Program", Group], Tensor] = l1_importance,
) -> dict[str, list[int]]:
    """Order the items of every group by which a narrower choice does without first: those of least importance.

    router_sums_by_site   of layers of experts, by site: those that it has least of, instead
    """
    experts = {f"{site}:{EXPERTS}": ascending_indices(scores) for site, scores in router_sums_by_site.items()}
    unrouted = [g for g in groups if f"{g.site}:{g.kind}" not in experts]
    return {f"{g.site}:{g.kind}": ascending_indices(importance_of(program, g)) for g in unrouted} | experts


def refuse_no_depth(dims: Sequence[ElasticDim], layers_or_blocks: str) -> None:
    """Reject (one-choice) a depth that was asked for where nothing may be left out."""
    if not dims:
        other = "blocks" if layers_or_blocks == LAYERS else "none"
        raise one_choice(
            f"none of the {layers_or_blocks} that are selected may be left out: the model does not run without them",
            help=f"write `depth: {other}`",
            argument="depth",
        ).rejection()


def refuse_single_choice(dims: Sequence[ElasticDim], reason: str) -> None:
    if not dims:
        raise one_choice(
            f"nothing of the model is elastic: {reason}",
            help="ask for shares further apart, for other parts of the model, or for a smaller `align`",
        ).rejection()
