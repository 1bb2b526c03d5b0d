"""Cache of the tokens before, as transformers' `generate` handles one, over sequences of an engine."""

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .sequence_pool import common_prefix

if TYPE_CHECKING:
    from .model import DecoderModel


class SequenceCache:
    """Sequences of an engine, one for each row of a batch; they are free again with the last reference to the cache.

    sequences   of the engine, row by row; none before the first call that extends it
    tokens      that each holds, without padding
    """

    is_linear = (False,)  # layer by layer; transformers then counts the tokens before
    is_compileable = False

    def __init__(self, model: "DecoderModel"):
        self._model, self._width = model, 0
        self.sequences: list[int] = []
        self.tokens: list[list[int]] = []

    def open_if_closed(self, rows: int) -> bool:
        """Open a sequence for each row; False where they are open."""
        if self.sequences:
            return False
        self.sequences, self.tokens = self._model.acquire_sequences(rows), [[] for _ in range(rows)]
        return True

    def append_visible_tokens(self, ids: Tensor, mask: Tensor) -> None:
        """Note the tokens [b, t] that the sequences got, those that the mask shows."""
        self._width += ids.shape[1]
        for tokens, row, is_token in zip(self.tokens, ids, mask.bool(), strict=True):
            tokens += row[is_token].tolist()

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens of a row, padding included."""
        return self._width

    @property
    def is_croppable(self) -> bool:
        return self._model.engine.backward

    def activate_past_recording(self, recurrent_states_to_keep: int | None = None) -> None:
        """Nothing to do: an engine keeps what it can cut back to."""

    def crop(self, length: int) -> None:
        """Cut rows back to their first `length` tokens, or by the last `-length`."""
        n_removed = -length if length <= 0 else max(0, self._width - length)
        if n_removed:
            self._width -= n_removed
            for sequence, tokens in zip(self.sequences, self.tokens, strict=True):
                del tokens[-n_removed:]
                self._model.forget(sequence, len(tokens))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from what row `beam_idx[i]` holds. Beams stay within their source.

        A sequence passes to the first row that goes on from it. Others are cut back to what they have in common with
        theirs, and read the rest again.
        """
        sources = beam_idx.tolist()
        heir = {source: row for row, source in reversed(list(enumerate(sources)))}
        unclaimed = [row for row in range(len(sources)) if row not in heir]
        tokens = [list(self.tokens[source]) for source in sources]
        sequences, missing = [], {}
        for row, source in enumerate(sources):
            old = source if heir[source] == row else unclaimed.pop(0)
            sequences.append(self.sequences[old])
            if old != source and (suffix := tokens[row][self._crop_to_common_prefix(old, tokens[row]) :]):
                missing[self.sequences[old]] = torch.tensor(suffix)
        self.sequences, self.tokens = sequences, tokens
        if missing:
            self._model.append_tokens(missing, "last")

    def _crop_to_common_prefix(self, row: int, target_ids: list[int]) -> int:
        """Cut a row back to what it has in common with `target_ids`; how many tokens that are."""
        common = common_prefix(self.tokens[row], target_ids)
        if common < len(self.tokens[row]):
            common *= self.is_croppable
            self._model.forget(self.sequences[row], common)
        return common

    def close(self) -> None:
        sequences, self.sequences = self.sequences, []
        self._model.release(sequences)

    def __del__(self):
        if sys is not None and not sys.is_finalizing():  # when the interpreter ends, modules are gone
            self.close()
