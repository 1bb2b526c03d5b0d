"""Tables of a plan: rows that a token's id picks, and rows that its position does."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from . import calls, linears
from .plan import WeightEntry
from .plan_builder import PlanBuilder
from .rule import NodeCall
from .values import ElementwiseExpr, Positional, Rows

PROBE = 8  # ids whose rows an embedding is compared by


def lower_embedding(builder: PlanBuilder, call: NodeCall) -> Any:
    if builder.positions.uses_only_length_of_ids(call.node):
        return Positional(call.node)
    node, module, ids_value = call.node, call.module, call.first
    assert module is not None, f"{node.name} calls no module"
    table = getattr(module, "weight", None)
    if not (
        isinstance(ids_value, Rows)
        and builder.ids.are(ids_value.index)
        and isinstance(table, Tensor)
        and ids_value.index.shape == builder.shape
    ):
        reason = "an embedding of something else than token ids is not among the engine's steps"
        raise builder.rejection(node, reason)
    ids = torch.arange(min(PROBE, len(table)))
    with torch.no_grad():
        output, rows_of_table = module(ids).float(), table[ids].float()
    scale = float((output * rows_of_table).sum() / rows_of_table.square().sum()) if rows_of_table.any() else 1.0
    if not torch.allclose(output, rows_of_table * scale, rtol=2**-7, atol=1e-6):
        raise builder.rejection(node, f"a {type(module).__name__} gives something else than rows of its table")
    table = _transformed_table(builder, node, table, ids_value.pending)
    scale = next((s for s in (1.0, *_numbers(module)) if abs(s / scale - 1) < 2**-7), scale)
    entry = WeightEntry("bf16", tuple(table.shape), lambda: table.detach().bfloat16().contiguous())
    name = builder.plan.add_weight_entry(f"{node.target}.rows", entry, ("table", *linears.memory_identity(table)))
    register = builder.plan.append_step("embedding", table.shape[1], table=name)
    rows = Rows(builder.rows(register).view(*builder.shape, -1))
    return rows if scale == 1.0 else Rows(rows.index, ElementwiseExpr(calls.BINARY["mul"], (None, scale)))


def _transformed_table(builder: PlanBuilder, node: fx.Node, table: Tensor, function: ElementwiseExpr | None) -> Tensor:
    """The rows that ids pick, where they are changed before: a table of every id's own."""
    ids = torch.arange(builder.plan.vocabulary)
    if function is None:
        return table
    picked = function(ids.double()).long()
    if picked.shape != ids.shape:
        raise builder.rejection(node, "an embedding of numbers that are not made of each token id alone")
    if int(picked.min()) < 0 or int(picked.max()) >= len(table):
        raise builder.rejection(node, f"it asks for rows that the {len(table)} of its table are not")
    return table if torch.equal(picked, ids) else table[picked]


def append_position_table(builder: PlanBuilder, node: fx.Node, value: Positional) -> Rows | None:
    """Rows that depend on the position alone; None where there are none, as of a mask that hides nothing."""
    context = builder.plan.context = builder.positions.max_positions_of(value.node, builder.plan.context)
    table = builder.positions.at(value.node, context)
    if table is None:
        return None
    table = table[None] if table.dim() == 2 else table
    axis = next((axis for axis in range(1, table.dim() - 1) if table.shape[axis] == context), 0)
    if not axis or table[..., :1].numel() != context:
        raise builder.rejection(node, "it adds something that is not one row for every position")
    name = builder.plan.add_weight_entry(
        f"{value.node.name}.rows",
        WeightEntry("f32", (context, table.shape[-1]), lambda: table.reshape(context, -1).float().contiguous()),
        ("positions", value.node.name),
    )
    register = builder.plan.append_step("positions", table.shape[-1], table=name)
    shape = [1] * (table.dim() - 1)
    shape[0], shape[axis] = builder.shape
    return Rows(builder.rows(register).view(*shape, -1))


def _numbers(module: nn.Module) -> list[float]:
    """Numbers that a module holds as attributes, or in tensors of one element."""
    plain = [value for value in vars(module).values() if type(value) in (int, float)]
    single = [float(b) for b in module.buffers(recurse=False) if b.numel() == 1]
    return [float(n) for n in (*single, *plain) if n]
