"""Rotary positions of queries and keys: steps of the rotation that a function computes by tables."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ...models.checkpoints.pretrained import pretrained
from . import calls, rotations
from .layout import ColumnRun, split_into_column_runs
from .plan_builder import PlanBuilder
from .positional import run_node
from .rule import NodeCall
from .values import CachedRows, Positional, Rows


def lower_rotary(builder: PlanBuilder, call: NodeCall) -> Any:
    """Result of a rotary function: rotated queries and keys, or one of them."""
    node, args, kwargs = call.node, call.args, call.kwargs
    positions = [index for index, value in enumerate(args) if isinstance(value, Rows)]
    if not positions or any(isinstance(value, (Rows, CachedRows)) for value in kwargs.values()):
        raise builder.rejection(node, "a rotary embedding of another form than queries and keys by tables")
    turned_parts = []
    for number, index in enumerate(positions):
        rotary = _RotaryCall(builder, node, args, kwargs, index, number)
        rotation = builder.remember(
            ("rotation", rotary.cache_key), partial(_recognise_rotation_and_limit_context, builder, rotary)
        )
        if rotation is None:
            raise builder.rejection(node, "a rotary embedding that the engine does not have")
        turned_parts.append(_append_rotation(builder, args[index], rotation, _is_joined(node, len(positions))))
    return turned_parts[0] if len(turned_parts) == 1 else tuple(turned_parts)


def _is_joined(node: fx.Node, count: int) -> bool:
    """Whether what was cut off the heads is joined again later, so that whole heads are turned at once."""
    parts = [node] if count == 1 else list(node.users)
    return any(calls.operation_name(user) in calls.JOINS for part in parts for user in part.users)


def _recognise_rotation_and_limit_context(builder: PlanBuilder, rotary: "_RotaryCall") -> rotations.Rotation | None:
    for context in dict.fromkeys((builder.plan.context, _original_context(builder))):
        probe = min(rotations.PROBE, context)
        x = torch.ones(1, probe, rotary.width)
        try:
            if not torch.allclose(
                rotary.evaluate_rotation(x, 0, context), rotary.evaluate_rotation(x, 0, probe), atol=1e-6
            ):
                continue  # frequencies that depend on the length
            rotation = rotations.recognise_rotation(
                partial(rotary.evaluate_rotation, context_length=context), context, rotary.width
            )
        except (RuntimeError, TypeError, ValueError, IndexError):  # made for other operands than one row's
            return None
        builder.plan.context = min(builder.plan.context, context)
        return rotation
    return None


def _original_context(builder: PlanBuilder) -> int:
    """The length up to which frequencies are those that the model was first trained with."""
    config = pretrained(builder.model).config.get_text_config()
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    length = scaling.get("original_max_position_embeddings") if isinstance(scaling, dict) else None
    length = length or getattr(config, "original_max_position_embeddings", None)
    return length if type(length) is int else builder.plan.context


def _append_rotation(builder: PlanBuilder, x: Rows, rotation: rotations.Rotation, rotates_full_heads: bool) -> Rows:
    """`rotates_full_heads`: what was cut off the heads is joined again later, so whole heads are turned at once."""
    if not rotation.width:
        return Rows(_sorted(x.index, rotation), x.pending)
    plan, x = builder.plan, builder.materialised(x)
    name = plan.add_vector(f"{builder.current.name}.frequencies", rotation.frequencies.values)
    fields = {
        "rotary_dim": rotation.width,
        "inverse_frequencies": name,
        "scale": rotation.frequencies.scale,
        "interleaved": rotation.interleaved,
    }
    lane = plan.layout.as_row_layout(x.index)
    head_dim = x.index.shape[-1]
    lane_runs = split_into_column_runs(plan.layout, lane.columns)
    if rotates_full_heads and len(lane_runs) == 1 and _is_part_of_every_head(lane_runs[0], plan.layout.widths):
        run = lane_runs[0]
        full_width = plan.layout.widths[run.register]
        turned_register = plan.append_step(
            "rotary", full_width, x=run.register, heads=run.count, head_dim=run.stride, start=run.start, **fields
        )
        source_columns = plan.layout.columns(run.register)
        unturned = ~torch.isin(source_columns, lane.columns)
        plan.copies[turned_register] = (run.register, unturned)
        shifted = x.index - int(source_columns[0]) + int(plan.layout.columns(turned_register)[0])
        return Rows(_sorted(shifted, rotation))
    register, lane = builder.register(x)
    heads = len(lane.columns) // head_dim
    fields = {"heads": heads, "head_dim": head_dim, "start": 0, **fields}
    turned = builder.elementwise("rotary", x.index.shape, lane, x=register, **fields)
    return Rows(_sorted(turned.index, rotation))


def _sorted(index: Tensor, rotation: rotations.Rotation) -> Tensor:
    """Columns in the order in which a rotary function leaves them."""
    ordered = torch.empty_like(index)
    ordered[..., rotation.order] = index
    return ordered


@dataclass(frozen=True)
class _RotaryCall:
    """A call of a rotary function, asked for what it makes of one of its operands.

    position  of that operand among the arguments; `number` among those that are numbers of tokens
    """

    builder: PlanBuilder
    node: fx.Node
    args: tuple[Any, ...]
    options: dict[str, Any]
    position: int
    number: int

    @property
    def width(self) -> int:
        return self.args[self.position].index.shape[-1]

    @property
    def cache_key(self) -> tuple[Any, ...]:
        """Equal for calls that turn alike: every layer has one, and mostly of the same tables."""
        operands = [
            value.node
            if isinstance(value, Positional)
            else tuple(value.index.shape)
            if isinstance(value, Rows)
            else type(value)
            if isinstance(value, torch.nn.Module)
            else repr(value)
            for value in (*self.args, *self.options.values())
        ]
        return self.node.target, self.position, *operands

    def evaluate_rotation(self, x: Tensor, start: int, context_length: int) -> Tensor:
        """x [heads, t, width] turned by the tables of a context from position `start` on."""

        def operand(value: Any) -> Any:
            if isinstance(value, Positional):
                return _narrow_position_axis(
                    self.builder.positions.at(value.node, context_length), context_length, start, x.shape[1]
                )
            if isinstance(value, Rows):
                return self._from_heads_first(x.new_zeros(1, x.shape[1], value.index.shape[-1]), value)
            return value

        turned_value = self.args[self.position]
        args = [
            self._from_heads_first(x, value) if value is turned_value and i == self.position else operand(value)
            for i, value in enumerate(self.args)
        ]
        output = run_node(self.node, self.builder.model, args, {k: operand(v) for k, v in self.options.items()})
        output = output[self.number] if isinstance(output, tuple | list) else output
        return self._to_heads_first(output, turned_value).float()

    def _from_heads_first(self, x: Tensor, axes_like: Rows) -> Tensor:
        """x [heads, t, width] in the axes of those rows: [b, h, t, d], [b, t, h, d] or [b, t, d]."""
        if axes_like.index.dim() == 3:
            return x
        return (x.transpose(0, 1) if self._has_tokens_before_heads(axes_like) else x)[None]

    def _to_heads_first(self, x: Tensor, axes_like: Rows) -> Tensor:
        """[heads, t, width] of x, whose axes are those of the rows."""
        if axes_like.index.dim() == 3:
            return x
        return x[0].transpose(0, 1) if self._has_tokens_before_heads(axes_like) else x[0]

    def _has_tokens_before_heads(self, rows: Rows) -> bool:
        return rows.index.shape[1] == self.builder.shape[1] and self._moves_along(rows.index, 1)

    def _moves_along(self, index: Tensor, axis: int) -> bool:
        """Whether tokens follow each other along an axis."""
        _, token = self.builder.plan.layout.registers_and_tokens(index.select(0, 0).select(-1, 0).reshape(-1))
        return bool((token.view(index.shape[1:3]).diff(dim=axis - 1) == 1).all())


def _narrow_position_axis(value: Any, length: int, start: int, count: int) -> Any:
    """Some positions of what has an axis of all: tables of a long context are read a part at a time."""
    if not isinstance(value, Tensor) or count == length:
        return value
    axis = next((axis for axis, size in enumerate(value.shape) if size == length), None)
    return value if axis is None else value.narrow(axis, start, count)


def _is_part_of_every_head(run: ColumnRun, widths: list[int]) -> bool:
    """Whether a run is a part of every head of a register."""
    return (
        run.block < run.stride
        and run.stride * run.count == widths[run.register]
        and (run.start + run.block <= run.stride)
    )
