"""An encoder with a decoder as three graphs, as hosts of ONNX name them: what reads, what begins, what goes on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...ir.capture.sample import sample_inputs
from ...models.checkpoints.pretrained import pretrained
from ...models.rows.forward import logits_of_output
from ...models.rows.packed_inputs import has_fixed_audio_length, is_media_encoder_decoder
from .checking import BEGINNING, CONTINUATION, ENCODER, FEATURES
from .refusal import cannot_write_onnx

SIDE_NAMES = (
    "decoder",
    "encoder",
)  # whose keys and values a layer of the decoder keeps: what was said, and the source's
_FREE = torch.export.Dim.DYNAMIC


def refuse_unsupported_encoder_decoder(model: nn.Module) -> None:
    """Raise Reject of an encoder with a decoder that takes neither texts nor sounds, or has no head."""
    kind = type(model).__name__
    if model.main_input_name != "input_ids" and not has_fixed_audio_length(model):
        reason = f"{kind} takes `{model.main_input_name}`, and encoders of ids or sounds of one length are written"
    elif pretrained(model).get_output_embeddings() is None:
        reason = f"the decoder of {kind} has no head of logits"
    else:
        return
    raise cannot_write_onnx(reason, help="`hf` writes it for transformers").rejection()


@dataclass(frozen=True)
class Graph:
    """A module for the exporter, what it is traced with, its free axes, and the names of what goes in and out."""

    name: str
    module: nn.Module
    arguments: dict[str, Any]
    shapes: dict[str, Any]
    inputs: list[str]
    outputs: list[str]


class Encoder(nn.Module):
    """Hidden states [b, s, d] of sources [b, s] under their mask."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        encoder = pretrained(self.model).get_encoder()
        return encoder(input_ids=input_ids, attention_mask=attention_mask)[0].float()


