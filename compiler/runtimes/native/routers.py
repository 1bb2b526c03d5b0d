"""Routers, recognised by what they compute: which experts a token is given to, and with what weights."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_RTOL = 1e-4  # of weights in float32
_MAX_GROUPS = 64
_KINDS = ("softmax", "sigmoid", "logits")


@dataclass(frozen=True)
class Routing:
    """The `count` experts of the largest share, of the groups that are kept, and their shares, scaled.

    weight, bias       names of the router's tensors that make the logits
    correction_bias    name of what is added to a share to choose by it, and to that alone (DeepSeek-V3's term)
    scores_per_group   number of a group's largest scores whose sum ranks the group
    kind               "softmax" or "sigmoid" shares; "logits": it chooses by logits, and weighs by their sigmoid
    eps                kind "near": one expert after another is chosen, by its share among those that are less than
                       `eps` of their size below it; else it is added to a sum of weights
    """

    weight: str
    bias: str | None
    correction_bias: str | None
    kind: str
    count: int
    groups: int = 1
    n_groups_chosen: int = 1
    scores_per_group: int = 1
    normal: bool = False
    scale: float = 1.0
    eps: float = 1e-20

    @property
    def choice(self) -> tuple[object, ...]:
        """Parts of the rule that choose, whatever the weights are."""
        return (
            self.weight,
            self.bias,
            self.correction_bias,
            self.count,
            self.groups,
            self.n_groups_chosen,
            self.scores_per_group,
        )

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

    def top_k_experts(self, logits: Tensor, correction_bias: Tensor | None) -> Tensor:
        """[n, count] numbers of experts, ascending."""
        scores = logits if self.kind == "logits" else self.shares(logits)
        scores = scores if correction_bias is None else scores + correction_bias
        if self.groups > 1:
            parts = scores.unflatten(-1, (self.groups, -1))
            best = parts.topk(self.scores_per_group, -1).values.sum(-1).topk(self.n_groups_chosen, -1).indices
            away = torch.ones_like(parts[..., 0], dtype=torch.bool).scatter(-1, best, False)
            scores = parts.masked_fill(away[..., None], -torch.inf).flatten(-2)
        return scores.topk(self.count, -1).indices.sort(-1).values


@dataclass(frozen=True)
class RoutingSample:
    """Choices of a router for random rows.

    tensors  of the router, by name
    x        [n, width]
    numbers  [n, count] of the experts that are chosen
    weights  [n, count]; None where nothing was seen of them
    """

    tensors: dict[str, Tensor]
    x: Tensor
    numbers: Tensor
    weights: Tensor | None


class RandomRouter:
    """Copy of a router with random weights.

    Vectors, among them corrections of shares, are drawn from [0, 1). A group filter that fills experts with 0 agrees
    with the engine's only in that range: where a checkpoint's shares plus corrections fall below 0, only the logits
    that emission compares can show it.

    spread   of a matrix's rows around their mean, as a share of that of random ones
    extra    tensors that it is called with behind its rows
    """

    def __init__(self, module: nn.Module, extra: list[Tensor | None], width: int, spread: float):
        generator = torch.Generator().manual_seed(0)
        self.module = copy.deepcopy(module).float()
        for part in self.module.modules():
            tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for table in tables:
                for name, old in table.items():
                    if old is not None and old.is_floating_point():
                        new = torch.rand(old.shape, generator=generator)  # more than zeros, with shares added or not
                        if old.dim() > 1:
                            new = torch.randn(old.shape, generator=generator) * width**-0.5 * 2
                            new = new.mean(0) + (new - new.mean(0)) * spread
                        table[name] = nn.Parameter(new, requires_grad=False) if table is part._parameters else new
        self.extra = [None if t is None else torch.rand(t.shape, generator=generator) for t in extra]
        self.tensors = named_tensors(self.module, self.extra)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Any:
        return self.module(x, *self.extra)


def named_tensors(module: nn.Module, extra: list[Tensor | None]) -> dict[str, Tensor]:
    """Tensors of a router and of its call."""
    extra_tensors = {f"given.{i}": t for i, t in enumerate(extra) if t is not None}
    named = (*module.named_parameters(), *module.named_buffers(), *extra_tensors.items())
    return {name: tensor.detach() for name, tensor in named}


@torch.no_grad()
def infer_routing(module: nn.Module, sample: RoutingSample) -> Routing | None:
    """The rule by which a sample was chosen, of logits that a matrix makes; or None."""
    for logits, form in _candidate_logits(sample):
        for kind, groups in product(_KINDS, _candidate_expert_groups(module, logits.shape[-1])):
            for correction_bias in (None, *_vectors(sample, logits.shape[-1])):
                rule = Routing(*form, correction_bias, kind, sample.numbers.shape[-1], *groups)
                fitted_rule = _with_fitted_weights(rule, logits, sample)
                if fitted_rule is not None:
                    return fitted_rule
    return None


@torch.no_grad()
def infer_sequential_routing(module: nn.Module, sample: RoutingSample) -> Routing | None:
    """The rule of a router that takes one expert after another, of a sample whose experts are nearly alike; or None."""
    if sample.weights is None:
        return None
    floats = [value for value in vars(module).values() if isinstance(value, float) and value > 0]
    for logits, form in _candidate_logits(sample):
        for eps in dict.fromkeys(times * value for value in floats for times in (1, 2)):
            rule = Routing(*form, None, "near", sample.numbers.shape[-1], eps=eps)
            weights, numbers = rule.choose_sequentially(logits)
            same_experts = torch.equal(numbers, sample.numbers)
            if same_experts and torch.allclose(weights, sample.weights, rtol=_RTOL, atol=1e-6):
                return rule
    return None


def _with_fitted_weights(rule: Routing, logits: Tensor, sample: RoutingSample) -> Routing | None:
    """The rule with weights as the sample has them, where it chooses the same experts."""
    if rule.groups > 1 and rule.count > rule.n_groups_chosen * (logits.shape[-1] // rule.groups):
        return None
    chosen = rule.top_k_experts(
        logits, None if rule.correction_bias is None else sample.tensors[rule.correction_bias].flatten()
    )
    expected_numbers, order = sample.numbers.sort(-1)
    if not torch.equal(chosen, expected_numbers):
        return None
    if sample.weights is None:
        return rule
    expected, shares_chosen = sample.weights.gather(-1, order), rule.shares(logits).gather(-1, chosen)
    for normal in (False, True):
        normalised = shares_chosen / shares_chosen.sum(-1, keepdim=True) if normal else shares_chosen
        scale = float((expected * normalised).sum() / normalised.square().sum())
        if torch.allclose(normalised * scale, expected, rtol=_RTOL, atol=1e-6):
            scale = round(scale, 4) if abs(scale - round(scale, 4)) < 1e-5 else scale
            return replace(rule, normal=normal, scale=scale)
    return None


def _vectors(sample: RoutingSample, experts: int) -> list[str]:
    return [name for name, tensor in sample.tensors.items() if tensor.numel() == experts]


def _candidate_logits(sample: RoutingSample) -> Iterator[tuple[Tensor, tuple[str, str | None]]]:
    for name, weight in sample.tensors.items():
        if weight.dim() == 2 and weight.shape[1] == sample.x.shape[1]:
            logits = sample.x @ weight.T
            for bias in (None, *_vectors(sample, len(weight))):
                yield logits if bias is None else logits + sample.tensors[bias].flatten(), (name, bias)


class _ExpertGroups(NamedTuple):
    """Groups of experts, how many of them are chosen, and how many experts of a group give its score."""

    groups: int
    n_groups_chosen: int
    n_scoring_experts: int


def _candidate_expert_groups(module: nn.Module, experts: int) -> list[_ExpertGroups]:
    """Combinations of the numbers that a router or its config holds."""
    config = getattr(module, "config", None)
    values = [*vars(module).values(), *(vars(config).values() if config else ())]
    numbers = sorted({n for n in values if type(n) is int and 1 <= n <= _MAX_GROUPS})
    several = [
        _ExpertGroups(groups, chosen, scoring)
        for groups in numbers
        for chosen in numbers
        for scoring in (1, 2)
        if groups > 1 and experts % groups == 0 and chosen < groups and scoring <= experts // groups
    ]
    return [_ExpertGroups(1, 1, 1), *several]
