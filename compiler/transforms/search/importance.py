"""Importance of each item of a group: by weights, and by activations.

Large sums run on the device of the weights; scores of items are on the CPU.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ....dsl.checker.skeleton import Group, Member
from ...analysis.discovery.discover import skeleton_of
from ...ir.surgery import tensor_at
from .reconstruct import (
    DAMPING,
    Moments,
    as_matrix,
    damped_cholesky_factor,
    exact_device,
    has_moments,
    input_columns_of_items,
    module_of,
    readers,
)

if TYPE_CHECKING:
    from ...ir.program import Program

BATCH_ROWS = (
    4096  # inputs that make up for each other in `obs_importance`: a factor of all takes time by the cube of the width
)


def l1_importance(program: "Program", group: Group) -> torch.Tensor:
    """Sum of magnitudes of the weights that make an item's channels; [count] float64.

    The weights that read them are left out, but whole experts are what their weights are. Rows of k and v count once
    for each query head that they serve: q + n k + n v of a KV head with n of them.
    Source: MultiPruner's weight reorder (Munoz et al. 2025), gate and up rows per channel, q, k and v rows per head.
    """
    total = torch.zeros(group.count, dtype=torch.float64)
    writers = group.members[: len(group.members) - group.readers]
    served, once = _query_heads_per_kv_and_row_starts(program, group)
    for member in readers(group) if group.kind == "experts" else writers:
        tensor = tensor_at(program.model, member.tensor)
        if isinstance(tensor, nn.Parameter):  # a buffer only follows
            sums = _per_index(tensor.detach().abs(), member.axis)
            for segment in member.segments:
                times = 1 if (member.tensor, member.axis, segment[0]) in once else served
                total += times * _per_item(sums, (segment,), group.count)
    return total


def _query_heads_per_kv_and_row_starts(program: "Program", group: Group) -> tuple[int, set[tuple[str, int, int]]]:
    """Number of query heads per KV head, and the starts (tensor, axis, start) of the query heads' rows."""
    if group.kind != "kv_heads":
        return 1, set()
    heads = next((g for g in skeleton_of(program).groups if (g.site, g.kind) == (group.site, "heads")), None)
    if heads is None:
        return 1, set()
    return heads.per_block, {(m.tensor, m.axis, start) for m in heads.members for start, _ in m.segments}


def wanda_importance(program: "Program", group: Group, moments: Moments) -> torch.Tensor:
    """Magnitudes of the weights that read an item, each times the norm of what it reads; [count] float64.

    Where only grouped convolutions or experts read it, by weights alone, as `l1_importance`.
    Source: Wanda (Sun et al. 2023, arXiv 2306.11695), section 3, summed per input channel.
    """
    total = torch.zeros(group.count, dtype=torch.float64)
    if not any(has_moments(program.model, member) for member in readers(group)):
        return l1_importance(program, group)
    for member in readers(group):
        norms = moments.load_input_norms(module_of(member))
        if norms is not None:
            tensor = as_matrix(program.model.get_parameter(member.tensor).detach(), member)
            scores = tensor.abs().sum(0).cpu().double() * norms
            total += _per_item(
                scores.view(-1, len(norms) // _axis_length(program, member)).sum(1), member.segments, group.count
            )
    return total


def obs_importance(program: "Program", group: Group, moments: Moments, damping_share: float = DAMPING) -> torch.Tensor:
    """Squared error of the readers' outputs when an item goes and the others make up for it; [count] float64.

    Where only grouped convolutions or experts read it, by weights alone, as `l1_importance`.
    With P the inverse of the damped second moments and D an item's channels: the trace of W_D P_DD^-1 W_D^T. A reader
    of more than TOGETHER inputs is taken apart, and an item's error is what its own part can't make up for.
    Source: Optimal Brain Surgeon (Hassibi and Stork 1993) in groups, as in ZipLM (Kurtic et al. 2023,
    arXiv 2302.04089), section 3.1; the parts are ours.
    """
    total = torch.zeros(group.count, dtype=torch.float64)
    if not any(has_moments(program.model, member) for member in readers(group)):
        return l1_importance(program, group)
    for member in readers(group):
        moment = moments.load_moment(module_of(member))
        if moment is None:
            continue
        weight = program.model.get_parameter(member.tensor).detach()
        moment, columns_of = (
            moment.to(exact_device(weight)),
            [input_columns_of_items(weight, member, [i]) for i in range(group.count)],
        )
        if len(moment) <= BATCH_ROWS:
            total += _removal_errors(weight, member, moment, columns_of, range(len(moment)), damping_share)
            continue
        for part in torch.arange(group.count).tensor_split(min(group.count, input_block_count(len(moment)))):
            part_columns = [columns_of[i] for i in part.tolist()]
            total[part] += _removal_errors(
                weight,
                member,
                moment,
                part_columns,
                [i for item_columns in part_columns for i in item_columns],
                damping_share,
            )
    return total


def input_block_count(input_count: int) -> int:
    """Number of blocks of a reader's inputs for `obs_importance`."""
    return math.ceil(input_count / BATCH_ROWS)


def _removal_errors(
    weight: torch.Tensor,
    member: Member,
    input_gram: torch.Tensor,
    columns_by_item: Sequence[Sequence[int]],
    fitted_columns: Sequence[int],
    damping_share: float,
) -> torch.Tensor:
    """[items] float64 on the CPU: what is lost with each item's inputs where the others of `fitted_columns` make up for
    it."""
    lower = damped_cholesky_factor(input_gram, fitted_columns, damping_share)
    inverse = torch.cholesky_inverse(lower, out=lower)
    index = torch.tensor(columns_by_item, device=input_gram.device)  # [items, size]
    where = torch.empty(len(input_gram), dtype=torch.int64, device=input_gram.device)
    where[torch.tensor(fitted_columns, device=input_gram.device)] = torch.arange(
        len(fitted_columns), device=input_gram.device
    )
    at = where[index]
    blocks = inverse[at[:, :, None], at[:, None, :]]  # [items, size, size]
    item_weights = (
        as_matrix(weight, member).to(input_gram.device)[:, index].double().permute(1, 2, 0)
    )  # [items, size, out]
    # one by one: MKL's LU of many matrices of 150 rows and more fails or hangs with several threads
    errors = [(rows * torch.linalg.solve(block, rows)).sum() for block, rows in zip(blocks, item_weights, strict=True)]
    return torch.stack(errors).cpu()


def _axis_length(program: "Program", member: Member) -> int:
    return program.model.get_parameter(member.tensor).shape[member.axis]


def ascending_indices(scores: torch.Tensor) -> list[int]:
    """Items from the least to the most important; equal ones by index."""
    return torch.sort(scores, stable=True).indices.tolist()


def _per_index(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """Sums over all other axes, [tensor.shape[axis]] float64 on the CPU."""
    return tensor.transpose(0, axis).reshape(tensor.shape[axis], -1).sum(1).cpu().double()


def _per_item(sums: torch.Tensor, segments: Sequence[tuple[int, int]], count: int) -> torch.Tensor:
    """[count]: what the indices of each item add up to."""
    total = torch.zeros(count, dtype=torch.float64)
    for start, size in segments:
        total += sums[start : start + count * size].reshape(count, size).sum(1)
    return total
