"""Clock of a timed metric: one timing of a model, and how several make a value."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


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
