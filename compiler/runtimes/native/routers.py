"""Routers, recognised by what they compute: which experts a token is given to, and with what weights."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 64  # that a router is tried on
_RTOL = 1e-4  # of weights in float32
_MAX_GROUPS = 64
_KINDS = ("softmax", "sigmoid", "logits")


@dataclass(frozen=True)
class Routing:
    """The `count` experts of the largest share, of the groups that are kept, and their shares, scaled.

    weight, bias   names of the router's tensors that make the logits
    shift          name of what is added to a share to choose by it, and to that alone
    judges         the best so many of a group are summed to choose groups
    kind           "softmax" or "sigmoid" shares; "logits": it chooses by logits, and weighs by their sigmoid
    eps            kind "near": one expert after another is chosen, by its share among those that are less than `eps` of
                   their size below it; else it is added to a sum of weights
    """

    weight: str
    bias: str | None
    shift: str | None
    kind: str
    count: int
    groups: int = 1
    n_groups_chosen: int = 1
    judges: int = 1
    normal: bool = False
    scale: float = 1.0
    eps: float = 1e-20

    def shares(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.kind == "softmax" else logits.sigmoid()

    def choose_sequentially(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers [n, count] of kind "near"."""
        left, weights, numbers = logits.clone(), [], []
        for _ in range(self.count):
            best, number = left.max(-1, keepdim=True)
            far = (best - logits) / torch.maximum(logits.abs(), best) > self.eps
            weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, number))
            numbers.append(number)
            left = left.scatter(-1, number, -torch.inf)
        return torch.cat(weights, -1), torch.cat(numbers, -1)

    def choose_experts(self, logits: Tensor, shift: Tensor | None) -> Tensor:
        """[n, count] numbers of experts, ascending."""
        scores = logits if self.kind == "logits" else self.shares(logits)
        scores = scores if shift is None else scores + shift
        if self.groups > 1:
            parts = scores.unflatten(-1, (self.groups, -1))
            best = parts.topk(self.judges, -1).values.sum(-1).topk(self.n_groups_chosen, -1).indices
            away = torch.ones_like(parts[..., 0], dtype=torch.bool).scatter(-1, best, False)
            scores = parts.masked_fill(away[..., None], -torch.inf).flatten(-2)
        return scores.topk(self.count, -1).indices.sort(-1).values


@dataclass(frozen=True)
class Sample:
    """Outputs of a router with random weights for random rows.

    `argument_positions`: of weights and of indices in what it returns.
    """

    tensors: dict[str, Tensor]
    x: Tensor
    weights: Tensor
    numbers: Tensor
    argument_positions: tuple[int, int]


@torch.no_grad()
def recognise_router(
    module: nn.Module, shape: tuple[int, ...], extra_tensors: dict[str, Tensor]
) -> tuple[Routing, tuple[int, int]] | None:
    """The rule of a router of rows, and where it returns weights and numbers; or None.

    shape  of the value that it is given, its last axis the numbers of a row
    extra_tensors   tensors that it is called with, by names of ours
    """
    width = shape[-1]
    sample = _run_sample(module, width, extra_tensors, len(shape))
    rule = None if sample is None else fit_routing(module, width, sample)
    return (
        (rule, sample.argument_positions)
        if rule and sample
        else _sequential_router(module, width, extra_tensors, len(shape))
    )


@torch.no_grad()
def recognise_dense_router(module: nn.Module, shape: tuple[int, ...]) -> tuple[Routing, int] | None:
    """The rule of a router that returns a score of every expert, nothing of those that it did not choose; and where."""
    trial = router_outputs(module, shape[-1], {}, len(shape), 1.0)
    tensors, x, returned = trial or ({}, torch.zeros(0), ())
    for index, scores in enumerate(returned):
        if not (_is_choice(scores) and scores.is_floating_point()):
            continue
        nonzero = scores != 0
        count = int(nonzero[0].sum())
        if 0 < count < scores.shape[1] and bool((nonzero.sum(1) == count).all()):
            numbers = nonzero.nonzero()[:, 1].view(_ROWS, count)
            sample = Sample(tensors, x, scores.gather(-1, numbers).float(), numbers, (index, index))
            rule = fit_routing(module, shape[-1], sample)
            if rule is not None:
                return rule, index
    return None


@torch.no_grad()
def sample_router(module: nn.Module, width: int, axes: int) -> tuple[dict[str, Tensor], Tensor, Tensor] | None:
    """Random tensors of a router, rows [n, width], and the logits [n, experts] that are all it gives; or None."""
    trial = router_outputs(module, width, {}, axes, 1.0)
    if trial is None or len(trial[2]) != 1 or not _is_choice(trial[2][0]):
        return None
    return trial[0], trial[1], trial[2][0]


def fit_routing(module: nn.Module, width: int, sample: Sample) -> Routing | None:
    """The rule by which a sample was chosen, of logits that a matrix makes; or None."""
    for logits, form in _logits(sample, width):
        for kind, groups in product(_KINDS, _candidate_groups(module, logits.shape[-1])):
            for shift in (None, *_vectors(sample, logits.shape[-1])):
                rule = Routing(*form, shift, kind, sample.numbers.shape[-1], *groups)
                fitted_rule = _with_fitted_weights(rule, logits, sample)
                if fitted_rule is not None:
                    return fitted_rule
    return None


