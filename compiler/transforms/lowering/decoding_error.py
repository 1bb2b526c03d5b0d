"""Decoding error of a step: tokens fed one by one over a cache, against the model before it."""

import math
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...models.rows.decoding import logits_while_decoding
from ...models.rows.forward import evaluating, finite, token_losses
from ...plugin.row_checks import invalid_rows
from .prediction_error import Accuracy

if TYPE_CHECKING:
    from ...plugin.context import Context

ROWS = 8  # that are decoded
STEPS = 64  # tokens that are fed one by one, at most
PAST_WINDOW = 64  # tokens by which a prompt must be longer than the window


@dataclass(frozen=True)
class OutputsBefore:
    """Outputs of a model before a step.

    ids       [b, length]           of which `prompt` tokens are read at once
    log_probs [b, steps, vocab]     log-probabilities, float32
    """

    ids: Tensor
    prompt: int
    log_probs: Tensor

    @staticmethod
    def record_by_decoding(model: nn.Module, rows: Tensor, ctx: "Context", window_tokens: int) -> "OutputsBefore":
        """Decode the ends of `rows` [n, length] with `model`, token by token, and keep its log-probabilities.

        Raises Reject (bad-rows) where rows are too short to test a window of `window_tokens`.
        """
        length = rows.shape[1]
        prompt = max(length // 2, length - STEPS)
        if prompt < window_tokens + PAST_WINDOW:
            raise invalid_rows(
                f"rows of {length} tokens are too short to test a window of {window_tokens}",
                help=f"give rows of {window_tokens + PAST_WINDOW + STEPS} tokens or more as `data`",
            ).rejection()
        ids = rows[:ROWS]
        return OutputsBefore(ids, prompt, decode_logits(model, ids, prompt, ctx, "decoding before").log_softmax(-1))

    def compare_to(self, model: nn.Module, ctx: "Context") -> Accuracy:
        log_probs_after = decode_logits(model, self.ids, self.prompt, ctx, "decoding after").log_softmax(-1)
        kl = (
            nn.functional.kl_div(log_probs_after, self.log_probs, reduction="sum", log_target=True)
            / log_probs_after[..., 0].numel()
        )
        divergence = max(finite(float(kl), "divergence while decoding"), 0.0)
        return Accuracy(divergence, (self._perplexity(self.log_probs), self._perplexity(log_probs_after)))

    def _perplexity(self, log_probs: Tensor) -> float:
        nats = token_losses(log_probs[:, :-1].flatten(0, 1), self.ids[:, self.prompt + 1 :].flatten())
        return math.exp(min(float(nats.double().mean()), 700.0))


def decode_logits(model: nn.Module, ids: Tensor, prompt_length: int, ctx: "Context", progress_label: str) -> Tensor:
    """Logits [b, length - prompt, vocab] float32 of every token behind a prompt, fed one by one."""
    with evaluating(model):
        steps = islice(logits_while_decoding(model, ids, prompt_length), 1, None)
        return torch.stack(list(ctx.each(steps, progress_label, ids.shape[1] - prompt_length)), 1)
