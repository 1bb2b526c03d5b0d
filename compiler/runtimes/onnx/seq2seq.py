"""An encoder with a decoder opened: its three graphs, with the calls that such models of transformers have."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....dsl.syntax.diagnostics import Reject
from ...models.checkpoints.generation_config import read_generation
from ..native.padded import SEQUENCES
from ..native.rows import Rows
from ..native.seq2seq import NativeTranslator
from .checking import BEGINNING, CONTINUATION, ENCODER, FEATURES, check, weights
from .refusal import refused_onnx
from .seq2seq_export import SIDES
from .session import Session

_UNBOUND = 1 << 20  # positions of a model that states no limit
_AGAIN = "compile it again"


class SourceRows(Rows):
    """What a translator asks of an engine: sources are read together, and what is said of them grows together.

    sources             tokens of a source at most; `source_vocabulary` how many of them are known
    """

    def __init__(self, sessions: dict[str, Session], context: int, vocabulary: int, source_vocabulary: int):
        super().__init__(SEQUENCES, context, vocabulary)
        self.sessions, self.sources, self.source_vocabulary = sessions, context, source_vocabulary
        self.past = [n for n in sessions[CONTINUATION].shapes if n.startswith("past_key_values.")]
        self._states: dict[int, np.ndarray] = {}  # [s, d] of a sequence's source
        self._kept: dict[int, list[np.ndarray]] = {}  # [heads, t, d] of each of `past`

    def source(self, number: int) -> int:
        return len(self._states[number]) if number in self._states else 0

    def length(self, number: int) -> int:
        own = next((n for n, name in enumerate(self.past) if f".{SIDES[0]}." in name), 0)
        return self._kept[number][own].shape[1] if number in self._kept else 0

    def forget(self, number: int, length: int = 0) -> None:
        if not length:
            self._kept.pop(number, None)
            self._states.pop(number, None)
        elif number in self._kept:
            kept = zip(self.past, self._kept[number], strict=True)
            self._kept[number] = [x[:, :length] if f".{SIDES[0]}." in name else x for name, x in kept]

    def encode(self, ids: Sequence[int], numbers: Sequence[int]) -> None:
        """Read sources of any lengths in one call, the shorter ones filled up behind."""
        rows: dict[int, list[int]] = {}
        for token, number in zip(ids, numbers, strict=True):
            rows.setdefault(number, []).append(token)
        longest = max(map(len, rows.values()))
        given, mask = (np.zeros((len(rows), longest), np.int64) for _ in range(2))
        for row, own in enumerate(rows.values()):
            given[row, : len(own)], mask[row, : len(own)] = own, 1
        (states,) = self.sessions[ENCODER].run({"input_ids": given, "attention_mask": mask})
        for found, (number, own) in zip(states, rows.items(), strict=True):
            self._states[number] = found[: len(own)]

    def extend(self, numbers: list[int], ids: Tensor) -> Tensor:
        """Rows of one length, each behind a source and a beginning of its own."""
        return torch.cat([self._one(number, row.numpy()[None]) for number, row in zip(numbers, ids, strict=True)])

    def _one(self, number: int, ids: np.ndarray) -> Tensor:
        mask = np.ones((1, self.source(number)), np.int64)
        given: dict[str, np.ndarray] = {"encoder_attention_mask": mask, "input_ids": ids}
        if number not in self._kept:
            given["encoder_hidden_states"] = self._states[number][None]
            session = self.sessions[BEGINNING]
        else:
            given |= {name: x[None] for name, x in zip(self.past, self._kept[number], strict=True)}
            session = self.sessions[CONTINUATION]
        found = dict(zip(session.results, session.run(given), strict=True))
        before = dict(zip(self.past, self._kept.get(number, ()), strict=False))
        kept = []
        for name in self.past:
            new = found.get(name.replace("past_key_values.", "present."))
            kept.append(before[name] if new is None else new[0])
        self._kept[number] = kept
        return torch.from_numpy(found["logits"])


def open_translator(
    folder: Path,
    threads: int | None,
    rows: type[SourceRows] = SourceRows,
    kind: type[NativeTranslator] = NativeTranslator,
) -> NativeTranslator:
    """The model of a folder with three graphs. Raises Reject (refused-onnx).

    rows, kind   what asks the graphs, and the model over that
    """
    stored = {name: check(folder, name) for name in (ENCODER, BEGINNING, CONTINUATION)}
    sessions = {name: Session(folder / f"{name}.onnx", own, threads) for name, own in stored.items()}
    held = {f"{name}/{key}": x for name, own in stored.items() for key, x in weights(folder, own, name).items()}
    facts = stored[BEGINNING].facts
    vocabulary = _vocabulary(folder, sessions)
    context = facts["context"] or _UNBOUND
    engine = rows(sessions, context, vocabulary, facts["source_vocabulary"])
    plan: dict[str, Any] = {"vocabulary": vocabulary, "context": context, "steps": []}
    model = kind(engine, plan, held, facts, SEQUENCES, read_generation(folder))
    model.name_or_path = model.config._name_or_path = str(folder)
    return model.eval()


def _vocabulary(folder: Path, sessions: dict[str, Session]) -> int:
    """How many logits a token has; Reject where what the graphs take and give does not fit together."""
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
        and set(continuation.results) == {"logits", *(name for name in present if f".{SIDES[0]}." in name)}
        and len(shape) == 3
        and type(shape[2]) is int
    )
    if not fits:
        raise Reject(refused_onnx(f"{folder} holds no encoder with a decoder in three graphs", help=_AGAIN))
    return shape[2]
