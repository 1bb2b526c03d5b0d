"""Norms, recognised by what they compute: kind, epsilon, gain and shift are found from outputs."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import reductions
from .layout import IrregularColumns
from .plan_builder import PlanBuilder
from .rule import NodeCall
from .values import Rows

GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": nn.functional.silu, "sigmoid": torch.sigmoid}
_SHARE = 2e-5  # of float32: sums in another order, and the gain is read off one sample


@dataclass(frozen=True)
class Norm:
    """y = normal(x) * gain + shift over the last axis; gain and shift in the shape of x without its rows."""

    kind: str
    eps: float
    gain: Tensor
    shift: Tensor


def normalize(x: Tensor, kind: str, eps: float) -> Tensor:
    """x over its root mean square ("rms"), or less its mean over its deviation ("layer"), on the last axis."""
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@torch.no_grad()
def recognise_norm(module: nn.Module, shape: torch.Size) -> Norm | None:
    """The norm that a module computes of x [shape], or None. Gain and shift come back in that shape."""
    module = copy.deepcopy(module).float().eval()
    generator = torch.Generator().manual_seed(0)
    x = (1 + torch.rand(shape, generator=generator)) * torch.randn(shape, generator=generator).sign()
    small = torch.randn(shape, generator=generator) * 3e-3  # where epsilon is felt
    y, opposite, probe = module(x), module(-x), module(small)
    if y.shape != shape:
        return None
    shift, antisymmetric = (y + opposite) / 2, (y - opposite) / 2
    for kind in ("rms", "layer"):
        for eps in _candidate_epsilons(module):
            gain = antisymmetric / normalize(x, kind, eps)
            # The same gain for all rows, and for a sample of another size: so it is this norm and epsilon.
            if _are_rows_equal(gain) and _close(probe, normalize(small, kind, eps) * gain + shift):
                return Norm(kind, eps, _matching_parameter(gain, module), _matching_parameter(shift, module))
    return None


@torch.no_grad()
def recognise_inverse_rms(module: nn.Module, shape: torch.Size) -> float | None:
    """The epsilon of a module that gives one over the root mean square of x [shape], a number for each row; or None."""
    module, generator = copy.deepcopy(module).float().eval(), torch.Generator().manual_seed(0)
    samples = [torch.randn(shape, generator=generator) * size for size in (1.0, 3e-3)]  # the second feels epsilon
    expected = [module(x) for x in samples]
    if expected[0].shape != (*shape[:-1], 1):
        return None
    for eps in _candidate_epsilons(module):
        actual = [torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) for x in samples]
        if all(torch.allclose(a, b, rtol=_SHARE) for a, b in zip(actual, expected, strict=True)):
            return eps
    return None


@dataclass(frozen=True)
class GatedNorm:
    """Root mean square over groups of channels, times gain, and a function of a gate before it or behind."""

    eps: float
    group: int
    gain: Tensor
    gate_first: bool
    gate: str = "silu"


@torch.no_grad()
def recognise_gated_norm(module: nn.Module, shape: torch.Size) -> GatedNorm | None:
    """The gated norm that a module computes of x and a gate [shape], or None."""
    module, width = copy.deepcopy(module).float().eval(), shape[-1]
    generator = torch.Generator().manual_seed(0)
    samples = [
        (torch.randn(shape, generator=generator) * size, torch.randn(shape, generator=generator))
        for size in (1.0, 3e-3)
    ]  # the second feels epsilon
    try:
        expected = [module(x, gate) for x, gate in samples]
    except (RuntimeError, TypeError, ValueError, IndexError):  # made for two values of other shapes
        return None
    if any(not isinstance(y, Tensor) for y in expected):
        return None
    gains = [p.flatten() for p in module.parameters() if p.numel() == width]
    sizes = [
        n
        for value in vars(module).values()
        if type(value) is int and 0 < value <= width and width % value == 0
        for n in (value, width // value)
    ]
    for form in product(_candidate_epsilons(module), dict.fromkeys((width, *sizes)), gains, (True, False), GATES):
        known = GatedNorm(*form)
        if all(_close(y, gated_norm(known, x, gate)) for y, (x, gate) in zip(expected, samples, strict=True)):
            return known
    return None


def gated_norm(norm: GatedNorm, x: Tensor, gate: Tensor) -> Tensor:
    opened = GATES[norm.gate](gate)
    x = x * opened if norm.gate_first else x
    y = normalize(x.unflatten(-1, (-1, norm.group)), "rms", norm.eps).flatten(-2) * norm.gain
    return y if norm.gate_first else y * opened


def _matching_parameter(measured: Tensor, module: nn.Module) -> Tensor:
    """A parameter of the module, or one more than it, where that is what was found: without the rounding."""
    for parameter in module.parameters():
        for exact in (parameter, 1 + parameter):
            try:
                exact_value = exact.expand_as(measured)
            except RuntimeError:  # of another shape
                continue
            if torch.allclose(measured, exact_value, rtol=1e-5, atol=1e-6):
                return exact_value
    return measured


def _are_rows_equal(gain: Tensor) -> bool:
    rows = gain.reshape(gain.shape[0], -1) if gain.dim() > 1 else gain[None]
    return bool(torch.isfinite(gain).all()) and _close(rows, rows[:1].expand_as(rows))


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, rtol=_SHARE, atol=_SHARE * max(1.0, float(b.abs().max()))))


def _candidate_epsilons(module: nn.Module) -> Iterator[float]:
    """Small numbers that the module or its parts hold."""
    candidates = [
        value
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, float) and 0 <= value < 0.1
    ]
    return iter(dict.fromkeys([*candidates, 1e-5, 1e-6, torch.finfo(torch.float32).eps, 0.0]))


def lower_norm(builder: PlanBuilder, call: NodeCall) -> Rows:
    assert call.module is not None, f"{call.node.name} calls no module"
    return lower_norm_of(builder, call.node, call.module, call.first)


def lower_norm_of(builder: PlanBuilder, node: fx.Node, module: nn.Module, x: Rows) -> Rows:
    """The step of a norm, or those of one over the root of a mean square."""
    x = builder.materialised(x)
    norm = recognise_norm(module, x.index.shape)
    eps = recognise_inverse_rms(module, x.index.shape) if norm is None else None
    if eps is not None:
        return reductions.inverse_root(builder, node, x, eps)
    if norm is None:
        raise builder.rejection(node, f"a {type(module).__name__} is no norm that the engine has")
    register, lane = builder.register(x)
    width, group = builder.plan.layout.widths[register], x.index.shape[-1]
    _, token = builder.plan.layout.registers_and_tokens(x.index.reshape(-1, group))
    if not torch.equal(token, token[:, :1].expand_as(token)):
        raise IrregularColumns
    fields: dict[str, Any] = {"weight": None, "bias": None}
    for key, values, idle in (("weight", norm.gain, 1.0), ("bias", norm.shift, 0.0)):
        vector = values.reshape(-1)[lane.order].view(builder.plan.layout.tokens, -1)[0]
        if not torch.allclose(vector, torch.full_like(vector, idle), rtol=0, atol=1e-6):
            short = vector[:group].expand(width // group, group)
            if torch.allclose(vector.view(-1, group), short, rtol=1e-6, atol=1e-7):
                vector = short[0]
            fields[key] = builder.plan.add_vector(f"{node.target}.{key}", vector)
    return builder.elementwise(
        "norm", x.index.shape, lane, x=register, kind=norm.kind, eps=norm.eps, group=group, **fields
    )
