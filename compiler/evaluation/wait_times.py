"""Shared by metrics of one wait: the clock, of whose times each takes another statistic."""

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from ..plugin.clock import Clock
from ..plugin.context import Context
from ..plugin.interfaces import Metric, param
from .timing import WARMUP, make_decode_step, make_prefill_step, measure_single, percentile


class Wait(Metric):
    """A time that `percent` of a hundred don't exceed."""

    unit: ClassVar[str] = "ms"
    timed: ClassVar[bool] = True
    lowest: ClassVar[float] = 1e-9
    percent: ClassVar[int] = 50

    def measure(self, model: nn.Module, ctx: Context) -> float:
        return measure_single(self.clock(model), model)

    def value(self, seconds: Sequence[float]) -> float:
        return 1e3 * percentile(seconds, self.percent)


class Decode(Wait):
    """The wait between two tokens."""

    prompt: int = param("Tokens of the prompt.", default=128, ge=1, unit="tokens")
    steps: int = param("How many tokens are timed.", default=32, ge=1, unit="tokens")

    def timed_tokens(self) -> int:
        return self.prompt + WARMUP + self.steps

    def clock(self, model: nn.Module) -> Clock:
        return Clock(make_decode_step(model, self.prompt), self.steps, self.value)


class Prefill(Wait):
    """The wait before the first token."""

    prompt: int = param("Tokens of the prompt.", default=128, ge=1, unit="tokens")
    repeats: int = param("How many forwards are timed.", default=10, ge=1)

    def timed_tokens(self) -> int:
        return self.prompt

    def clock(self, model: nn.Module) -> Clock:
        return Clock(make_prefill_step(model, self.prompt), self.repeats, self.value)
