"""Functions of the gated delta rule, recognised by what they compute: how they turn queries and keys before it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ....kernels.delta_rule import DeltaRule

_LENGTH = 6  # positions that a function is tried on
_SHARE = 1e-4  # of outputs of size one, in float32: some go through chunks, and solve for them
_EPSILONS = (1e-6, 1e-5, 1e-12, 0.0)


@dataclass(frozen=True)
class DeltaRuleLayer:
    """The delta rule of queries times `scale` and keys; both are over their length first, where there is an `eps`."""

    scale: float
    eps: float | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        if self.eps is not None:
            q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + self.eps) for x in (q, k))
        return DeltaRule.reference(q * self.scale, k, v, decay, beta, None)[0]


@torch.no_grad()
def recognise_delta_rule(
    function: Callable[..., Any], shapes: dict[str, tuple[int, ...]], options: dict[str, Any]
) -> DeltaRuleLayer | None:
    """Delta rule that a function (q, k, v, g=, beta=, ...) computes of values of these shapes [b, t, ...], or None."""
    trials = [
        _trial_inputs_and_output(function, shapes, options, size) for size in (1.0, 2e-3)
    ]  # the second feels epsilon
    known = [trial for trial in trials if trial is not None]
    if len(known) < len(trials):
        return None
    for form in _candidate_delta_rules(shapes["q"][-1]):
        if all(_close(form(*inputs), expected) for inputs, expected in known):
            return form
    return None


def _trial_inputs_and_output(
    function: Callable[..., Any], shapes: dict[str, tuple[int, ...]], options: dict[str, Any], qk_scale: float
) -> tuple[tuple[Tensor, ...], Tensor] | None:
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn((1, _LENGTH, *shape[2:]), generator=generator) for name, shape in shapes.items()}
    q, k, v, decay, beta = (inputs[name] for name in ("q", "k", "v", "g", "beta"))
    q, k, decay, beta = q * qk_scale, k * qk_scale, -decay.abs(), beta.sigmoid()
    try:
        output = function(q, k, v, g=decay, beta=beta, **options)
    except (RuntimeError, TypeError, ValueError, IndexError):  # made for something else
        return None
    output = output[0] if isinstance(output, tuple | list) else output
    return ((q, k, v, decay, beta), output.float()) if isinstance(output, Tensor) else None


def _candidate_delta_rules(width: int) -> Iterator[DeltaRuleLayer]:
    for scale, eps in product((width**-0.5, 1.0), (*_EPSILONS, None)):
        yield DeltaRuleLayer(scale, eps)


def _close(actual: Tensor, expected: Tensor) -> bool:
    largest = float(expected.abs().max())
    return actual.shape == expected.shape and float((actual - expected).abs().max()) <= _SHARE * largest
