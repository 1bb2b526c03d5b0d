"""How long it takes to read a prompt, in the median."""

from typing import ClassVar

from torch import nn

from ...measuring.timing import Clock, percentile, prefill_step
from ...words.context import Context
from ...words.kinds import Metric, param


class P50(Metric):
    """How long it takes to read a prompt, in the median.

    One forward over a prompt of random tokens that fills the KV cache, batch 1, after warm-up runs, repeated;
    in milliseconds. It is the wait before the first token.

    Source: own.
    Example: prefill.p50 <= 0.75 * base
    """

    unit: ClassVar[str] = "ms"
    timed: ClassVar[bool] = True

    prompt: int = param("Tokens of the prompt.", default=128, ge=1, unit="tokens")
    repeats: int = param("How many forwards are timed.", default=10, ge=1)

    def measure(self, model: nn.Module, ctx: Context) -> float:
        return self.clock(model).measure(model)

    def clock(self, model: nn.Module) -> Clock:
        return Clock(prefill_step(model, self.prompt), self.repeats, lambda seconds: 1e3 * percentile(seconds, 50))
