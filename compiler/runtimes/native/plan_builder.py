"""A plan in the making beside the values of a graph's nodes, and the steps that rules have in common."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import activations, calls, linears, shifting
from .encoder_decoder import Stack
from .layout import IrregularColumns, RowLayout
from .plan import Plan, WeightEntry
from .positional import Positions
from .refusal import rejection
from .rule import NodeCall, Rule
from .values import ElementwiseExpr, Rows, TokenIds

_SPELLINGS = {"iadd": "add", "isub": "sub", "imul": "mul", "multiply": "mul", "itruediv": "truediv", "div": "truediv"}
_OPS = {"add": "add", "sub": "add", "mul": "mul", "truediv": "mul"}


class PlanBuilder:
    """State of one walk over a graph.

    model    whose numbers are read
    numbers  of linear layers in the plan
    rules    in the order in which they are tried
    side     of an encoder with a decoder; `source` is the builder of the encoder, None elsewhere
    shape    [batch, tokens] of the sample
    values   of the nodes that were read
    current  the node that is being read
    last     the linear layer that was read last, and its entry
    lowered  packed weights that a pass left, by their entries
    """

    def __init__(
        self,
        model: nn.Module,
        formats: linears.NumberFormats,
        plan: Plan,
        shape: torch.Size,
        side: Stack,
        source: "PlanBuilder | None",
        rules: Sequence[Rule],
    ):
        self.model, self.formats, self.plan, self.shape, self.side = model, formats, plan, shape, side
        self.source, self.rules = source, rules
        self.ids = TokenIds(plan.layout)
        self.values: dict[fx.Node, Any] = {}
        behind = source.positions if source else None
        self.positions: Positions = Positions(model, self.values, plan.layout, shape, behind)
        self.last: tuple[str, linears.Linear] | None = None
        self.lowered: dict[str, Tensor] = {}
        self.current = side.nodes[0]
        self._memory: dict[Any, Any] = {}

    def rejection(self, node: fx.Node, reason: str) -> Exception:
        return rejection(node, self.model, reason)

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """Value of a key, computed once."""
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]

    # -- rules -----------------------------------------------------------------------------------------------

    def resolve_call(self, node: fx.Node) -> NodeCall:
        """The call of a node, with the values of its operands."""
        if node.op in ("placeholder", "get_attr") or (self.source is not None and node in self.source.values):
            return NodeCall(node)
        args, kwargs = (fx.map_arg(part, self.values.__getitem__) for part in (node.args, node.kwargs))
        module = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
        return NodeCall(node, args, kwargs, node.meta.get("role"), module)

    def lower(self, call: NodeCall) -> Any:
        """Value of a call, by the first rule that matches it and does not pass it on."""
        for rule in self.rules:
            if rule.matches(self, call):
                value = rule.lower(self, call)
                if value is not NotImplemented:
                    return value
        raise AssertionError(f"no rule rejects {call.node.name}")

    # -- layers ----------------------------------------------------------------------------------------------

    def lower_linear(
        self, node: fx.Node, x: Rows, name: str, layer: linears.Linear, weight_format: str | None = None
    ) -> Rows:
        """`weight_format`: other numbers than those of all linear layers."""
        outputs, width = layer.shape
        is_zero = bool((x.index < 0).all()) and layer.bias is None
        if is_zero or not x.index.numel():  # of zeros, and of none of the tokens
            return Rows(torch.full((*x.index.shape[:-1], outputs), shifting.BEFORE))
        x = self.materialised(x)
        register, _ = self.register(x)
        if x.index.shape[-1] != width or self.plan.layout.widths[register] != width:
            reason = "a linear layer over a part of what a token has is not among the engine's steps"
            raise self.rejection(node, reason)
        entry = WeightEntry(
            "packed", layer.shape, layer.make_packer(weight_format or self.formats.weights, self.formats.group)
        )
        weight = self.plan.add_weight_entry(f"{name}.weight", entry, layer.key)
        if layer.packed is not None:
            self.lowered[weight] = layer.packed
        self.last = weight, layer
        bias = None if layer.bias is None else self.plan.add_vector(f"{name}.bias", layer.bias)
        output = self.plan.append_step("linear", outputs, x=register, weight=weight, bias=bias)
        _, token = self.plan.layout.registers_and_tokens(x.index[..., 0])
        return Rows(self.plan.layout.rows(output)[token])

    def lower_submodule(self, node: fx.Node, name: str, x: Rows) -> Rows:
        """A linear layer inside of the module that a node calls."""
        layer = linears.recognise_linear(self.model.get_submodule(f"{node.target}.{name}"))
        assert layer is not None, f"{name} was a linear layer when it was recognised"
        return self.lower_linear(node, x, f"{node.target}.{name}", layer)

    def product(self, a: Rows, b: Rows) -> Rows:
        return self.elementwise_of_two("mul", a, b)

    def elementwise_of_two(self, name: str, a: Rows, b: Rows) -> Rows:
        kind = _SPELLINGS.get(name, name)
        op = _OPS.get(kind)
        if op is None:
            raise self.rejection(self.current, f"`{name}` of two values is not among the engine's steps")
        if kind == "sub":
            b = Rows(b.index, ElementwiseExpr(calls.BINARY["mul"], (b.pending, -1.0)))
        if kind == "truediv":
            b = Rows(b.index, ElementwiseExpr(torch.reciprocal, (b.pending,)))
        ai, bi = torch.broadcast_tensors(self.materialised(a).index, self.materialised(b).index)
        (x, lane), (y, other) = self.register(Rows(ai)), self.register(Rows(bi))
        if not torch.equal(lane.order, other.order):
            raise IrregularColumns
        return self.elementwise(op, ai.shape, lane, x=x, y=y)

    def elementwise_with_vector(self, node: fx.Node, name: str, x: Rows, y: Tensor, *, swapped: bool = False) -> Rows:
        kind = _SPELLINGS.get(name, name)
        op = _OPS.get(kind)
        if op is None or (swapped and kind in ("sub", "truediv")):
            raise self.rejection(node, f"`{name}` with a constant tensor is not among the engine's steps")
        y = -y.float() if kind == "sub" else 1 / y.float() if kind == "truediv" else y.float()
        index, values = torch.broadcast_tensors(self.materialised(x).index, y.detach())
        register, lane = self.register(Rows(index))
        rows = values.reshape(-1)[lane.order].view(self.plan.layout.tokens, -1)
        if not torch.equal(rows, rows[:1].expand_as(rows)):
            raise IrregularColumns
        vector = self.plan.add_vector(node.name, rows[0])
        return self.elementwise(f"{op}_vector", index.shape, lane, x=register, vector=vector)

    # -- registers -------------------------------------------------------------------------------------------

    def register(self, value: Rows) -> tuple[int, RowLayout]:
        """The register that holds a value's rows in the order of the value, made if need be."""
        lane = self.plan.layout.as_row_layout(self.materialised(value).index)
        return self.plan.materialize_columns(lane.columns), lane

    def rows(self, register: int) -> Tensor:
        """Element numbers [tokens, width] of a register."""
        return self.plan.layout.rows(register)

    def elementwise(self, op: str, shape: torch.Size, lane: RowLayout, **fields: Any) -> Rows:
        """A step whose result lies as its operands do."""
        register = self.plan.append_step(op, len(lane.columns), **fields)
        return Rows(self.plan.layout.index_of_ordered_rows(register, lane.order, shape))

    def materialised(self, value: Rows) -> Rows:
        """The value without a pending function: steps compute it."""
        if bool((value.index < 0).any()):
            value = Rows(shifting.lower_token_shifts(self, value.index), value.pending)
        return self.without_pending(value)

    def apply(self, x: Rows, compute: Callable[..., Tensor], *operands: float) -> Rows:
        """The value of an elementwise function of x, computed by steps."""
        return self.materialised(Rows(x.index, ElementwiseExpr(compute, (x.pending, *operands))))

    def without_pending(self, value: Rows) -> Rows:
        """The value with places before a text as they are, where no function is pending that would change them."""
        if value.pending is None:
            return value
        return self._append_elementwise(Rows(value.index), value.pending)

    def _append_elementwise(self, base: Rows, expr: ElementwiseExpr) -> Rows:
        recognised = activations.recognise_elementwise(expr)
        if recognised is None:
            return self._append_operand_by_operand(base, expr)
        if not recognised.op:
            return base
        register, lane = self.register(base)
        return self.elementwise(recognised.op, base.index.shape, lane, x=register, **recognised.fields)

    def _append_operand_by_operand(self, base: Rows, expr: ElementwiseExpr) -> Rows:
        """A function that no step computes, operand by operand."""
        node = self.current
        op = {calls.BINARY[name]: name for name in ("add", "sub", "mul")}.get(expr.call)
        parts = [
            base
            if part is None
            else self._append_elementwise(base, part)
            if isinstance(part, ElementwiseExpr)
            else part
            for part in expr.operands
        ]
        first, second = (*parts, None, None)[:2]
        if len(parts) == 1 and expr.operands[0] is not None and isinstance(first, Rows):
            return self._append_elementwise(first, ElementwiseExpr(expr.call, (None,), expr.at))
        if len(parts) == 2 and op and isinstance(first, Rows) and isinstance(second, Rows):
            return self.elementwise_of_two(op, first, second)
        if len(parts) == 2 and any(part is not base for part in parts if isinstance(part, Rows)):
            operand = next(part for part in parts if isinstance(part, Rows))
            numbers = tuple(None if isinstance(part, Rows) else part for part in parts)
            return self._append_elementwise(operand, ElementwiseExpr(expr.call, numbers, expr.at))
        raise self.rejection(expr.at or node, "an elementwise function that is not among the engine's steps")
