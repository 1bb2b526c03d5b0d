"""Logits of one answer, changed as its request says: bias, penalties of tokens written before, a grammar."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from .grammar import Matcher


class LogitEdits:
    """Changes of logits [vocabulary] before a token is drawn, in the order of OpenAI's API: the grammar is last.

    bias_by_token       added to the logits of tokens
    frequency_penalty   subtracted for each time that a token stands in the answer so far
    presence_penalty    subtracted once for each token that stands in it
    grammar    at its beginning; it is copied
    """

    def __init__(
        self,
        bias_by_token: Mapping[int, float],
        frequency_penalty: float,
        presence_penalty: float,
        grammar: Matcher | None,
    ):
        self._bias_ids = torch.tensor(list(bias_by_token), dtype=torch.long)
        self._bias = torch.tensor(list(bias_by_token.values()))
        self._frequency, self._presence = frequency_penalty, presence_penalty
        self._counts: Counter[int] = Counter()
        self._grammar = grammar.copy() if grammar else None

    @property
    def is_empty(self) -> bool:
        return not (len(self._bias) or self._frequency or self._presence or self._grammar)

    def apply(self, logits: Tensor) -> Tensor:
        """The changed logits; the tensor itself where nothing changes."""
        if self.is_empty:
            return logits
        logits = logits.to(torch.float32, copy=True)
        logits.index_add_(0, self._bias_ids, self._bias)
        if self._counts and (self._frequency or self._presence):
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            logits.index_add_(0, torch.tensor(list(self._counts)), -self._frequency * counts - self._presence)
        return self._grammar.mask(logits) if self._grammar else logits

    def push(self, token: int) -> bool:
        """Go on behind a token; whether the grammar lets nothing follow."""
        if self._frequency or self._presence:
            self._counts[token] += 1
        return self._grammar is not None and self._grammar.push(token)
