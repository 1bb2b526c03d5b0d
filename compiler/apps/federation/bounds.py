"""Bounds of what the other side of a federation says: clients and servers may come from anybody.

A state is float32, finite and of magnitudes whose products stay finite, too; numbers are of a range. Whatever lies
outside is refused before memory is taken or anything is computed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....dsl.syntax.diagnostics import Fault
from .state import Shapes, State, value_fault

DAY = 86400.0  # seconds; a round may last as long even where its declaration says less
WAYS = ("project", "align", "function")

client_refuses = Fault("client-refuses", "A client of a federation can't do what its server asks.", exit="failure")


def require_deadline_s(message_config: Mapping[str, Any], declared_deadline_s: float) -> float:
    """Seconds that a server gives a client. Raises Reject (client-refuses) for none, or for more than a day where the
    declaration does not say so itself."""
    return _require_config_number(message_config, "deadline", declared_deadline_s, 0.0, max(declared_deadline_s, DAY))


def _require_config_number(
    config: Mapping[str, Any], key: str, default: float, minimum: float, maximum: float
) -> float:
    value = config.get(key, default)
    if type(value) not in (int, float) or not minimum <= value <= maximum:  # false for nan
        fact = f"the server's `{key}` is {str(value)[:40]}, not from {minimum:g} to {maximum:g}"
        raise client_refuses(fact).rejection()
    return float(value)


@dataclass(frozen=True)
class Bounds:
    """Of a server's messages to one client, by the declaration that the client has itself.

    full      shapes of a whole state, that of the largest rank
    clients   how many there are: what is merged has the ranks of all
    """

    full: Shapes
    clients: int
    deadline: float

    def refuse_unbounded_message(self, config: Mapping[str, Any], arrays: Mapping[str, State]) -> None:
        """Raises Reject (client-refuses) for a message that an honest server of this declaration would not send."""
        require_deadline_s(config, self.deadline)
        _require_config_number(config, "rounds", 1, 1, 1_000_000)
        _require_config_number(config, "rank", 1, 1, self._max_rank)
        _require_config_number(config, "among", 0, 0, self.clients)
        if config.get("mix", "adaptive") != "adaptive":
            _require_config_number(config, "mix", 0.0, 0.0, 1.0)
        if config.get("way", WAYS[0]) not in WAYS:
            raise client_refuses(f"the server's `way` is {str(config['way'])[:40]}").rejection()
        for use, state in arrays.items():
            longest = self.clients if use.startswith("merge.") else 1
            for name, array in state.items():
                if reason := self._array_fault(name, array, longest):
                    raise client_refuses(f"the server's `{use[:40]}` can't be used: {reason}").rejection()

    @property
    def _max_rank(self) -> int:
        return max((shape[0] for name, shape in self.full.items() if name.endswith(".A")), default=1)

    def _array_fault(self, name: str, array: np.ndarray, max_stacked_adapters: int) -> str:
        """`max_stacked_adapters` adapters may lie behind one another in an array, along their ranks."""
        shape = self.full.get(name)
        if shape is None:
            return f"`{name[:80]}` is no array of this federation"
        axis = {"A": 0, "B": 1}.get(name.rpartition(".")[2])
        limits = [size * (max_stacked_adapters if at == axis else 1) for at, size in enumerate(shape)]
        if array.ndim != len(shape) or any(n > size for n, size in zip(array.shape, limits, strict=True)):
            return f"`{name}` is {array.shape}, more than {tuple(limits)}"
        return value_fault(name, array)


def finite_or_nan(value: object) -> float:
    """A finite number that the other side says; NaN of what is none."""
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan
