"""Sequences that grow by tokens, for engines that compute rows of equal length together."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Decoder(Protocol):
    """Sequences that grow by tokens: what a runtime has to be for `DecoderModel` and the server.

    max_sequences
                 that can be open at once, numbered from 0
    context      tokens that a sequence can have
    vocabulary   logits of a token
    """

    max_sequences: int
    context: int
    vocabulary: int

    @property
    def backward(self) -> bool:
        """Whether a sequence can be cut to any length; one with states of all that came before is forgotten whole."""

    def run(
        self, token_ids: Sequence[int], sequence_of_token: Sequence[int], output_positions: Sequence[int]
    ) -> Tensor:
        """Extend sequences by tokens, each by those of its number.

        token_ids, sequence_of_token   [n] tokens, and the sequence of each
        output_positions   positions in `token_ids`, or [n] bool, of which logits are computed
        return           [outputs, vocabulary] float32
        """

    def length(self, sequence: int) -> int:
        """Tokens that a sequence has."""

    def forget(self, sequence: int, num_remaining: int = 0) -> None:
        """Cut a sequence back to its first tokens."""

    def cancel(self) -> None:
        """From any thread: a running call may end with an exception, and its sequences are then forgotten."""


class AdaptedDecoder(Decoder, Protocol):
    """A decoder whose sequences may each have an adapter, by its name; "" is the model alone."""

    def needs_full_prompt(self, adapter: str) -> bool:
        """Whether a prompt must come in one call: interventions edit its first and its last tokens."""

    def set_sequence_adapter(self, sequence: int, adapter: str) -> None:
        """Let a new sequence have an adapter."""


class SourceDecoder(Decoder, Protocol):
    """A decoder whose sequences answer a source.

    sources   tokens of a source at most; `source_vocabulary` how many are known
    """

    sources: int
    source_vocabulary: int

    def encode(self, token_ids: Sequence[int], sequence_of_token: Sequence[int]) -> None:
        """Read sources, each into an open sequence that has none."""


class BatchedRun(ABC):
    """A `Decoder` over one method that computes logits of rows of equal length.

    max_sequences
                 that can be open at once
    context      tokens that a sequence can have
    vocabulary   logits of a token
    """

    backward = True

    def __init__(self, max_sequences: int, context: int, vocabulary: int):
        self.max_sequences, self.context, self.vocabulary = max_sequences, context, vocabulary

    @abstractmethod
    def length(self, sequence: int) -> int:
        """Tokens that a sequence has."""

    @abstractmethod
    def forget(self, sequence: int, num_remaining: int = 0) -> None:
        """Cut a sequence back to its first tokens."""

    @abstractmethod
    def extend(self, sequences: list[int], ids: Tensor) -> Tensor:
        """Append a row of `ids` [b, t] to each sequence; logits [b, t, vocabulary]."""

    def cancel(self) -> None:  # noqa: B027 (an engine that can break off says how)
        """A call goes on to its end: nothing breaks it off."""

    def run(
        self,
        token_ids: Sequence[int],
        sequence_of_token: Sequence[int],
        output_positions: Sequence[int] | Sequence[bool],
    ) -> Tensor:
        """Append tokens to their sequences; logits [wanted, vocabulary] of some, given by place or one by one."""
        by_position = not all(isinstance(flag, bool) for flag in output_positions)
        positions = (
            list(output_positions)
            if by_position
            else [position for position, flag in enumerate(output_positions) if flag]
        )
        rows: dict[int, list[int]] = {}
        for position, sequence in enumerate(sequence_of_token):
            rows.setdefault(sequence, []).append(position)
        groups: dict[int, list[int]] = {}
        for sequence, row_positions in rows.items():
            groups.setdefault(len(row_positions), []).append(sequence)
        logits_at: dict[int, Tensor] = {}
        for group in groups.values():
            logits = self.extend(group, torch.tensor([[token_ids[p] for p in rows[n]] for n in group]))
            for row, sequence in zip(logits, group, strict=True):
                logits_at |= dict(zip(rows[sequence], row, strict=True))
        return torch.stack([logits_at[position] for position in positions])
