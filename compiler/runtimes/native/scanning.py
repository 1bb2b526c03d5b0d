"""Steps that keep a state of each sequence: scans of Mamba-1 and Mamba-2, and delta rules; gated norms and products
with constant matrices, which stand around them."""

from types import NotImplementedType
from typing import Any

import torch
from torch import Tensor, fx

from . import calls, deltas, linears, norms
from .plan_builder import PlanBuilder
from .rule import NodeCall
from .values import ElementwiseExpr, Rows


def reject_scan(builder: PlanBuilder, call: NodeCall) -> Any:
    name = call.node.target if call.module is not None else call.name
    raise builder.rejection(call.node, f"`{name}` keeps a state that is none of the engine's")


def lower_ssd(builder: PlanBuilder, call: NodeCall) -> Rows:
    """A scan of one decay for each head: x [b, t, heads, d], B and C [b, t, groups, states]."""
    (x, dt, A, B, C), options, node, plan = call.args, call.kwargs, call.node, builder.plan
    rows = all(isinstance(part, Rows) for part in (x, dt, B, C)) and x.index.dim() == B.index.dim() == 4
    bare = all(options.get(name) is None for name in ("z", "initial_states")) and not options.get("return_final_states")
    if not rows or not bare or A.dim() != 1:
        raise builder.rejection(node, "a scan of another form than one decay for each head")
    (heads, head_dim), (groups, states) = x.index.shape[2:], B.index.shape[2:]
    least, upper = map(float, options.get("dt_limit", (0.0, float("inf"))))
    sizes = {"heads": heads, "head_dim": head_dim, "groups": groups, "states": states}
    register, lane = builder.register(x)
    operands = {"x": register, **_registers(builder, dt=dt, b=B, c=C)}
    rates = plan.add_vector(f"{node.name}.rates", A)
    vectors = _vectors(builder, node, skip=options.get("D"), bias=options.get("dt_bias"))
    bounds = {"least": max(least, 0.0), "most": upper if upper < float("inf") else None}
    fields = {**sizes, "rates": rates, **vectors, "softplus": bool(options.get("dt_softplus")), **bounds}
    return builder.elementwise("ssd", x.index.shape, lane, **operands, **fields)


def lower_selective(builder: PlanBuilder, call: NodeCall) -> Rows:
    """A scan of a decay for each channel and state: x [b, t, channels], B and C [b, t, states]."""
    (x, dt, A, B, C), options, node = call.args, call.kwargs, call.node
    rows, z = all(isinstance(part, Rows) and part.index.dim() == 3 for part in (x, dt, B, C)), options.get("z")
    if not rows or not isinstance(z, Rows | None) or options.get("return_last_state") or A.dim() != 2:
        raise builder.rejection(node, "a scan of another form than a decay for each channel and state")
    register, lane = builder.register(x)
    gate = {"gate": None} if z is None else _registers(builder, gate=z)
    operands = {"x": register, **_registers(builder, dt=dt, b=B, c=C), **gate}
    rates = builder.plan.add_vector(f"{node.name}.rates", A)
    vectors = _vectors(builder, node, skip=options.get("D"), bias=options.get("delta_bias"))
    fields = {"states": A.shape[1], "rates": rates, **vectors, "softplus": bool(options.get("delta_softplus"))}
    return builder.elementwise("selective", x.index.shape, lane, **operands, **fields)


def is_delta_rule(builder: PlanBuilder, call: NodeCall) -> bool:
    return call.role == "ssm_scan" and call.node.op == "call_function" and {"g", "beta"} <= call.kwargs.keys()


def lower_delta_rule(builder: PlanBuilder, call: NodeCall) -> tuple[Rows, None]:
    node, args, kwargs = call.node, call.args, dict(call.kwargs)
    operands = dict(zip("qkv", args, strict=False)) | {name: kwargs.pop(name) for name in ("g", "beta")}
    plain = len(operands) == 5 and len(args) == 3 and all(isinstance(x, Rows) for x in operands.values())
    options = {name: value for name, value in kwargs.items() if value is not None}
    shapes = {name: tuple(x.index.shape) for name, x in operands.items()} if plain else {}
    function: Any = node.target
    form = deltas.recognise_delta_rule(function, shapes, options) if plain else None
    if form is None:
        raise builder.rejection(node, "a linear attention of another form than the gated delta rule")
    q, k, v, decay, beta = operands.values()
    (heads, value_dim), (groups, head_dim) = v.index.shape[2:], k.index.shape[2:]
    if form.eps is not None:
        q, k = (_append_l2_norm(builder, node, x, form.eps, by) for x, by in ((q, form.scale), (k, 1.0)))
    elif form.scale != 1.0:
        q = Rows(q.index, ElementwiseExpr(calls.BINARY["mul"], (q.pending, form.scale)))
    register, lane = builder.register(v)
    operands = {"x": register, **_registers(builder, decay=decay, k=k, q=q, beta=beta)}
    sizes = {"heads": heads, "groups": groups, "head_dim": head_dim, "value_dim": value_dim}
    by_channel = decay.index.dim() == 4
    output = builder.elementwise("delta", v.index.shape, lane, **operands, **sizes, by_channel=by_channel)
    return output, None


