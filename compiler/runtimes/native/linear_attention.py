"""Linear attention whose past fades by a rate of each head (lightning attention), recognised by what it computes.

A token is given the sum of v_j * (q . k_j) * exp(-rate * distance) over itself and all before it: a scan of one decay
for each head, whose time steps are one, computes it. Around that are one layer of queries, keys and values, a norm over
all heads and a gate. Source: MiniMax-01 (arXiv 2501.08313), section 2.2; Qin et al. 2024 (arXiv 2401.04658).
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product
from types import NotImplementedType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...ir.layers import leaves
from . import norms
from .plan_builder import PlanBuilder
from .rule import NodeCall
from .trees import leaves as leaves_of
from .trees import mapped
from .values import CACHE, Positional, Rows

_LENGTH, _BLOCK = 5, 2  # tokens that a layer is tried on, and in what it may cut them
_SHARE = 1e-4  # of outputs of size one, in float32


@dataclass(frozen=True)
class LinearAttention:
    """out(norm(sum) * sigmoid(gate(x))); queries, keys and values are act(inputs(x)).

    by_head   whether those of a head lie side by side; else all queries, all keys, all values
    order     of queries, keys and values there
    rates     [heads] > 0
    """

    inputs: str
    gate: str
    out: str
    norm: str
    act: str
    by_head: bool
    order: tuple[int, int, int]
    rates: Tensor

    def parts(self, qkv: Tensor) -> list[Tensor]:
        """[..., 3 * heads * d] -> queries, keys and values [..., heads, d]."""
        heads = len(self.rates)
        axis = -2 if self.by_head else -3
        parts = qkv.unflatten(-1, (heads, 3, -1) if self.by_head else (3, heads, -1)).unbind(axis)
        return [parts[i] for i in self.order]

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        """x [tokens, width] from a text's first token on."""
        q, k, v = self.parts(
            _run_submodule_in_float32(module, self.act, _run_submodule_in_float32(module, self.inputs, x))
        )
        distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
        fading = (-self.rates[:, None, None] * distance).exp().masked_fill(distance < 0, 0.0)
        summed = torch.einsum("ihd,jhd,hij,jhe->ihe", q, k, fading, v).flatten(1)
        return _run_submodule_in_float32(
            module,
            self.out,
            _run_submodule_in_float32(module, self.norm, summed)
            * _run_submodule_in_float32(module, self.gate, x).sigmoid(),
        )


def lower_linear_attention(builder: PlanBuilder, call: NodeCall) -> Rows | tuple[Rows, None] | NotImplementedType:
    """The steps of such a layer, where a module is one."""
    node, module, args, kwargs = call.node, call.module, call.args, call.kwargs
    if module is None:
        return NotImplemented
    rows = [x for x in leaves_of((args, kwargs)) if isinstance(x, Rows)]
    if len(rows) != 1 or rows[0].index.dim() != 3 or not any(p.dim() == 2 for p in module.parameters()):
        return NotImplemented
    recognised = recognise_linear_attention(builder, module, rows[0], args, kwargs)
    if recognised is None:
        return NotImplemented
    form, is_tuple = recognised
    rows_out = _append_linear_attention_steps(builder, node, module, form, builder.materialised(rows[0]))
    return (rows_out, None) if is_tuple else rows_out


