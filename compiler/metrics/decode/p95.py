"""How long it takes to decode one token, at the slow end (percentile 95)."""

from typing import ClassVar

from torch import nn

from ...measuring.timing import Clock, decode_step, percentile
from ...words.context import Context
from ...words.kinds import Metric, param


class P95(Metric):
    """How long it takes to decode one token, at the slow end (percentile 95).

    Greedy decoding with the KV cache after a prompt of random tokens, batch 1, after warm-up steps; one time
    per token, in milliseconds. It is the wait between two tokens.

    Source: own.
    Example: decode.p95 <= 0.75 * base
    """

    unit: ClassVar[str] = "ms"
    timed: ClassVar[bool] = True

    prompt: int = param("Tokens of the prompt.", default=128, ge=1, unit="tokens")
    steps: int = param("How many tokens are timed.", default=32, ge=1, unit="tokens")

    def measure(self, model: nn.Module, ctx: Context) -> float:
        return self.clock(model).measure(model)

    def clock(self, model: nn.Module) -> Clock:
        return Clock(decode_step(model, self.prompt), self.steps, lambda seconds: 1e3 * percentile(seconds, 95))
