"""Gated linear recurrences of one number for each channel (Griffin's RG-LRU), recognised by what they compute.

y = a * y + sqrt(1 - a**2) * i * x with a = exp(-8 * r * softplus(p)), where r and i are logistic functions of small
matrices by heads, and the root is one at a text's first token. A selective scan of one state computes it: its time step
is -log(a), and what it is given is divided by that.
"""

import copy
from dataclasses import dataclass
from itertools import permutations
from types import NotImplementedType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import linears
from .plan import WeightEntry
from .plan_builder import PlanBuilder
from .rule import NodeCall
from .values import Positional, Rows

_POWER = 8.0  # of the decay, Botev et al. 2024 (arXiv 2404.07839), section 2.1
_LENGTH = 6  # tokens that a recurrence is tried on
_ATOL = 1e-5


@dataclass(frozen=True)
class Gate:
    """The logistic function of x by heads: weight [heads, in, out], bias [heads, out]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        heads, width, _ = self.weight.shape
        logits = torch.einsum("...hi,hio->...ho", x.unflatten(-1, (heads, width)), self.weight) + self.bias
        return logits.flatten(-2).sigmoid()


@dataclass(frozen=True)
class Recurrence:
    """decay   [channels] -log(a) of a gate that is all open"""

    decay: Tensor
    keeps: Gate
    gate: Gate

    def __call__(self, x: Tensor) -> Tensor:
        """x [tokens, channels] from a text's first token on."""
        a, y, out = (-self.keeps(x) * self.decay).exp(), torch.zeros_like(x[0]), []
        share = (1 - a.square()).sqrt()
        share[0] = 1.0
        for row in range(len(x)):
            y = a[row] * y + (share * self.gate(x) * x)[row]
            out.append(y)
        return torch.stack(out)


@torch.no_grad()
def recognise_rg_lru(module: nn.Module) -> Recurrence | None:
    """The recurrence that a module (x [1, t, channels], positions [1, t]) computes, or None."""
    parameters = [p.detach() for p in module.parameters(recurse=False)]
    vectors = [p for p in parameters if p.dim() == 1]
    width = len(vectors[0]) if vectors else 0
    matrices = [p for p in parameters if p.dim() == 3 and p.shape[1] == p.shape[2] and p.shape[0] * p.shape[1] == width]
    biases = [p for p in parameters if p.dim() == 2 and p.numel() == width]
    if len(vectors) != 1 or len(matrices) != 2 or len(biases) != 2:
        return None
    vectors, matrices, biases = ([p.float() for p in group] for group in (vectors, matrices, biases))
    x = torch.randn((_LENGTH, width), generator=torch.Generator().manual_seed(0))
    expected = _output_on_sample(module, x)
    if expected is None:
        return None
    for first, second in permutations(range(2)):
        for one, other in permutations(range(2)):
            gates = Gate(matrices[first], biases[one]), Gate(matrices[second], biases[other])
            form = Recurrence(_POWER * F.softplus(vectors[0]), *gates)
            if torch.allclose(form(x), expected, rtol=_ATOL, atol=_ATOL * float(expected.abs().max())):
                return form
    return None


def _output_on_sample(module: nn.Module, x: Tensor) -> Tensor | None:
    light = copy.deepcopy(module).float()
    for name in [name for name, value in vars(light).items() if isinstance(value, Tensor)]:
        setattr(light, name, None)  # what it remembers of another text
    try:
        output = light(x[None], torch.arange(len(x))[None])
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # made for something else
        return None
    return output[0].float() if isinstance(output, Tensor) and output.shape == (1, *x.shape) else None


def lower_recurrence(builder: PlanBuilder, call: NodeCall) -> Rows | NotImplementedType:
    """The steps of a recurrence, where a module computes one of its operands."""
    args = call.args
    if call.kwargs or len(args) != 2 or not isinstance(args[0], Rows) or not isinstance(args[1], Positional):
        return NotImplemented
    form = recognise_rg_lru(call.module) if call.module is not None and args[0].index.dim() == 3 else None
    if form is None:
        return NotImplemented
    return _append_recurrence_steps(builder, call.node, form, builder.materialised(args[0]))


def _append_recurrence_steps(builder: PlanBuilder, node: fx.Node, form: Recurrence, x: Rows) -> Rows:
    """Steps of one recurrence, elementwise ones one after another."""
    keeps = _append_sigmoid_gate(builder, node, "keeps", form.keeps, x)
    step = builder.elementwise_with_vector(node, "mul", keeps, form.decay)
    squared = builder.apply(builder.apply(builder.apply(step, torch.mul, -2.0), torch.exp), torch.mul, -1.0)
    share = builder.apply(builder.apply(squared, torch.add, 1.0), torch.sqrt)  # [b, t, channels]
    share = _set_first_token_to_one(builder, share)
    gated = builder.product(builder.product(x, _append_sigmoid_gate(builder, node, "takes", form.gate, x)), share)
    scaled = builder.product(gated, builder.apply(step, torch.reciprocal))
    register, lane = builder.register(scaled)
    one = builder.plan.append_step("clip", 1, x=builder.register(Rows(x.index[..., :1]))[0], least=1.0, most=1.0)
    rates = builder.plan.add_vector(f"{node.target}.rates", torch.full((x.index.shape[-1], 1), -1.0))
    fields: dict[str, Any] = {"b": one, "c": one, "gate": None, "skip": None, "bias": None, "softplus": False}
    dt = builder.register(step)[0]
    return builder.elementwise("selective", x.index.shape, lane, x=register, dt=dt, states=1, rates=rates, **fields)


def _append_sigmoid_gate(builder: PlanBuilder, node: fx.Node, name: str, gate: Gate, x: Rows) -> Rows:
    parts, width = [], gate.weight.shape[1]
    for head, (matrix, bias) in enumerate(zip(gate.weight, gate.bias, strict=True)):
        head_rows = Rows(x.index[..., head * width : (head + 1) * width])
        layer = linears.Linear((width, width), bias, weight=matrix.T.contiguous())
        path = f"{node.target}.{name}.{head}"
        parts.append(builder.lower_linear(node, head_rows, path, layer, weight_format="bf16").index)
    return builder.apply(Rows(torch.cat(parts, -1)), torch.sigmoid)


def _set_first_token_to_one(builder: PlanBuilder, x: Rows) -> Rows:
    """x, and one at a text's first token: x + first * (1 - x)."""
    plan = builder.plan
    rows = torch.zeros(plan.context, 1)
    rows[0] = 1.0
    name = plan.add_weight_entry(
        "first.rows", WeightEntry("f32", tuple(rows.shape), lambda: rows), ("first", plan.context)
    )
    first = Rows(builder.rows(plan.append_step("positions", 1, table=name)).view(*builder.shape, 1))
    complement = builder.apply(builder.apply(x, torch.mul, -1.0), torch.add, 1.0)
    return builder.elementwise_of_two("add", x, builder.product(complement, first))
