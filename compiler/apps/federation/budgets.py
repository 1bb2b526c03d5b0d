"""Budgets of clients, and the cost of each model size.

A budget is a share of the model's parameters or operations, a number of them, bytes of memory, or seconds of an update.
"""

import copy
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....dsl.checker.skeleton import Skeleton
from ....dsl.checker.value_text import value_text
from ....dsl.checker.values import Bytes, Duration, Ratio
from ...analysis.planning import shrink
from ...core.quantity import duration_text, si_count, size_text

if TYPE_CHECKING:
    from torch import nn

Budget = float | int | Bytes | Duration  # a float is a share
STATES = 12  # bytes a parameter: the state that was sent, the client's own, and the one that it sends, in float32
TIMED = 5  # updates, of which the median counts, after one that warms up


@dataclass(frozen=True)
class Load:
    """Training data of an update: a number of rows of a number of tokens."""

    batch: int = 4
    length: int = 128


def budget_kind_of(budget: Budget, kind_if_unitless: str) -> str:
    """ "params", "flops", "memory" or "latency": what it bounds.

    kind_if_unitless  of shares and plain numbers: "params" or "flops"
    """
    if isinstance(budget, Bytes):
        return "memory"
    return "latency" if isinstance(budget, Duration) else kind_if_unitless


def absolute_budget(budget: Budget, full_cost: float) -> float:
    """The most that a client affords, where the whole model takes so much."""
    if isinstance(budget, Bytes):
        return budget.value
    if isinstance(budget, Duration):
        return budget.seconds
    return budget * full_cost if isinstance(budget, float) else budget


def budget_text(budget: Budget) -> str:
    """The budget as a recipe writes it."""
    return value_text(Ratio(budget) if isinstance(budget, float) else budget)


def amount_phrase(budget_kind: str, value: float) -> str:
    """An amount of what a budget bounds: `1.2 M parameters`."""
    if budget_kind == "params":
        return f"{int(value):,} parameters"
    if budget_kind == "flops":
        return f"{si_count(value)}FLOP a token"
    return f"{size_text(value)} of memory" if budget_kind == "memory" else f"{duration_text(value)} an update"


def smallest_fitting_budget_text(budget_kind: str, value: float, full_cost: float) -> str:
    """The least budget that a value fits into, as a recipe writes it."""
    if budget_kind == "memory":
        unit = 1 << (20 if value >= 10 << 20 else 10)
        return value_text(Bytes((int(value) // unit + 1) * unit))
    if budget_kind == "latency":
        return value_text(Duration(int(1000 * value + 1) / 1000))
    return f"{int(100 * value / full_cost) + 1}%"


def training_bytes(skeleton: Skeleton, load: Load) -> int:
    """Bytes that a client needs to train all weights, besides Python and torch: the states that it exchanges, weights,
    gradients, AdamW's moments, and a batch's activations."""
    from ...transforms.training.effort import estimate_training_effort

    trained = shrink.param_count(skeleton)
    return estimate_training_effort(skeleton, trained, load.batch * load.length, 0, 0).bytes + STATES * trained


def median_update_seconds(model: "nn.Module", load: Load) -> float:
    """Seconds of an update of all weights on this machine, in the median; the model is left as it was."""
    import torch

    from ...evaluation.timing import make_prompt_ids
    from ...models.rows.inputs import use_cache_false_kwargs

    copy_ = copy.deepcopy(model).train()
    for p in copy_.parameters():
        p.requires_grad_(True)
    ids = make_prompt_ids(copy_, load.batch, load.length)
    optimizer = torch.optim.AdamW(copy_.parameters(), lr=1e-6)

    def update() -> float:
        start = time.perf_counter()
        output = copy_(input_ids=ids, **use_cache_false_kwargs(copy_))
        (output.logits if "logits" in output else output.last_hidden_state).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    update()
    return statistics.median(update() for _ in range(TIMED))
