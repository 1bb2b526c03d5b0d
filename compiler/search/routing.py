"""How much each expert of a layer matters: what its router trusts it with, or its weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...dsl.skeleton import Group, Skeleton
from ...dsl.values import DataRef
from ..rows.forward import batches, evaluating, outputs

if TYPE_CHECKING:
    from ..ir.program import Program
    from ..words.context import Context


def least_experts(skeleton: Skeleton) -> int:
    """How many experts a layer, or each of the groups that its router compares first, can't do without."""
    grouped = any(g.kind == "experts" and g.per_block for g in skeleton.groups)
    return max(skeleton.facts.get("active_experts") or 1, 2 if grouped else 1)


def trusted(program: "Program", ctx: "Context", data: DataRef, chosen: Sequence[Group]) -> dict[str, torch.Tensor]:
    """For each layer, [count] float64: the sum of the weights that the router gave each expert."""
    totals = {g.site: torch.zeros(g.count, dtype=torch.float64) for g in chosen}
    handles = []
    for group in chosen:
        module = program.model.get_submodule(group.members[-1].tensor.rpartition(".")[0])
        handles.append(module.register_forward_pre_hook(_listener(totals[group.site]), with_kwargs=True))
    try:
        with evaluating(program.model):
            for batch in ctx.each(list(batches(program.model, ctx.rows(data))), f"routing {data.name}"):
                outputs(program.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return totals


def _listener(total: torch.Tensor):
    """What experts are called with: hidden states, and for every token the numbers chosen and their weights."""

    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        index = next(x for x in given if not x.is_floating_point())
        weights = next(x for x in reversed(given) if x.is_floating_point())  # [tokens, chosen] or [tokens, all]
        weights = weights if weights.shape == index.shape else weights.gather(1, index)
        total.index_add_(0, index.flatten().cpu(), weights.flatten().double().cpu())

    return hook
