"""An encoder with a decoder opened: its three graphs, with the calls that such models of transformers have."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...models.checkpoints.generation_config import read_generation_config
from ..decoder import BatchedRun
from ..padded import SEQUENCES
from ..seq2seq import Seq2SeqModel
from .checking import BEGINNING, CONTINUATION, ENCODER, FEATURES, load_initializers, read_checked_onnx
from .refusal import rejected_onnx
from .seq2seq_export import SIDE_NAMES
from .session import Session

_UNBOUND = 1 << 20  # positions of a model that states no limit
_REMEDY = "compile it again"


class SourceRows(BatchedRun):
    """Engine interface of a translator: a batch of sources, and of targets that grow together.

    sources             tokens of a source at most; `source_vocabulary` how many of them are known
    """

    def __init__(self, sessions: dict[str, Session], context: int, vocabulary: int, source_vocabulary: int):
        super().__init__(SEQUENCES, context, vocabulary)
        self.sessions, self.sources, self.source_vocabulary = sessions, context, source_vocabulary
        self.past = [n for n in sessions[CONTINUATION].shapes if n.startswith("past_key_values.")]
        self._states: dict[int, np.ndarray] = {}  # [s, d] of a sequence's source
        self._history: dict[int, list[np.ndarray]] = {}  # [heads, t, d] of each of `past`

    def source(self, sequence: int) -> int:
        return len(self._states[sequence]) if sequence in self._states else 0

    def length(self, sequence: int) -> int:
        self_index = next((n for n, name in enumerate(self.past) if f".{SIDE_NAMES[0]}." in name), 0)
        return self._history[sequence][self_index].shape[1] if sequence in self._history else 0

    def forget(self, sequence: int, num_remaining: int = 0) -> None:
        if not num_remaining:
            self._history.pop(sequence, None)
            self._states.pop(sequence, None)
        elif sequence in self._history:
            pairs = zip(self.past, self._history[sequence], strict=True)
            self._history[sequence] = [x[:, :num_remaining] if f".{SIDE_NAMES[0]}." in name else x for name, x in pairs]

    def encode(self, token_ids: Sequence[int], sequence_of_token: Sequence[int]) -> None:
        """Read sources of any lengths in one call, the shorter ones filled up behind."""
        rows: dict[int, list[int]] = {}
        for token, sequence in zip(token_ids, sequence_of_token, strict=True):
            rows.setdefault(sequence, []).append(token)
        longest = max(map(len, rows.values()))
        input_ids, mask = (np.zeros((len(rows), longest), np.int64) for _ in range(2))
        for row, row_ids in enumerate(rows.values()):
            input_ids[row, : len(row_ids)], mask[row, : len(row_ids)] = row_ids, 1
        (states,) = self.sessions[ENCODER].run({"input_ids": input_ids, "attention_mask": mask})
        for row_states, (sequence, row_ids) in zip(states, rows.items(), strict=True):
            self._states[sequence] = row_states[: len(row_ids)]

    def extend(self, sequences: list[int], ids: Tensor) -> Tensor:
        """Rows of one length, each behind a source and a beginning of its own."""
        return torch.cat(
            [self._step_one_sequence(sequence, row.numpy()[None]) for sequence, row in zip(sequences, ids, strict=True)]
        )

    def _step_one_sequence(self, sequence: int, ids: np.ndarray) -> Tensor:
        mask = np.ones((1, self.source(sequence)), np.int64)
        inputs: dict[str, np.ndarray] = {"encoder_attention_mask": mask, "input_ids": ids}
        if sequence not in self._history:
            inputs["encoder_hidden_states"] = self._states[sequence][None]
            session = self.sessions[BEGINNING]
        else:
            inputs |= {name: x[None] for name, x in zip(self.past, self._history[sequence], strict=True)}
            session = self.sessions[CONTINUATION]
        outputs = dict(zip(session.results, session.run(inputs), strict=True))
        before = dict(zip(self.past, self._history.get(sequence, ()), strict=False))
        present = []
        for name in self.past:
            new = outputs.get(name.replace("past_key_values.", "present."))
            present.append(before[name] if new is None else new[0])
        self._history[sequence] = present
        return torch.from_numpy(outputs["logits"])


def open_seq2seq(
    folder: Path,
    threads: int | None,
    engine_class: type[SourceRows] = SourceRows,
    model_class: type[Seq2SeqModel] = Seq2SeqModel,
) -> Seq2SeqModel:
    """The model of a folder with three graphs. Raises Reject (refused-onnx).

    rows, kind   what asks the graphs, and the model over that
    """
    stored = {name: read_checked_onnx(folder, name) for name in (ENCODER, BEGINNING, CONTINUATION)}
    tensors = {
        f"{name}/{key}": x
        for name, graph_file in stored.items()
        for key, x in load_initializers(folder, graph_file, name).items()
    }
    sessions = {name: Session(folder / f"{name}.onnx", graph_file, threads) for name, graph_file in stored.items()}
    facts = stored[BEGINNING].facts
    vocabulary = _check_graphs_and_vocabulary(folder, sessions)
    if not 0 <= facts["start"] < vocabulary:
        raise rejected_onnx(f"{folder} names no token that a target begins with", help=_REMEDY).rejection()
    context = facts["context"] or _UNBOUND
    engine = engine_class(sessions, context, vocabulary, facts["source_vocabulary"])
    plan: dict[str, Any] = {"vocabulary": vocabulary, "context": context, "steps": []}
    model = model_class(engine, plan, tensors, facts, SEQUENCES, read_generation_config(folder))
    model.engine_name = "ONNX Runtime"
    model.name_or_path = model.config._name_or_path = str(folder)
    return model.eval()


def _check_graphs_and_vocabulary(folder: Path, sessions: dict[str, Session]) -> int:
    """Number of logits per token; Reject where the graphs' inputs and outputs do not match."""
    encoder, beginning, continuation = (sessions[name] for name in (ENCODER, BEGINNING, CONTINUATION))
    past = [name for name in continuation.shapes if name.startswith("past_key_values.")]
    present = [name.replace("past_key_values.", "present.") for name in past]
    shape = beginning.results.get("logits", ())
    fits = (
        (set(encoder.shapes) <= {"input_ids", "attention_mask"} or set(encoder.shapes) == {FEATURES})
        and len(encoder.results) == 1
        and set(beginning.shapes) <= {"encoder_attention_mask", "input_ids", "encoder_hidden_states"}
        and set(continuation.shapes) - set(past) <= {"encoder_attention_mask", "input_ids"}
        and bool(past)
        and set(beginning.results) == {"logits", *present}
        and set(continuation.results) == {"logits", *(name for name in present if f".{SIDE_NAMES[0]}." in name)}
        and len(shape) == 3
        and type(shape[2]) is int
    )
    if not fits:
        raise rejected_onnx(f"{folder} holds no encoder with a decoder in three graphs", help=_REMEDY).rejection()
    return shape[2]
