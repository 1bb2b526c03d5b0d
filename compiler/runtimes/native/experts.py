"""Experts of a layer, recognised by what their module computes: layers of each expert, and functions between them.

The experts of a layer are one module, with the weights of all in tensors of three axes; how these meet is found by
trying, on copies that have no more than two of the experts.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice, permutations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ...ir.layers import leaves

_ATOL = 1e-4  # of outputs of size one, in float32
_ROWS = 3  # that an expert is tried on


class ExpertLayer(NamedTuple):
    """Linear layer of each expert: weights [experts, out, in], one after another, and a bias [experts, out]."""

    name: str
    weights: tuple[Tensor, ...]
    bias: Tensor | None

    @property
    def outputs(self) -> int:
        return sum(w.shape[1] for w in self.weights)


@dataclass(frozen=True)
class Experts:
    """Layers of each expert, one after another.

    middles  graphs between them, of the numbers that the layer before makes
    idle     so many more that a router may choose give back what they are given
    """

    layers: tuple[ExpertLayer, ...]
    middles: tuple[fx.GraphModule, ...] = ()
    idle: int = 0

    def __call__(self, x: Tensor, expert_indices: Tensor, weights: Tensor) -> Tensor:
        """Sum [n, out] over the experts of each row x [n, in]; `expert_indices` and `weights` are [n, count]."""
        inner = x[:, None].expand(-1, expert_indices.shape[1], -1)
        for layer, middle in zip(self.layers, (*self.middles, None), strict=True):
            inner = torch.einsum("tki,tkoi->tko", inner, torch.cat(layer.weights, 1)[expert_indices])
            inner = inner if layer.bias is None else inner + layer.bias[expert_indices]
            inner = inner if middle is None else middle(inner)
        return (inner * weights[..., None]).sum(1)

    @property
    def count(self) -> int:
        """Experts that have weights."""
        return min(len(weight) for layer in self.layers for weight in layer.weights)

    @property
    def outputs(self) -> int:
        return self.layers[-1].outputs

    @property
    def keeps_zeros(self) -> bool:
        """Whether every expert makes zeros of zeros, as far as its first says."""
        x, numbers = torch.zeros(1, self.layers[0].weights[0].shape[2]), torch.zeros(1, 1, dtype=torch.int64)
        first = replace(
            self, layers=tuple(ExpertLayer(n, tuple(w[:1].float() for w in ws), b) for n, ws, b in self.layers)
        )
        return not first(x, numbers, torch.ones(1, 1)).any()

    def with_layer_prefix(self, path: str) -> "Experts":
        """Experts whose layers are named by the module that has them."""
        return replace(self, layers=tuple(layer._replace(name=path + layer.name) for layer in self.layers))


class Assignment(NamedTuple):
    """Rows [n, in] that are given to experts, with numbers and weights [n, count]."""

    x: Tensor
    numbers: Tensor
    weights: Tensor


Run = Callable[[nn.Module, Assignment], Tensor]  # output of a module of experts for rows that are given to them


def recognise_experts(module: nn.Module, width: int, n_experts: int, run: Run) -> Experts | None:
    """Experts that a module computes where each row is given to several, which it sums by their weights; or None."""
    real = _num_experts_with_weights(module, n_experts)
    if real is None:
        return None
    light, picked, idle = _module_of_few_experts(module, n_experts, real)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((_ROWS, width), generator=generator)
    weights = torch.rand((_ROWS, 1 + len(picked)), generator=generator)
    sample = Assignment(x, torch.arange(len(picked)).repeat(_ROWS, 1), weights[:, : len(picked)])
    number = _matching_form_index(light, width, len(picked) + idle, sample, _run_output_or_none(run, light, sample))
    if number is None or not idle:
        return None if number is None else _candidate_by_index(module, width, n_experts, number)
    both = Assignment(x, torch.tensor([[0, len(picked)]] * _ROWS), weights[:, :2])
    with_idle, first = _run_output_or_none(run, light, both), Assignment(x, both.numbers[:, :1], weights[:, :1])
    form = _candidate_by_index(light, width, len(picked) + idle, number)
    back = with_idle is not None and _computes_expected_output(form, first, with_idle - x * weights[:, 1:2])
    return replace(_candidate_by_index(module, width, n_experts, number), idle=n_experts - real) if back else None


def recognise_dispatched_experts(module: nn.Module, width: int, n_experts: int, run: Run) -> Experts | None:
    """Experts that a module computes on rows in the order of the experts that each of them is given to; or None."""
    if _num_experts_with_weights(module, n_experts) != n_experts:
        return None
    light, picked, _ = _module_of_few_experts(module, n_experts, n_experts)
    x = torch.randn((len(picked) * _ROWS, width), generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(len(picked)).repeat_interleave(_ROWS)[:, None]
    sample = Assignment(x, numbers, torch.ones(len(x), 1))
    number = _matching_form_index(light, width, len(picked), sample, _run_output_or_none(run, light, sample))
    return None if number is None else _candidate_by_index(module, width, n_experts, number)


def _num_experts_with_weights(module: nn.Module, num_experts: int) -> int | None:
    """Experts that a module has weights of; None where its router knows of others."""
    real = min((len(p) for p in module.parameters() if p.dim() == 3), default=num_experts)
    return None if any(p.dim() == 3 and len(p) not in (real, num_experts) for p in module.parameters()) else real


@torch.no_grad()
def _run_output_or_none(run: Run, module: nn.Module, sample: Assignment) -> Tensor | None:
    try:
        return run(module, sample).float().view(len(sample.x), -1)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # made for something else
        return None


@torch.no_grad()
def _matching_form_index(
    module: nn.Module, width: int, n_experts: int, sample: Assignment, expected: Tensor | None
) -> int | None:
    """Number of the first form that gives the output of a sample, or None."""
    if expected is None:
        return None
    forms = enumerate(_candidate_experts(module, width, n_experts))
    return next((index for index, form in forms if _computes_expected_output(form, sample, expected)), None)


def _computes_expected_output(form: Experts, sample: Assignment, expected: Tensor) -> bool:
    try:
        actual = form(*sample)
    except RuntimeError:  # shapes that do not meet
        return False
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=_ATOL, atol=_ATOL)


def _candidate_by_index(module: nn.Module, width: int, experts: int, form_index: int) -> Experts:
    return next(islice(_candidate_experts(module, width, experts), form_index, None))


def _module_of_few_experts(module: nn.Module, n_experts: int, n_real_experts: int) -> tuple[nn.Module, Tensor, int]:
    """Experts of which a few are there, in float32, without a copy of the others; which; and how many idle ones."""
    picked, idle = (
        torch.tensor([0, n_real_experts - 1][:n_real_experts]),
        min(n_experts - n_real_experts, len([0, 1][:n_real_experts])),
    )
    idle = min(idle, 1) if n_experts != 2 * n_real_experts else idle  # numbers of as many mean the same
    with_idle = torch.cat([picked, torch.arange(n_real_experts, n_real_experts + idle)])
    index_by_count = {n_experts: with_idle, n_real_experts: picked}

    def fewer(p: Tensor) -> nn.Parameter:
        if p.dim() == 2 and len(p) not in index_by_count and len(p) % n_experts == 0:  # one expert after another
            return nn.Parameter(p.view(n_experts, -1, p.shape[1])[with_idle].flatten(0, 1).float(), requires_grad=False)
        return nn.Parameter((p[index_by_count[len(p)]] if len(p) in index_by_count else p).float(), requires_grad=False)

    light = copy.deepcopy(module, {id(p): fewer(p.detach()) for p in module.parameters()})
    sizes = {n_experts - n_real_experts: idle, n_real_experts: len(picked), n_experts: len(with_idle)}
    for part in light.modules():
        for name, value in [*vars(part).items()]:
            if type(value) is int and value in sizes and "expert" in name:
                setattr(part, name, sizes[value])
    return light, picked, idle


def _candidate_experts(module: nn.Module, width: int, n_experts: int) -> Iterator[Experts]:
    """Ways in which tensors of three axes may meet, in an order that does not depend on how many experts there are."""
    parameters = [p.detach() for p in module.parameters()]
    solid = [p for p in parameters if p.dim() == 3]
    if not solid:  # one expert after another
        rows = [p for p in parameters if p.dim() == 2 and p.shape[1] == width and len(p) % n_experts == 0]
        solid = [p.view(n_experts, -1, width) for p in rows]
    flat = [None, *(p for p in parameters if p.dim() == 2)]
    for *first, last in permutations(solid):
        for turned, back in product((False, True), repeat=2):
            up, down = tuple(w.mT if turned else w for w in first), last.mT if back else last
            if any(w.shape[2] != width for w in up) or (up and down.shape[1] != width):
                continue
            for up_bias, down_bias in product(flat, repeat=2):
                layers = ExpertLayer(".up", up, up_bias), ExpertLayer(".down", (down,), down_bias)
                if up and all(layer.bias is None or layer.bias.shape[1] == layer.outputs for layer in layers):
                    yield from (Experts(layers, (middle,)) for middle in _candidate_activation_graphs(module))
    for weight, bias in product(chain.from_iterable((w, w.mT) for w in solid), flat):
        if weight.shape[2] == width and (bias is None or bias.shape == weight.shape[:2]):
            yield Experts((ExpertLayer("", (weight,), bias),))


class _ModuleFunction(nn.Module):
    """Function that a module runs between its layers, where it has one."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        gate: Any = self.module._apply_gate  # a method of classes that have it
        return gate(x)


class _Gated(nn.Module):
    """The first half by an activation, times the second."""

    def __init__(self, act: nn.Module):
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return self.act(first) * second


class _NoGate(_Gated):
    """No gate."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return True


def _candidate_activation_graphs(module: nn.Module) -> Iterator[fx.GraphModule]:
    acts = [part for part in module.modules() if leaves.module_role(part) == "activation"]
    for root in (
        *([_ModuleFunction(module)] if hasattr(module, "_apply_gate") else ()),
        *map(_Gated, acts),
        *map(_NoGate, acts),
    ):
        try:
            yield fx.GraphModule(root, _Tracer().trace(root))
        except (fx.proxy.TraceError, TypeError, AttributeError):  # it asks for numbers
            continue
