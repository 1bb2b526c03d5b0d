"""Schedule of training steps: learning rate, rows, random seeds.

All follow from the step's number, so a run that goes on after a kill needs no state of a generator.
"""

import hashlib
import math

import torch
from torch import Tensor


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """Factor of the learning rate at a step, counted from 1: up over `warmup_steps`, then down.

    "cosine" and "linear" would reach 0 one step after the last; "constant" stays.
    """
    if step <= warmup_steps:
        return step / warmup_steps
    passed = (step - 1 - warmup_steps) / (total_steps - warmup_steps)  # 0 .. 1, the end left out
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * passed))
    if schedule == "linear":
        return 1.0 - passed
    assert schedule == "constant", f"no schedule {schedule}"
    return 1.0


def seed_of(*parts: object) -> int:
    """A generator's seed that is another one for every purpose and number."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # torch takes int64


class RowOrder:
    """Rows in an endless order: epoch after epoch, each a permutation that the seed decides."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def take(self, start: int, count: int) -> Tensor:
        """Row numbers [count] at the places start .. start + count of the order."""
        return torch.stack([self._at(position) for position in range(start, start + count)])

    def _at(self, position: int) -> Tensor:
        epoch, inside = divmod(position, self.count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of("rows", self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        return self._order[inside]
