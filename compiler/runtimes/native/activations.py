"""Elementwise functions, recognised by what they compute."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, product

import torch
import torch.nn.functional as F
from torch import Tensor

from .values import ElementwiseExpr

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "softplus": F.softplus,
    "square": torch.square,
    "sqrt": torch.sqrt,
    "reciprocal": torch.reciprocal,
    "exp": torch.exp,
}
_SHARE = 2e-6  # of float32: another order of the same operations
_ENDLESS = 3e38  # where nothing is clipped
_MAX_NODES = 5  # constants whose products are tried


@dataclass(frozen=True)
class RecognisedStep:
    """A step: its op and fields; op "" is the identity."""

    op: str
    fields: dict[str, object]


@torch.no_grad()
def recognise_elementwise(function: ElementwiseExpr) -> RecognisedStep | None:
    """The one step that computes an elementwise function, or None."""
    fine, far = torch.linspace(-12, 12, 961), torch.linspace(-300, 300, 61)
    x = torch.cat([fine, far, torch.tensor([1e-4, -1e-4, 1e4, -1e4])]).double()
    try:
        y = function(x).double()
    except (TypeError, RuntimeError):  # made for float32, as compiled code is
        y = function(x.float()).double()
    if torch.equal(x, y.to(x.dtype)):
        return RecognisedStep("", {})
    for kind, known in KINDS.items():
        if allclose_or_both_nan(y, known(x)):
            return RecognisedStep("act", {"kind": kind})
    least, upper = float(y.min()), float(y.max())
    if least < upper and allclose_or_both_nan(y, x.clamp(least, upper)):
        bounds = least if least > float(x.min()) else -_ENDLESS, upper if upper < float(x.max()) else _ENDLESS
        return RecognisedStep("clip", dict(zip(("least", "most"), bounds, strict=True)))
    constants = function.constants()
    for number in (-1.0, *_products_of_constants_and_inverses(constants)):
        if allclose_or_both_nan(y, x * number):
            return RecognisedStep("scale", {"by": number})
        if allclose_or_both_nan(y, x + number):
            return RecognisedStep("shift", {"by": number})
        if number > 0 and allclose_or_both_nan(y, number * torch.tanh(x / number)):
            return RecognisedStep("softcap", {"at": number})
    return _recognise_xielu(x, y)


def _recognise_xielu(x: Tensor, y: Tensor) -> RecognisedStep | None:
    """Its three numbers, read off three points: a square above zero, exp(x) - 1 - x below, and a share of x."""
    values_at = {at: float(y[(x - at).abs().argmin()]) for at in (-1.0, 1.0, 2.0)}
    square = values_at[2.0] / 2 - values_at[1.0]
    linear = values_at[1.0] - square
    exponential = (values_at[-1.0] + linear) * math.e
    bent = torch.where(x > 0, square * x.square(), exponential * (torch.expm1(x) - x))
    if not torch.allclose(y, bent + linear * x, rtol=2e-5, atol=2e-5):  # numbers that a float32 made
        return None
    return RecognisedStep("xielu", {"square": square, "exponential": exponential, "linear": linear})


def allclose_or_both_nan(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, rtol=_SHARE, atol=_SHARE, equal_nan=True))


def _products_of_constants_and_inverses(literals: list[float]) -> list[float]:
    """Constants, their inverses and negatives, and products of such."""
    distinct = list(dict.fromkeys(c for c in literals if c and math.isfinite(c)))[:_MAX_NODES]
    single = [s for c in distinct for s in (c, 1 / c)]
    chosen = [
        math.prod(parts)
        for count in range(1, len(distinct) + 1)
        for group in combinations(distinct, count)
        for parts in product(*((c, 1 / c) for c in group))
    ]
    return list(dict.fromkeys(sign * v for v in [*single, *chosen] for sign in (1.0, -1.0)))
