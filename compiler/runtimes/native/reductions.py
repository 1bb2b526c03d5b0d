"""Means of what a token has, and products of its own small matrices: steps of means, products and sums."""

import torch
from torch import fx

from . import calls
from .layout import IrregularColumns
from .plan_builder import PlanBuilder
from .rule import NodeCall
from .values import ElementwiseExpr, Rows

KINDS = ("mean", "sum", "std", "var")
_MAX_SUMMED = 16  # values that are added one by one
_MAX_PRODUCTS = 64  # of columns of a matrix with numbers of another


def lower_reduction(builder: PlanBuilder, call: NodeCall) -> Rows:
    """Mean, sum or deviation over one axis, for each token."""
    node, name, x = call.node, call.name, call.first
    names = ("dim", "keepdim") if name in ("mean", "sum") else ("dim",)
    options = dict(zip(names, call.args[1:], strict=False)) | call.kwargs
    dim, keeps = options.pop("dim", None), bool(options.pop("keepdim", False))
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    biased = options.pop("unbiased", None) is False or options.pop("correction", None) == 0
    if not isinstance(dim, int) or any(v is not None for k, v in options.items() if k != "dtype"):
        raise builder.rejection(node, f"a `{name}` of another form than over one axis")
    if name in ("std", "var"):
        if not biased:
            raise builder.rejection(node, f"a `{name}` with a correction is not among the engine's steps")
        middle = append_mean(builder, node, x, dim)
        off = builder.elementwise_of_two("sub", x, middle)
        value = append_mean(builder, node, Rows(off.index, ElementwiseExpr(torch.square, (None,))), dim)
        value = Rows(value.index, ElementwiseExpr(torch.sqrt, (value.pending,))) if name == "std" else value
    else:
        value = append_mean(builder, node, x, dim)
        if name == "sum":
            value = Rows(value.index, ElementwiseExpr(calls.BINARY["mul"], (value.pending, float(x.index.shape[dim]))))
    return value if keeps else Rows(value.index.squeeze(dim), value.pending)


def append_mean(builder: PlanBuilder, node: fx.Node, x: Rows, dim: int) -> Rows:
    """Over an axis, which is left with one number."""
    x, size = builder.materialised(x), x.index.shape[dim]
    dim %= x.index.dim()
    if dim == x.index.dim() - 1:
        register, lane = builder.register(x)
        _, token = builder.plan.layout.registers_and_tokens(x.index.reshape(-1, size))
        if not torch.equal(token, token[:, :1].expand_as(token)):
            raise IrregularColumns
        mean_register = builder.plan.append_step("mean", len(lane.columns) // size, x=register, group=size)
        order = lane.order.view(-1, size)[:, 0] // size  # numbers of an axis lie side by side
        return Rows(builder.plan.layout.index_of_ordered_rows(mean_register, order, x.index[..., :1].shape))
    if size > _MAX_SUMMED:
        raise builder.rejection(node, f"a mean of {size} numbers that do not lie side by side")
    sum_rows = total(builder, [Rows(x.index.narrow(dim, i, 1)) for i in range(size)])
    return Rows(sum_rows.index, ElementwiseExpr(calls.BINARY["mul"], (sum_rows.pending, 1.0 / size)))


def inverse_root(builder: PlanBuilder, node: fx.Node, x: Rows, eps: float) -> Rows:
    """One over the root of the mean square over the last axis, which is left with that."""
    mean_square = append_mean(builder, node, Rows(x.index, ElementwiseExpr(torch.square, (x.pending,))), -1)
    shifted = ElementwiseExpr(calls.BINARY["add"], (mean_square.pending, eps))
    return Rows(mean_square.index, ElementwiseExpr(torch.reciprocal, (ElementwiseExpr(torch.sqrt, (shifted,)),)))


def total(builder: PlanBuilder, terms: list[Rows]) -> Rows:
    first, *tail = terms
    for part in tail:
        first = builder.elementwise_of_two("add", first, part)
    return first


def lower_matrix_product(builder: PlanBuilder, call: NodeCall) -> Rows:
    """A token's matrix times another of its own, where one is small: columns times numbers, summed."""
    node, (a, b) = call.node, call.args
    a, b = builder.materialised(a), builder.materialised(b)
    if a.index.dim() != b.index.dim() or a.index.dim() < 3:
        raise builder.rejection(node, "a product of two values is not among the engine's steps")
    (rows, inner), columns = a.index.shape[-2:], b.index.shape[-1]
    if inner * min(rows, columns) > _MAX_PRODUCTS:
        raise builder.rejection(node, "a product of two values is not among the engine's steps")

    def term(first: torch.Tensor, second: torch.Tensor) -> Rows:
        return builder.elementwise_of_two("mul", Rows(first), Rows(second))

    if columns <= rows:
        parts = [
            total(builder, [term(a.index[..., :, i : i + 1], b.index[..., i : i + 1, j : j + 1]) for i in range(inner)])
            for j in range(columns)
        ]
        return Rows(torch.cat([builder.materialised(part).index for part in parts], -1))
    parts = [
        total(builder, [term(a.index[..., j : j + 1, i : i + 1], b.index[..., i : i + 1, :]) for i in range(inner)])
        for j in range(rows)
    ]
    return Rows(torch.cat([builder.materialised(part).index for part in parts], -2))
