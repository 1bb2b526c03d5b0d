"""Random numbers that a model draws while it is evaluated: it is no function then, and can't be compared."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DRAWING = frozenset(
    """
    rand rand_like randn randn_like randint randint_like randperm normal normal_ uniform_ bernoulli
    bernoulli_ multinomial exponential_ random_
    """.split()
)


class RandomDraw(Exception):
    """A forward has drawn random numbers."""


class NoDraws(TorchFunctionMode):
    """Raises RandomDraw where random numbers are made. Without values it is seen, too, so also on the meta device.

    A single number may be drawn: layer dropout (of Wav2Vec2) does that before it asks whether the model trains.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _DRAWING and isinstance(result, torch.Tensor) and result.dim():
            raise RandomDraw("two results for the same input differ")
        return result
