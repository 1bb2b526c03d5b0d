"""Models that a stateless graph computes: it takes keys and values of all tokens before, and gives them longer."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .decoder import BatchedRun
from .inputs import check_mask, check_token_id_tensor
from .model import DecoderModel, Output, check_token_ids_in_vocabulary

SEQUENCES = 64  # open at once: each takes what its keys and values take


class Stepper(Protocol):
    """past     names of keys and values, in turns
    shapes   name -> [batch, heads, past, size of a head] of each
    """

    @property
    def past(self) -> Sequence[str]: ...

    @property
    def shapes(self) -> Mapping[str, Sequence[Any]]: ...

    def step(self, ids: Tensor, mask: Tensor, past: list[np.ndarray] | None = None) -> list[np.ndarray]:
        """Logits [b, t, vocabulary], then keys and values; mask [b, past + t] has zeros before what a row lacks."""
        ...


class PaddedRows(BatchedRun):
    """Keys and values of a sequence are arrays [heads, t, d], layer by layer."""

    def __init__(self, session: Stepper, plan: dict[str, int]):
        super().__init__(SEQUENCES, plan["context"], plan["vocabulary"])
        self.session = session
        self._history: dict[int, list[np.ndarray]] = {}

    def length(self, sequence: int) -> int:
        return self._history[sequence][0].shape[1] if sequence in self._history else 0

    def forget(self, sequence: int, num_remaining: int = 0) -> None:
        if not num_remaining:
            self._history.pop(sequence, None)
        elif sequence in self._history:
            self._history[sequence] = [part[:, :num_remaining] for part in self._history[sequence]]

    def extend(self, group: list[int], ids: Tensor) -> Tensor:
        """Sequences of any lengths in one call, the shorter ones padded at the left."""
        lengths = [self.length(number) for number in group]
        longest = max(lengths)
        mask = torch.ones(len(group), longest + ids.shape[1], dtype=torch.int64)
        for row, length in enumerate(lengths):
            mask[row, : longest - length] = 0
        past = (
            [self._left_padded_past(group, part, longest) for part in range(len(self.session.past))]
            if longest
            else None
        )
        logits, *present = self.session.step(ids, mask, past)
        for row, (number, length) in enumerate(zip(group, lengths, strict=True)):
            self._history[number] = [part[row, :, longest - length :] for part in present]
        return torch.from_numpy(logits)

    def _left_padded_past(self, group: list[int], index: int, longest: int) -> np.ndarray:
        _, heads, _, d = self.session.shapes[self.session.past[index]]
        filled = np.zeros((len(group), heads, longest, d), np.float32)
        for row, number in enumerate(group):
            if number in self._history:
                past = self._history[number][index]
                filled[row, :, longest - past.shape[1] :] = past
        return filled


class PaddedModel(DecoderModel):
    """A decoder by such a graph: a batch without a cache goes through the graph as it is given, padding too."""

    engine: PaddedRows
    engine_name = "ONNX Runtime"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool = True,
        labels: Tensor | None = None,
    ) -> Output:
        self.refuse_states(output_hidden_states=output_hidden_states, output_attentions=output_attentions)
        if cache is not None or use_cache or labels is not None:
            return super().forward(
                input_ids, attention_mask, position_ids, cache, use_cache, logits_to_keep, labels=labels
            )
        check_token_id_tensor(input_ids)
        check_mask(attention_mask, input_ids)
        check_token_ids_in_vocabulary(input_ids, self.plan["vocabulary"])
        logits = self.batch_logits(input_ids, attention_mask, position_ids)
        return Output(logits=logits[:, -logits_to_keep:])

    def batch_logits(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Logits [b, t, vocabulary] of a batch that nothing came before; positions follow from the mask."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return torch.from_numpy(self.engine.session.step(input_ids, mask)[0])
