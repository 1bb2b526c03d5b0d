"""Importance of each expert of a layer: its routing weight, or its weights."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ....dsl.checker.skeleton import Group, Skeleton
from ....dsl.checker.values import DataRef
from ....dsl.syntax.diagnostics import Fault
from ...models.rows.forward import evaluating, memory_batches, outputs

if TYPE_CHECKING:
    from ...ir.program import Program
    from ...plugin.context import Context

too_few_experts = Fault("too-few-experts", "A layer would keep fewer experts than its router chooses for every token.")


def refuse_too_few_experts(skeleton: Skeleton, group: Group, remaining_count: int, argument_name: str) -> None:
    """Reject (too-few-experts) a layer that would keep so many."""
    least = skeleton.facts.get("active_experts") or 1
    if remaining_count < least:
        raise too_few_experts(
            f"{group.site} would keep {remaining_count} of {group.count} experts, and {least} are chosen for a token",
            help=f"keep at least {least / group.count:.0%} of experts",
            argument=argument_name,
        ).rejection()


def expert_count_attributes(
    program: "Program", cut_groups: Sequence[Group], all_expert_groups: Sequence[Group]
) -> Iterator[tuple[str, int]]:
    """Attributes of modules around the layers that state the number of experts, by path, and the number.

    Only where `cut_groups`, which lose the same, are all of `all_expert_groups`.
    """
    counts = {g.count for g in all_expert_groups}
    if len(counts) == 1 and len(cut_groups) == len(all_expert_groups):
        for path, module in program.model.named_modules():
            if all(g.site.startswith(f"{path}." if path else "") for g in all_expert_groups):
                yield from (
                    (f"{path}.{name}" if path else name, value)
                    for name, value in vars(module).items()
                    if type(value) is int and "expert" in name and value in counts
                )


def min_expert_count(skeleton: Skeleton) -> int:
    """Minimum number of experts of a layer, or of each group that its router compares first."""
    grouped = any(g.kind == "experts" and g.per_block for g in skeleton.groups)
    return max(skeleton.facts.get("active_experts") or 1, 2 if grouped else 1)


def sum_router_weights(
    program: "Program", ctx: "Context", data: DataRef, groups: Sequence[Group], max_rows: int | None = None
) -> dict[str, Tensor]:
    """Sum for each layer the weights that the router gave each expert over `max_rows` rows, [count] float64."""
    totals = {g.site: torch.zeros(g.count, dtype=torch.float64) for g in groups}
    handles = []
    for group in groups:
        module = program.model.get_submodule(group.members[-1].tensor.rpartition(".")[0])
        handles.append(module.register_forward_pre_hook(_make_router_weight_hook(totals[group.site]), with_kwargs=True))
    try:
        with evaluating(program.model):
            for batch in ctx.each(
                list(memory_batches(program.model, ctx.rows(data)[:max_rows])), f"routing {data.name}"
            ):
                outputs(program.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return totals


def _make_router_weight_hook(weight_sum_by_expert: Tensor) -> Callable[[nn.Module, tuple, dict], None]:
    """Hook on the inputs of experts: hidden states, and for every token the numbers chosen and their weights."""

    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        index = next(x for x in tensors if not x.is_floating_point())
        weights = next(x for x in reversed(tensors) if x.is_floating_point())  # [tokens, chosen] or [tokens, all]
        weights = weights if weights.shape == index.shape else weights.gather(1, index)
        weight_sum_by_expert.index_add_(0, index.flatten().cpu(), weights.flatten().double().cpu())

    return hook
