"""Clock of a timed metric: one timing of a model, and how several make a value."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ...dsl.syntax.diagnostics import Fault, Reject

not_timed = Fault(
    "not-timed",
    "The speed of an artifact is that of the runtime that runs it, which can't time it here.\n\n"
    "effc reads a GGUF file for its numbers; llama.cpp is what runs it, so its times are taken in llama.cpp, in a "
    'process of its own, where `llama-cpp-python` is installed (`pip install "effc[llama]"`). A bound on a time that '
    "was not taken is undecided.",
    exit="environment",
)


def reason_not_timed(rejection: Reject) -> str:
    """Why a runtime could not be timed; "" where something else was refused."""
    diagnostics = rejection.diagnostics
    return diagnostics[0].message if all(d.fault is not_timed for d in diagnostics) else ""


@dataclass(frozen=True)
class Clock:
    """Timings of one model, taken one at a time so that several models can take turns.

    step    runs the timed work once and returns its seconds
    count   timings that make one value
    value   metric value from the seconds of all timings
    """

    step: Callable[[], float]
    count: int
    value: Callable[[Sequence[float]], float]


class Runtime(Protocol):
    """Program outside of this process that runs what a model here stands for. Both raise Reject (not-timed)."""

    def make_prefill_step(self, prompt: Sequence[int]) -> Callable[[], float]:
        """Function that reads a prompt and returns the seconds that it took."""
        ...

    def decode_step(self, prompt: Sequence[int], batch: int) -> Callable[[], float]:
        """Function that decodes a token of every sequence of a batch behind the prompt, and returns its seconds."""
        ...


@runtime_checkable
class HasRuntime(Protocol):
    """Model that is computed here for its numbers. `runtime` runs it for its users; None: what computes here does."""

    runtime: Runtime | None


def runtime_of(model: object) -> Runtime | None:
    return model.runtime if isinstance(model, HasRuntime) else None
