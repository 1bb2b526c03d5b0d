"""An encoder of sounds with a decoder, as three graphs that ONNX Runtime runs (Whisper)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....dsl.syntax.diagnostics import Fault, Reject
from ..native.model import Output, Sequences
from ..native.seq2seq import NativeSeq2Seq, no_target
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
            raise Reject(rejected_onnx("the encoder hears sounds of no stated size", help="compile it again"))
        self.shape: tuple[int, int] = (shape[1], shape[2])

    def hear(self, features: Tensor, numbers: Sequence[int]) -> Tensor:
        """Read features [b, bands, frames]; states [b, s, d], kept for open sequences."""
        (states,) = self.sessions[ENCODER].run({FEATURES: features.float().contiguous().numpy()})
        self.keep(states, numbers)
        return torch.from_numpy(states)

    def keep(self, states: np.ndarray, numbers: Sequence[int]) -> None:
        self._states.update(zip(numbers, states, strict=True))


class SpeechSeq2Seq(NativeSeq2Seq):
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

    def sources_of(self, features: Tensor, mask: Tensor | None) -> list[Tensor]:
        expected = self.engine.shape
        if features.dim() != 3 or tuple(features.shape[1:]) != expected:
            raise Reject(
                other_features(
                    f"`input_features` is {list(features.shape)}, "
                    f"and the model hears [sounds, {expected[0]}, {expected[1]}]",
                    help="make them by the feature extractor beside the model",
                )
            )
        return list(features)

    def encode(self, numbers: Sequence[int], sources: Sequence[Tensor]) -> None:
        with self._exclusive():
            self.engine.hear(torch.stack(list(sources)), numbers)

    @torch.no_grad()
    def forward(  # type: ignore[override]  # as transformers' models that hear
        self,
        input_features: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: Sequences | None = None,
        use_cache: bool | None = None,
        return_dict: bool = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Output:
        """Of masked tokens zeros. With `use_cache` it gives `encoder_last_hidden_state` and a `cache` too."""
        flags: dict[str, Any] = {
            "decoder_attention_mask": decoder_attention_mask,
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
        }
        if cache is not None or not (use_cache or encoder_outputs is not None):
            return super().forward(input_features, None, decoder_input_ids, cache=cache, **flags)
        if decoder_input_ids is None or (input_features is None and encoder_outputs is None):
            raise Reject(no_target("a sound and `decoder_input_ids` are what it computes logits of"))
        cache = Sequences(self, len(decoder_input_ids))
        if encoder_outputs is None:
            assert input_features is not None, "asked for above"
            with self._exclusive():
                states = self.engine.hear(torch.stack(self.sources_of(input_features, None)), cache.numbers)
        else:
            states = encoder_outputs[0]
            self.engine.keep(states.numpy(), cache.numbers)
        output = super().forward(None, None, decoder_input_ids, cache=cache, **flags)
        return Output(**output, encoder_last_hidden_state=states)

    def generate(self, input_features: Tensor, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        """Targets for sounds [b, bands, frames], as `NativeSeq2Seq.generate` gives them."""
        return super().generate(input_features, *args, **options)


def open_hearing(folder: Path, threads: int | None) -> NativeSeq2Seq:
    """The model of a folder whose encoder hears. Raises Reject (refused-onnx)."""
    return open_seq2seq(folder, threads, SpeechRows, SpeechSeq2Seq)
