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
_MOST_GROUPS = 64
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
    kept: int = 1
    judges: int = 1
    normal: bool = False
    scale: float = 1.0
    eps: float = 1e-20

    def shares(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.kind == "softmax" else logits.sigmoid()

    def one_by_one(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers [n, count] of kind "near"."""
        left, weights, numbers = logits.clone(), [], []
        for _ in range(self.count):
            most, number = left.max(-1, keepdim=True)
            far = (most - logits) / torch.maximum(logits.abs(), most) > self.eps
            weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, number))
            numbers.append(number)
            left = left.scatter(-1, number, -torch.inf)
        return torch.cat(weights, -1), torch.cat(numbers, -1)

    def chosen(self, logits: Tensor, shift: Tensor | None) -> Tensor:
        """[n, count] numbers of experts, ascending."""
        scores = logits if self.kind == "logits" else self.shares(logits)
        scores = scores if shift is None else scores + shift
        if self.groups > 1:
            parts = scores.unflatten(-1, (self.groups, -1))
            best = parts.topk(self.judges, -1).values.sum(-1).topk(self.kept, -1).indices
            away = torch.ones_like(parts[..., 0], dtype=torch.bool).scatter(-1, best, False)
            scores = parts.masked_fill(away[..., None], -torch.inf).flatten(-2)
        return scores.topk(self.count, -1).indices.sort(-1).values


@dataclass(frozen=True)
class Sample:
    """What a router of random numbers made of random rows. `places`: of weights and of numbers in what it returns."""

    tensors: dict[str, Tensor]
    x: Tensor
    weights: Tensor
    numbers: Tensor
    places: tuple[int, int]


@torch.no_grad()
def recognise(
    module: nn.Module, shape: tuple[int, ...], more: dict[str, Tensor]
) -> tuple[Routing, tuple[int, int]] | None:
    """The rule of a router of rows, and where it returns weights and numbers; or None.

    shape  of the value that it is given, its last axis the numbers of a row
    more   tensors that it is called with, by names of ours
    """
    width = shape[-1]
    sample = _sample(module, width, more, len(shape))
    found = None if sample is None else ruled(module, width, sample)
    return (found, sample.places) if found and sample else _near(module, width, more, len(shape))


@torch.no_grad()
def recognise_scores(module: nn.Module, shape: tuple[int, ...]) -> tuple[Routing, int] | None:
    """The rule of a router that returns a score of every expert, nothing of those that it did not choose; and where."""
    tried = answers(module, shape[-1], {}, len(shape), 1.0)
    tensors, x, returned = tried or ({}, torch.zeros(0), ())
    for place, scores in enumerate(returned):
        if not (_is_choice(scores) and scores.is_floating_point()):
            continue
        given = scores != 0
        count = int(given[0].sum())
        if 0 < count < scores.shape[1] and bool((given.sum(1) == count).all()):
            numbers = given.nonzero()[:, 1].view(_ROWS, count)
            sample = Sample(tensors, x, scores.gather(-1, numbers).float(), numbers, (place, place))
            found = ruled(module, shape[-1], sample)
            if found is not None:
                return found, place
    return None


@torch.no_grad()
def tried(module: nn.Module, width: int, axes: int) -> tuple[dict[str, Tensor], Tensor, Tensor] | None:
    """Random tensors of a router, rows [n, width], and the logits [n, experts] that are all it gives; or None."""
    found = answers(module, width, {}, axes, 1.0)
    if found is None or len(found[2]) != 1 or not _is_choice(found[2][0]):
        return None
    return found[0], found[1], found[2][0]


def ruled(module: nn.Module, width: int, sample: Sample) -> Routing | None:
    """The rule by which a sample was chosen, of logits that a matrix makes; or None."""
    for logits, form in _logits(sample, width):
        for kind, groups in product(_KINDS, _groups(module, logits.shape[-1])):
            for shift in (None, *_vectors(sample, logits.shape[-1])):
                rule = Routing(*form, shift, kind, sample.numbers.shape[-1], *groups)
                found = _fitted(rule, logits, sample)
                if found is not None:
                    return found
    return None


def _near(module: nn.Module, width: int, more: dict[str, Tensor], axes: int) -> tuple[Routing, tuple[int, int]] | None:
    """The router that takes one expert after another, where this is one: of experts that are nearly alike."""
    sample = _sample(module, width, more, axes, apart=0.02)
    if sample is None:
        return None
    held = [value for value in vars(module).values() if isinstance(value, float) and value > 0]
    for logits, form in _logits(sample, width):
        for eps in dict.fromkeys(times * value for value in held for times in (1, 2)):
            rule = Routing(*form, None, "near", sample.numbers.shape[-1], eps=eps)
            weights, numbers = rule.one_by_one(logits)
            alike = torch.equal(numbers, sample.numbers)
            if alike and torch.allclose(weights, sample.weights, rtol=_RTOL, atol=1e-6):
                return rule, sample.places
    return None


def _fitted(rule: Routing, logits: Tensor, sample: Sample) -> Routing | None:
    """The rule with weights as the sample has them, where it chooses the same experts."""
    if rule.groups > 1 and rule.count > rule.kept * (logits.shape[-1] // rule.groups):
        return None
    chosen = rule.chosen(logits, None if rule.shift is None else sample.tensors[rule.shift].flatten())
    theirs, order = sample.numbers.sort(-1)
    if not torch.equal(chosen, theirs):
        return None
    wanted, ours = sample.weights.gather(-1, order), rule.shares(logits).gather(-1, chosen)
    for normal in (False, True):
        own = ours / ours.sum(-1, keepdim=True) if normal else ours
        scale = float((wanted * own).sum() / own.square().sum())
        if torch.allclose(own * scale, wanted, rtol=_RTOL, atol=1e-6):
            scale = round(scale, 4) if abs(scale - round(scale, 4)) < 1e-5 else scale
            return Routing(**{**vars(rule), "normal": normal, "scale": scale})
    return None


def _sample(module: nn.Module, width: int, more: dict[str, Tensor], axes: int, apart: float = 1.0) -> Sample | None:
    tried = answers(module, width, more, axes, apart)
    if tried is None:
        return None
    tensors, x, found = tried
    numbers = [i for i, t in enumerate(found) if _is_choice(t) and not t.is_floating_point()]
    weights = [
        i
        for i, t in enumerate(found)
        if numbers and _is_choice(t) and t.is_floating_point() and t.shape == found[numbers[0]].shape
    ]
    if len(numbers) != 1 or not weights:
        return None
    places = weights[-1], numbers[0]
    return Sample(tensors, x, found[places[0]].float(), found[places[1]], places)


def answers(
    module: nn.Module, width: int, more: dict[str, Tensor], axes: int, apart: float
) -> tuple[dict[str, Tensor], Tensor, tuple[Any, ...]] | None:
    """Tensors of a router that are random, rows, and what it returns of those.

    apart   how far rows of a matrix are from their mean, of what they would be at random
    """
    generator = torch.Generator().manual_seed(0)
    light = copy.deepcopy(module).float()
    for part in light.modules():
        tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for held in tables:
            for name, old in held.items():
                if old is not None and old.is_floating_point():
                    new = torch.randn(old.shape, generator=generator) * (width**-0.5 * 2 if old.dim() > 1 else 0.3)
                    if old.dim() > 1:
                        new = new.mean(0) + (new - new.mean(0)) * apart
                    held[name] = nn.Parameter(new, requires_grad=False) if held is part._parameters else new
    more = {name: torch.randn(tensor.shape, generator=generator) * 0.3 for name, tensor in more.items()}
    tensors = {name: t.detach() for name, t in (*light.named_parameters(), *light.named_buffers(), *more.items())}
    x = torch.randn((_ROWS, width), generator=generator)
    try:
        found = light(x.view(*[1] * (axes - 2), _ROWS, width), *more.values())
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # made for something else than rows
        return None
    return tensors, x, tuple(found) if isinstance(found, tuple | list) else (found,)


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


def _groups(module: nn.Module, experts: int) -> list[tuple[int, int, int]]:
    """Groups, how many are kept and how many judge, of the numbers that a router or its config holds."""
    held = [*vars(module).values(), *vars(getattr(module, "config", None) or object.__new__(_Nothing)).values()]
    numbers = sorted({n for n in held if type(n) is int and 1 <= n <= _MOST_GROUPS})
    several = [
        (groups, kept, judges)
        for groups in numbers
        for kept in numbers
        for judges in (1, 2)
        if groups > 1 and experts % groups == 0 and kept < groups and judges <= experts // groups
    ]
    return [(1, 1, 1), *several]


class _Nothing:
    pass
