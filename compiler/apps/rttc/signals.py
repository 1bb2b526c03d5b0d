"""Signals of a query before generation: how sure the model is of its first word."""

from dataclasses import dataclass
from typing import Any

import torch

from ...models.rows.forward import evaluating, last_logits


@dataclass(frozen=True)
class Signals:
    """
    margin     nats between the likeliest first token of an answer and the second
    entropy    of the first token, in nats
    """

    margin: float
    entropy: float


def signals(model: Any, ids: list[int]) -> Signals:
    """Of a prompt's tokens: one forward, nothing is generated."""
    with evaluating(model):
        log_probs = last_logits(model, torch.tensor([ids]), 1)[0, -1].float().log_softmax(-1)  # [vocab]
    first, second = log_probs.topk(2).values.tolist()
    return Signals(first - second, float(-(log_probs.exp() * log_probs).sum()))
