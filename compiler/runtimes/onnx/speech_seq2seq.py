"""An encoder of sounds with a decoder, as three graphs that ONNX Runtime runs (Whisper)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....dsl.syntax.diagnostics import Fault
from ..cache import SequenceCache
from ..model import Output
from ..seq2seq import Seq2SeqModel
from .checking import ENCODER, FEATURES
from .refusal import rejected_onnx
from .seq2seq import SourceRows, open_seq2seq
from .session import Session

other_features = Fault(
    "other-features", "A model that hears is given features of other sizes than it takes.", exit="usage"
)


class SpeechRows(SourceRows):
    """Sources are pictures of sounds, all of one `shape`: bands and frames."""

    def __init__(self, sessions: dict[str, Session], *sizes: int):
        super().__init__(sessions, *sizes)
        shape = sessions[ENCODER].shapes[FEATURES]
        if len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape[1:]):
            raise rejected_onnx("the encoder hears sounds of no stated size", help="compile it again").rejection()
        self.shape: tuple[int, int] = (shape[1], shape[2])

    def hear(self, features: Tensor, sequences: Sequence[int]) -> None:
        """Read features [b, bands, frames], each into an open sequence."""
        (states,) = self.sessions[ENCODER].run({FEATURES: features.float().contiguous().numpy()})
        self.keep(states, sequences)

    def states(self, sequences: Sequence[int]) -> Tensor:
        """States [b, s, d] of the sounds that open sequences have read."""
        return torch.from_numpy(np.stack([self._states[sequence] for sequence in sequences]))

    def keep(self, states: np.ndarray, sequences: Sequence[int]) -> None:
        self._states.update(zip(sequences, states, strict=True))


class SpeechSeq2Seq(Seq2SeqModel):
    """`logits` [b, t, vocabulary] of targets [b, t] behind sounds [b, bands, frames], and `generate`.

    What a sound is made of, and the tokens that ask for a language and a task, come from the processor beside the
    graphs; such tokens are given as `decoder_input_ids`. What is called `encoder_outputs` spares the encoder.
    """

    main_input_name = FEATURES
    engine: SpeechRows

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.config.num_mel_bins, frames = self.engine.shape
        self.config.max_source_positions = frames // 2
        self.config.max_position_embeddings = self.config.max_target_positions = self.plan["context"]

    def check_inputs(self, inputs: Any, mask: Any) -> None:
        """Sounds are checked where they are read: `generate` takes those of several lengths apart."""

    def unbind_sources(self, features: Tensor, mask: Tensor | None) -> list[Tensor]:
        expected = self.engine.shape
        if features.dim() != 3 or tuple(features.shape[1:]) != expected:
            raise other_features(
                f"`input_features` is {list(features.shape)}, "
                f"and the model hears [sounds, {expected[0]}, {expected[1]}]",
                help="make them by the feature extractor beside the model",
            ).rejection()
        return list(features)

    def encode(self, sequences: Sequence[int], sources: Sequence[Tensor]) -> None:
        with self.exclusive():
            self.engine.hear(torch.stack(list(sources)), sequences)

    def _read(self, sequences: Sequence[int], encoder_outputs: Any) -> None:
        if "sources" in encoder_outputs:
            super()._read(sequences, encoder_outputs)
        else:
            self.engine.keep(encoder_outputs[0].numpy(), sequences)

    @torch.no_grad()
    def forward(  # type: ignore[override]  # as transformers' models that hear
        self,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: SequenceCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Output:
        """Logits of target tokens for sounds; zeros for masked tokens. With `use_cache` it gives
        `encoder_last_hidden_state` and a `cache` too."""
        use_cache = use_cache or isinstance(encoder_outputs, tuple)
        sources = (input_features, attention_mask, decoder_input_ids)
        output = super().forward(*sources, encoder_outputs=encoder_outputs, cache=cache, use_cache=use_cache, **kwargs)
        if cache is None and use_cache:
            output["encoder_last_hidden_state"] = self.engine.states(output.cache.sequences)
        return output


def open_hearing(folder: Path, threads: int | None) -> Seq2SeqModel:
    """The model of a folder whose encoder hears. Raises Reject (refused-onnx)."""
    return open_seq2seq(folder, threads, SpeechRows, SpeechSeq2Seq)
