"""Experts before whom tokens stand in line: a router sorts them, one expert after another takes those in its part.

Rows of such a line are followed in the order of tokens and, for each, of the experts that it was given to; a sum over
the places of a line, or over its tokens, ends it. So a layer of experts is a step of the chosen ones, whatever lies
between two of them, attention among it.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import calls, graph_values, mixtures, routers
from .plan_builder import PlanBuilder
from .rule import Call
from .values import Layer, Rows, SortedDispatchIndex, SortedRows

_REASON = "tokens in line before experts are met otherwise than by layers of these and functions of each"
_SPLITS = frozenset({"chunk", "split", "tensor_split"})
_FULL_SLICE = slice(None)


def lower_sorting_router(builder: PlanBuilder, call: Call) -> Any:
    """Result of a router of rows [n, width] that sorts them."""
    node, module, x = call.node, call.module, call.first if len(call.args) == 1 and not call.kwargs else None
    if module is None or not isinstance(x, Rows) or x.index.dim() != 2:
        return NotImplemented
    recognised = recognise_sorting_router(module, x.index.shape[1])
    if recognised is None:
        return NotImplemented
    choice = mixtures.lower_choice(builder, node, module, x, {}, recognised[0])
    return tuple(SortedDispatchIndex(choice, part) for part in recognised[1])


def lower_sorted_dispatch(builder: PlanBuilder, call: Call) -> Any:
    node, role, args, kwargs, name, first = call.node, call.role, call.args, call.kwargs, call.name, call.first
    if isinstance(first, tuple | list) and name == "getitem":
        return first[args[1]]
    if name in calls.SIZE_CALLS:
        shape = node.args[0].meta["shape"]
        return graph_values.lower_size_of(builder, call, torch.zeros(()).expand(shape))
    if name == "getitem" and isinstance(first, Rows) and isinstance(args[1], SortedDispatchIndex):
        return _repeat_tokens(builder, node, first, args[1])
    if name == "getitem" and isinstance(first, SortedDispatchIndex) and args[1] == (_FULL_SLICE, None):
        return first
    if call.module and role == "experts" and len(args) == 2 and isinstance(first, SortedRows) and not kwargs:
        return _lower_expert_layer(builder, node, call.module, first, args[1])
    if name in ("mul", "multiply") and any(isinstance(x, SortedDispatchIndex) for x in args):
        return _weighed(builder, node, *args)
    if name == "index_add":
        return _lower_scatter(builder, node, *args)
    return _lower_rowwise(builder, call)


def _repeat_tokens(builder: PlanBuilder, node: fx.Node, x: Rows, line: SortedDispatchIndex) -> SortedRows:
    """Tokens [n, width], each once for every expert that it is given to; or what they already have for each."""
    tokens, choice = builder.plan.layout.tokens, line.choice
    row_counts = {"tokens": tokens, "places": tokens * choice.count}
    if x.index.dim() != 2 or row_counts.get(line.part) != len(x.index):
        raise builder.rejection(node, _REASON)
    index = x.index.repeat_interleave(choice.count, 0) if line.part == "tokens" else x.index
    return SortedRows(choice, Rows(index, x.pending))


def _lower_expert_layer(
    builder: PlanBuilder, node: fx.Node, module: nn.Module, queued: SortedRows, sizes: Any
) -> SortedRows:
    stacked = (
        recognise_expert_layer(module, queued.choice.experts)
        if isinstance(sizes, SortedDispatchIndex) and sizes.part == "sizes"
        else None
    )
    if stacked is None or sizes.choice != queued.choice:
        reason = f"a {type(module).__name__} computes something else than one layer for each expert"
        raise builder.rejection(node, reason)
    rows, count = builder.materialised(_as_token_rows(builder, node, queued)).index, queued.choice.count
    by_token = rows.view(-1, count, rows.shape[1])
    same_rows = torch.equal(by_token, by_token[:, :1].expand_as(by_token))  # every expert takes the token itself
    x = Rows(by_token[:, 0] if same_rows else by_token.flatten(1))
    return SortedRows(queued.choice, None, Layer(str(node.target), stacked, x))


def _weighed(builder: PlanBuilder, node: fx.Node, a: Any, b: Any) -> SortedRows:
    queued, line = (a, b) if isinstance(a, SortedRows) else (b, a)
    fits = isinstance(queued, SortedRows) and isinstance(line, SortedDispatchIndex) and line.part == "weights"
    if not fits or queued.choice != line.choice or queued.layer is None or queued.weighed:
        raise builder.rejection(node, _REASON)
    return replace(queued, weighed=True)


def _lower_scatter(builder: PlanBuilder, node: fx.Node, onto: Any, axis: Any, line: Any, queued: Any) -> Rows:
    """Rows of a line at their tokens, summed, or at their places."""
    plain = (
        isinstance(onto, Tensor)
        and axis == 0
        and isinstance(line, SortedDispatchIndex)
        and isinstance(queued, SortedRows)
    )
    if not plain or line.choice != queued.choice or bool(onto.any()):
        raise builder.rejection(node, _REASON)
    if line.part == "places" and not queued.weighed:
        output = _as_token_rows(builder, node, queued)
    elif line.part == "tokens" and queued.weighed:
        output = Rows(builder.rows(_step(builder, queued, summed=True)))
    else:
        raise builder.rejection(node, _REASON)
    assert output.index.shape == onto.shape, f"{tuple(output.index.shape)} rows on {tuple(onto.shape)}"
    return output


def _lower_rowwise(builder: PlanBuilder, call: Call) -> Any:
    """Result of a row-wise function on sorted rows."""
    node, role, args, kwargs = call.node, call.role, call.args, call.kwargs
    queued = [x for x in args if isinstance(x, SortedRows)]
    name = calls.operation(node)
    known = name in calls.UNARY or name in calls.BINARY or name in calls.SAME or role == "activation"
    if name in _SPLITS:
        known = (kwargs.get("dim", args[2] if len(args) > 2 else 0)) in (-1, 1)
    plain = not any(isinstance(x, SortedDispatchIndex | Rows) for x in (*args, *kwargs.values()))
    if not known or not plain or not queued or any(x.choice != queued[0].choice for x in queued):
        raise builder.rejection(node, _REASON)
    value = builder.lower(call.mapped(lambda x: _as_token_rows(builder, node, x) if isinstance(x, SortedRows) else x))
    if isinstance(value, tuple):
        return tuple(SortedRows(queued[0].choice, part) for part in value)
    return SortedRows(queued[0].choice, value)


def _as_token_rows(builder: PlanBuilder, node: fx.Node, queued: SortedRows) -> Rows:
    """[tokens * count, width]."""
    if queued.weighed:
        raise builder.rejection(node, _REASON)
    if queued.rows is not None:
        return queued.rows
    index = builder.rows(_step(builder, queued, summed=False))
    return Rows(index.view(len(index) * queued.choice.count, -1))


def _step(builder: PlanBuilder, queued: SortedRows, *, summed: bool) -> int:
    layer_ = queued.layer
    assert layer_ is not None, "a line without rows is that of a layer"
    return mixtures.expert_layer_register(
        builder, layer_.name, queued.choice, builder.register(layer_.x)[0], layer_.weights, summed=summed
    )


@torch.no_grad()
def recognise_sorting_router(module: nn.Module, width: int) -> tuple[routers.Routing, list[str]] | None:
    """The rule of a router that sorts rows by their experts, and what each part is of what it returns; or None.

    "places" are numbers of rows times experts of each, sorted by expert; "tokens" the rows of those, "weights" theirs,
    "sizes" how many each expert takes. Of anything else nothing is known ("").
    """
    trial = routers.router_outputs(module, width, {}, 2, 1.0)
    if trial is None:
        return None
    tensors, x, parts = trial
    flat = [p for p in parts if isinstance(p, Tensor) and p.dim() == 1 and len(p) and len(p) % len(x) == 0]
    order = next((p for p in flat if not p.is_floating_point() and p.unique().numel() == len(p)), None)
    if order is None or not torch.equal(order.sort().values, torch.arange(len(order))):
        return None
    count, sizes = len(order) // len(x), next((p for p in parts if isinstance(p, list)), None)
    weights = next((p for p in flat if p.is_floating_point() and len(p) == len(order)), None)
    if sizes is None or weights is None or not all(type(n) is int for n in sizes) or sum(sizes) != len(order):
        return None
    numbers, unsorted_weights = torch.empty_like(order), torch.empty_like(weights)
    numbers[order], unsorted_weights[order] = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)), weights
    sample = routers.Sample(tensors, x, unsorted_weights.view(-1, count).float(), numbers.view(-1, count), (0, 0))
    rule = routers.fit_routing(module, width, sample)
    tokens = order // count

    def part(value: Any) -> str:
        if isinstance(value, Tensor) and value.shape == order.shape and not value.is_floating_point():
            return "places" if torch.equal(value, order) else "tokens" if torch.equal(value, tokens) else ""
        return "weights" if value is weights else "sizes" if value is sizes else ""

    return None if rule is None else (rule, [part(value) for value in parts])


@torch.no_grad()
def recognise_expert_layer(module: nn.Module, experts: int) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
    """Weights and biases of a module (rows, how many each expert takes) that is a linear layer for each; or None."""
    parameters = [p.detach() for p in module.parameters()]
    for solid in (p for p in parameters if p.dim() == 3 and len(p) == experts):
        for weight in (solid, solid.mT):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn((2, weight.shape[2]), generator=generator).to(weight.dtype)
            sizes = [0] * experts
            sizes[0] += 1
            sizes[-1] += 1
            for bias in (None, *(p for p in parameters if p.shape == weight.shape[:2])):
                computed = [
                    F.linear(x[i : i + 1], weight[e], None if bias is None else bias[e]) for i, e in enumerate((0, -1))
                ]
                try:
                    expected = module(x, sizes)
                except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # made for something else
                    continue
                close = isinstance(expected, Tensor) and expected.shape == (2, weight.shape[1])
                if close and torch.allclose(expected.float(), torch.cat(computed).float(), rtol=1e-3, atol=1e-3):
                    return (weight,), bias
    return None