def _sequential_router(
    module: nn.Module, width: int, extra_tensors: dict[str, Tensor], axes: int
) -> tuple[Routing, tuple[int, int]] | None:
    """The router that takes one expert after another, where this is one: of experts that are nearly alike."""
    sample = _run_sample(module, width, extra_tensors, axes, spread=0.02)
    if sample is None:
        return None
    floats = [value for value in vars(module).values() if isinstance(value, float) and value > 0]
    for logits, form in _logits(sample, width):
        for eps in dict.fromkeys(times * value for value in floats for times in (1, 2)):
            rule = Routing(*form, None, "near", sample.numbers.shape[-1], eps=eps)
            weights, numbers = rule.choose_sequentially(logits)
            same_experts = torch.equal(numbers, sample.numbers)
            if same_experts and torch.allclose(weights, sample.weights, rtol=_RTOL, atol=1e-6):
                return rule, sample.argument_positions
    return None


def _with_fitted_weights(rule: Routing, logits: Tensor, sample: Sample) -> Routing | None:
    """The rule with weights as the sample has them, where it chooses the same experts."""
    if rule.groups > 1 and rule.count > rule.n_groups_chosen * (logits.shape[-1] // rule.groups):
        return None
    chosen = rule.choose_experts(logits, None if rule.shift is None else sample.tensors[rule.shift].flatten())
    expected_numbers, order = sample.numbers.sort(-1)
    if not torch.equal(chosen, expected_numbers):
        return None
    expected, shares_chosen = sample.weights.gather(-1, order), rule.shares(logits).gather(-1, chosen)
    for normal in (False, True):
        normalised = shares_chosen / shares_chosen.sum(-1, keepdim=True) if normal else shares_chosen
        scale = float((expected * normalised).sum() / normalised.square().sum())
        if torch.allclose(normalised * scale, expected, rtol=_RTOL, atol=1e-6):
            scale = round(scale, 4) if abs(scale - round(scale, 4)) < 1e-5 else scale
            return Routing(**{**vars(rule), "normal": normal, "scale": scale})
    return None


def _run_sample(
    module: nn.Module, width: int, extra_tensors: dict[str, Tensor], axes: int, spread: float = 1.0
) -> Sample | None:
    trial = router_outputs(module, width, extra_tensors, axes, spread)
    if trial is None:
        return None
    tensors, x, outputs = trial
    numbers = [i for i, t in enumerate(outputs) if _is_choice(t) and not t.is_floating_point()]
    weights = [
        i
        for i, t in enumerate(outputs)
        if numbers and _is_choice(t) and t.is_floating_point() and t.shape == outputs[numbers[0]].shape
    ]
    if len(numbers) != 1 or not weights:
        return None
    order = weights[-1], numbers[0]
    return Sample(tensors, x, outputs[order[0]].float(), outputs[order[1]], order)


def router_outputs(
    module: nn.Module, width: int, extra_tensors: dict[str, Tensor], axes: int, spread: float
) -> tuple[dict[str, Tensor], Tensor, tuple[Any, ...]] | None:
    """Tensors of a router that are random, rows, and what it returns of those.

    spread   how far rows of a matrix are from their mean, of what they would be at random
    """
    generator = torch.Generator().manual_seed(0)
    light = copy.deepcopy(module).float()
    for part in light.modules():
        tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for table in tables:
            for name, old in table.items():
                if old is not None and old.is_floating_point():
                    new = torch.randn(old.shape, generator=generator) * (width**-0.5 * 2 if old.dim() > 1 else 0.3)
                    if old.dim() > 1:
                        new = new.mean(0) + (new - new.mean(0)) * spread
                    table[name] = nn.Parameter(new, requires_grad=False) if table is part._parameters else new
    extra_tensors = {
        name: torch.randn(tensor.shape, generator=generator) * 0.3 for name, tensor in extra_tensors.items()
    }
    tensors = {
        name: t.detach() for name, t in (*light.named_parameters(), *light.named_buffers(), *extra_tensors.items())
    }
    x = torch.randn((_ROWS, width), generator=generator)
    try:
        output = light(x.view(*[1] * (axes - 2), _ROWS, width), *extra_tensors.values())
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # made for something else than rows
        return None
    return tensors, x, tuple(output) if isinstance(output, tuple | list) else (output,)


def _is_choice(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and len(value) == _ROWS


def _vectors(sample: Sample, experts: int) -> list[str]:
    return [name for name, tensor in sample.tensors.items() if tensor.numel() == experts]


def _logits(sample: Sample, width: int) -> Iterator[tuple[Tensor, tuple[str, str | None]]]:
    for name, weight in sample.tensors.items():
        if weight.dim() == 2 and weight.shape[1] == width:
            logits = sample.x @ weight.T
            for bias in (None, *_vectors(sample, len(weight))):
                yield logits if bias is None else logits + sample.tensors[bias].flatten(), (name, bias)


def _candidate_groups(module: nn.Module, experts: int) -> list[tuple[int, int, int]]:
    """Groups, how many are kept and how many judge, of the numbers that a router or its config holds."""
    values = [*vars(module).values(), *vars(getattr(module, "config", None) or object.__new__(_NoOutput)).values()]
    numbers = sorted({n for n in values if type(n) is int and 1 <= n <= _MAX_GROUPS})
    several = [
        (groups, top_groups, judges)
        for groups in numbers
        for top_groups in numbers
        for judges in (1, 2)
        if groups > 1 and experts % groups == 0 and top_groups < groups and judges <= experts // groups
    ]
    return [(1, 1, 1), *several]


class _NoOutput:
    pass