def _append_l2_norm(builder: PlanBuilder, node: fx.Node, x: Rows, eps: float, length: float) -> Rows:
    """Heads of length `length`: what a root mean square leaves, over the root of how many numbers there are."""
    register, lane = builder.register(x)
    width = x.index.shape[-1]
    gain = builder.plan.add_vector(f"{node.name}.length.{length:.6g}", torch.full((width,), length * width**-0.5))
    fields = {"kind": "rms", "eps": eps / width, "group": width, "weight": gain, "bias": None}
    return builder.elementwise("norm", x.index.shape, lane, x=register, **fields)


def _registers(builder: PlanBuilder, **values: Rows) -> dict[str, int]:
    return {name: builder.register(value)[0] for name, value in values.items()}


def _vectors(builder: PlanBuilder, node: fx.Node, **values: Tensor | None) -> dict[str, str | None]:
    return {
        name: None if value is None else builder.plan.add_vector(f"{node.name}.{name}", value)
        for name, value in values.items()
    }


# -- what is around them ---------------------------------------------------------------------------------


def lower_gated_norm(builder: PlanBuilder, call: NodeCall) -> Rows | NotImplementedType:
    gates = [*call.args[1:], *call.kwargs.values()]
    if len(gates) != 1 or not isinstance(gates[0], Rows) or call.module is None:
        return NotImplemented
    node, module, x, gate = call.node, call.module, call.first, gates[0]
    norm = norms.recognise_gated_norm(module, x.index.shape)
    if norm is None:
        raise builder.rejection(node, f"a {type(module).__name__} is no gated norm that the engine has")
    opened = Rows(gate.index, ElementwiseExpr(norms.GATES[norm.gate], (gate.pending,)))
    if norm.gate_first:
        x = builder.product(x, opened)
    register, lane = builder.register(x)
    gain = builder.plan.add_vector(f"{node.target}.weight", norm.gain)
    output = builder.elementwise(
        "norm", x.index.shape, lane, x=register, kind="rms", eps=norm.eps, group=norm.group, weight=gain, bias=None
    )
    return output if norm.gate_first else builder.product(output, opened)


def lower_constant_product(builder: PlanBuilder, call: NodeCall) -> Rows | NotImplementedType:
    """A matrix times tokens: [o, i] @ [b, i, t], or [b, t, i] @ [i, o]; or a matrix for each head."""
    node, (a, b) = call.node, call.args
    if isinstance(a, Rows) and isinstance(b, Rows):
        return NotImplemented
    turned = isinstance(b, Rows)
    x, matrix = (b, a) if turned else (a, b)
    if not (isinstance(matrix, Tensor) and isinstance(x, Rows) and 2 <= matrix.dim() <= x.index.dim() > 2):
        raise builder.rejection(node, "a product of two values is not among the engine's steps")
    index = _blockwise_products(
        builder, node, node.name, matrix.mT if not turned else matrix, x.index.mT if turned else x.index, x
    )
    return Rows(index.mT if turned else index)


def _blockwise_products(
    builder: PlanBuilder, node: fx.Node, name: str, matrix: Tensor, index: Tensor, x: Rows
) -> Tensor:
    """Element numbers of [..., t, i] by [..., o, i], part by part of the axes before."""
    matrix = matrix.reshape(*[1] * (index.dim() - matrix.dim()), *matrix.shape)
    axis = next((axis for axis, size in enumerate(matrix.shape[:-2]) if size > 1), None)
    if axis is None:
        weight = matrix.reshape(matrix.shape[-2:]).detach()
        # It makes time steps out of a few numbers: int8 would be felt, and save nothing.
        linear = linears.Linear((weight.shape[0], weight.shape[1]), None, weight=weight)
        return builder.lower_linear(node, Rows(index, x.pending), name, linear, weight_format="bf16").index
    count = matrix.shape[axis]
    parts = index.expand(*index.shape[:axis], count, *index.shape[axis + 1 :]).split(1, axis)
    matrices = matrix.split(1, axis)
    parts_out = [
        _blockwise_products(builder, node, f"{name}.{i}", matrices[i], part, x) for i, part in enumerate(parts)
    ]
    return torch.cat(parts_out, axis)