class SpeechEncoder(nn.Module):
    """Hidden states [b, s, d] of sounds [b, bands, frames]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_features: Tensor) -> Tensor:
        return pretrained(self.model).get_encoder()(input_features)[0].float()


class FirstDecoderStep(nn.Module):
    """Logits of the first tokens of targets, and all keys and values: layer by layer its own, then the source's."""

    def __init__(self, model: nn.Module, slots: list[int]):
        super().__init__()
        self.model, self.slots = model, slots

    def forward(
        self, encoder_attention_mask: Tensor | None, input_ids: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        cache = _empty()
        logits = _decoder_logits(self.model, encoder_attention_mask, input_ids, encoder_hidden_states, cache)
        return logits, [part for slot in self.slots for half in _halves(cache) for part in keys_and_values(half, slot)]


class NextDecoderStep(nn.Module):
    """Logits of the tokens that follow, and the decoder's own keys and values; those of the source stay as they are.

    past    of each layer its own keys and values [b, heads, t, d], then the source's [b, heads, s, d]
    """

    def __init__(self, model: nn.Module, slots: list[int], width: int):
        super().__init__()
        self.model, self.slots, self.width = model, slots, width

    def forward(
        self, encoder_attention_mask: Tensor | None, input_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        cache = _empty()
        for n, slot in enumerate(self.slots):
            self_kv, source = past[4 * n : 4 * n + 2], past[4 * n + 2 : 4 * n + 4]
            cache.self_attention_cache.update(*self_kv, slot)
            cache.cross_attention_cache.update(*source, slot)
            cache.is_updated[slot] = True
        # What is made of these is not asked for: what was kept of the source is taken.
        states = past[2].new_zeros(input_ids.shape[0], past[2].shape[2], self.width)
        logits = _decoder_logits(self.model, encoder_attention_mask, input_ids, states, cache)
        return logits, [part for slot in self.slots for part in keys_and_values(cache.self_attention_cache, slot)]


class SpeechStart(FirstDecoderStep):
    """Decoder behind a speech encoder, which reads a sound at once."""

    def forward(  # type: ignore[override]  # its graph takes no mask
        self, input_ids: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        return super().forward(None, input_ids, encoder_hidden_states)


class SpeechContinuation(NextDecoderStep):
    """Decoder behind a speech encoder, which reads a sound at once."""

    def forward(  # type: ignore[override]  # its graph takes no mask
        self, input_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        return super().forward(None, input_ids, past)


def export_graphs(model: nn.Module) -> Iterator[Graph]:
    """The three graphs of a model in float32."""
    inputs, is_speech = sample_inputs(model, padding_per_row=0), is_media_encoder_decoder(model)
    decoder_ids = inputs["decoder_input_ids"]
    reads = _hearing(model, inputs) if is_speech else _encoder_graph(model, inputs)
    yield reads
    mask = None if is_speech else reads.arguments["attention_mask"]
    states, cache = reads.module(**reads.arguments), _empty()
    _decoder_logits(model, mask, decoder_ids, states, cache)
    slots = [
        n
        for n in range(len(cache.self_attention_cache.layers))
        if all(p is not None for p in _keys_and_values_of_cache(cache, n))
    ]
    past = [part for slot in slots for part in _keys_and_values_of_cache(cache, slot)]
    names = [f"{n}.{side}.{part}" for n in range(len(slots)) for side in SIDE_NAMES for part in ("key", "value")]
    free = {0: _FREE, 1: _FREE}
    # Of sounds all have as many states; what says which of them are a source's is only there where they differ.
    masks, shapes = ({}, {}) if mask is None else ({"encoder_attention_mask": mask}, {"encoder_attention_mask": free})
    wide = {0: _FREE} if is_speech else free
    yield Graph(
        BEGINNING,
        (SpeechStart if is_speech else FirstDecoderStep)(model, slots),
        {**masks, "input_ids": decoder_ids, "encoder_hidden_states": states},
        {**shapes, "input_ids": free, "encoder_hidden_states": wide},
        [*masks, "input_ids", "encoder_hidden_states"],
        ["logits", *(f"present.{name}" for name in names)],
    )
    past_shapes = [{0: _FREE} if is_speech and f".{SIDE_NAMES[1]}." in name else {0: _FREE, 2: _FREE} for name in names]
    yield Graph(
        CONTINUATION,
        (SpeechContinuation if is_speech else NextDecoderStep)(model, slots, states.shape[-1]),
        {**masks, "input_ids": decoder_ids[:, :2], "past": past},
        {**shapes, "input_ids": free, "past": past_shapes},
        [*masks, "input_ids", *(f"past_key_values.{name}" for name in names)],
        ["logits", *(f"present.{name}" for name in names if f".{SIDE_NAMES[0]}." in name)],
    )


def _encoder_graph(model: nn.Module, inputs: dict[str, Any]) -> Graph:
    mask = torch.ones_like(inputs["input_ids"])
    mask[1:, -2:] = 0
    names = ["input_ids", "attention_mask"]
    arguments = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    shapes = {name: {0: _FREE, 1: _FREE} for name in names}
    return Graph(ENCODER, Encoder(model), arguments, shapes, names, ["last_hidden_state"])


def _hearing(model: nn.Module, inputs: dict[str, Any]) -> Graph:
    arguments = {FEATURES: inputs[FEATURES]}
    return Graph(ENCODER, SpeechEncoder(model), arguments, {FEATURES: {0: _FREE}}, [FEATURES], ["last_hidden_state"])


def _empty() -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def _halves(cache: Any) -> tuple[Any, Any]:
    return cache.self_attention_cache, cache.cross_attention_cache


def keys_and_values(cache: Any, layer_index: int) -> tuple[Any, Any]:
    """Keys and values of a layer; None of one without attention."""
    if layer_index >= len(cache.layers):
        return None, None
    return getattr(cache.layers[layer_index], "keys", None), getattr(cache.layers[layer_index], "values", None)


def _keys_and_values_of_cache(cache: Any, slot: int) -> list[Any]:
    return [part for half in _halves(cache) for part in keys_and_values(half, slot)]


def _decoder_logits(model: nn.Module, mask: Tensor | None, ids: Tensor, states: Tensor, cache: Any) -> Tensor:
    from transformers.modeling_outputs import BaseModelOutput

    out = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        attention_mask=mask,
        decoder_input_ids=ids,
        cache=cache,
        use_cache=True,
    )
    return logits_of_output(out).float()