@torch.no_grad()
def recognise_linear_attention(
    builder: PlanBuilder, module: nn.Module, rows: Rows, args: Any, kwargs: Any
) -> tuple[LinearAttention, bool] | None:
    """Decay of a linear attention, and whether it returns more than its output; None for another layer."""
    forms = [*_candidate_linear_attentions(module, rows.index.shape[-1])]
    if not forms:
        return None
    dtype = next(module.parameters()).dtype
    x = torch.randn((_LENGTH, rows.index.shape[-1]), generator=torch.Generator().manual_seed(0)).to(dtype)

    def operand(value: Any) -> Any:
        if isinstance(value, Positional):
            return builder.positions.at(value.node, _LENGTH)
        return x[None] if isinstance(value, Rows) else None if value is CACHE else value

    def matches(layer: nn.Module) -> Any:
        try:
            return layer(*mapped(args, operand), **mapped(kwargs, operand))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # made for something else
            return None

    expected = matches(module)
    expected_tensor = expected[0] if isinstance(expected, tuple) else expected
    if not isinstance(expected_tensor, Tensor) or expected_tensor.shape != (1, *x.shape):
        return None
    bound = (_SHARE if dtype == torch.float32 else 2e-2) * float(expected_tensor.abs().max())
    cut = [
        output[0] if isinstance(output, tuple) else output
        for output in map(matches, _variants_with_small_blocks(module))
    ]
    variants = [output for output in cut if isinstance(output, Tensor) and output.shape == expected_tensor.shape]
    for form in forms:
        computed = form(module, x.float())
        if all(float((output[0].float() - computed).abs().max()) <= bound for output in (expected_tensor, *variants)):
            return form, isinstance(expected, tuple)
    return None


def _variants_with_small_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The module with a number that it holds made small: texts may be cut into blocks of so many tokens."""
    for name, value in vars(module).items():
        if type(value) is int and value > _LENGTH:
            light = copy.copy(module)
            setattr(light, name, _BLOCK)
            yield light


def _candidate_linear_attentions(module: nn.Module, width: int) -> Iterator[LinearAttention]:
    children = dict(module.named_children())
    layers = {name: tuple(p.weight.shape) for name, p in children.items() if isinstance(p, nn.Linear)}
    bare = [name for name, part in children.items() if leaves.module_role(part) == "activation"]
    normal = [name for name, part in children.items() if leaves.module_role(part) == "norm"]
    vectors_and_buffers = [
        t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if t is not None
    ]
    for qkv_name, gate, out in permutations(layers, 3):
        inner = layers[gate][0]
        if (layers[qkv_name], layers[gate], layers[out]) != ((3 * inner, width), (inner, width), (width, inner)):
            continue
        rates = [t.detach().float().flatten() for t in vectors_and_buffers if t.numel() == max(t.shape, default=0) > 0]
        rates = [t for t in rates if inner % len(t) == 0 and bool((t > 0).all())]
        for norm, act, by_head, rate in product(normal, bare, (True, False), rates):
            for order in permutations(range(3), 3):
                yield LinearAttention(qkv_name, gate, out, norm, act, by_head, order, rate)


def _run_submodule_in_float32(module: nn.Module, name: str, x: Tensor) -> Tensor:
    part = module.get_submodule(name)
    if isinstance(part, nn.Linear):
        return F.linear(x, part.weight.float(), None if part.bias is None else part.bias.float())
    return part(x.to(next((p.dtype for p in part.parameters()), x.dtype))).float()


def _append_linear_attention_steps(
    builder: PlanBuilder, node: fx.Node, module: nn.Module, form: LinearAttention, x: Rows
) -> Rows:
    qkv = builder.apply(builder.lower_submodule(node, form.inputs, x), module.get_submodule(form.act))
    q, k, v = (Rows(part) for part in form.parts(qkv.index))  # [b, t, heads, d]
    heads, width = v.index.shape[2:]
    register, lane = builder.register(v)
    one = builder.plan.append_step("clip", len(lane.columns), x=register, least=1.0, most=1.0)
    ones = builder.plan.materialize_columns(builder.plan.layout.columns(one)[:heads])
    operands = {"x": register, "dt": ones, "b": builder.register(k)[0], "c": builder.register(q)[0]}
    sizes = {"heads": heads, "head_dim": width, "groups": heads, "states": width}
    rates = builder.plan.add_vector(f"{node.target}.rates", -form.rates)
    plain: dict[str, Any] = {"skip": None, "bias": None, "softplus": False, "least": 0.0, "most": None}
    summed = builder.elementwise("ssd", v.index.shape, lane, **operands, **sizes, rates=rates, **plain)
    normal = norms.lower_norm_of(builder, node, module.get_submodule(form.norm), Rows(summed.index.flatten(2)))
    opened = builder.apply(builder.lower_submodule(node, form.gate, x), torch.sigmoid)
    return builder.lower_submodule(node, form.out, builder.product(normal, opened))
