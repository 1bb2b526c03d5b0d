"""Decoded tokens per second."""

from typing import ClassVar

from torch import nn

from ...plugin.clock import Clock
from ...plugin.context import Context
from ...plugin.interfaces import Metric, param
from ..timing import WARMUP, make_decode_step, measure_single


class Throughput(Metric):
    """Decoded tokens per second.

    Greedy decoding with the KV cache after a prompt of random tokens, all sequences of the batch counted, after
    warm-up steps.

    Source: own.
    Example: throughput(batch: 4) >= 1.3 * base
    """

    unit: ClassVar[str] = "tokens/s"
    better: ClassVar[str] = "higher"
    lowest: ClassVar[float] = 0.0
    timed: ClassVar[bool] = True

    batch: int = param("Sequences that are decoded together.", default=1, ge=1)
    prompt: int = param("Tokens of each prompt.", default=128, ge=1, unit="tokens")
    steps: int = param("How many tokens of each sequence are timed.", default=32, ge=1, unit="tokens")

    def measure(self, model: nn.Module, ctx: Context) -> float:
        return measure_single(self.clock(model), model)

    def timed_tokens(self) -> int:
        return self.prompt + WARMUP + self.steps

    def clock(self, model: nn.Module) -> Clock:
        return Clock(
            make_decode_step(model, self.prompt, self.batch),
            self.steps,
            lambda seconds: self.batch * len(seconds) / sum(seconds),
        )
