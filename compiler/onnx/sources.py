"""An encoder with a decoder as three graphs, as hosts of ONNX name them: what reads, what begins, what goes on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...dsl.diagnostics import Reject
from ..capture.sample import sample
from ..checkpoints.pretrained import pretrained
from ..rows.forward import output_logits
from .checking import BEGINNING, CONTINUATION, ENCODER
from .refusal import cannot_write_onnx

SIDES = ("decoder", "encoder")  # whose keys and values a layer of the decoder keeps: what was said, and the source's
_FREE = torch.export.Dim.DYNAMIC


def refuse(model: nn.Module) -> None:
    """Raise Reject of an encoder with a decoder that is not written: one that hears, or whose decoder has no head."""
    kind = type(model).__name__
    if model.main_input_name != "input_ids":
        why = f"{kind} takes `{model.main_input_name}`, and encoders of token ids are written"
    elif pretrained(model).get_output_embeddings() is None:
        why = f"the decoder of {kind} has no head of logits"
    else:
        return
    raise Reject(cannot_write_onnx(why, help="`hf` writes it for transformers"))


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


class Beginning(nn.Module):
    """Logits of the first tokens of targets, and all keys and values: layer by layer its own, then the source's."""

    def __init__(self, model: nn.Module, slots: list[int]):
        super().__init__()
        self.model, self.slots = model, slots

    def forward(
        self, encoder_attention_mask: Tensor, input_ids: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        cache = _empty()
        logits = _logits(self.model, encoder_attention_mask, input_ids, encoder_hidden_states, cache)
        return logits, [part for slot in self.slots for half in _halves(cache) for part in parts_of(half, slot)]


class Continuation(nn.Module):
    """Logits of the tokens that follow, and the decoder's own keys and values; those of the source stay as they are.

    past    of each layer its own keys and values [b, heads, t, d], then the source's [b, heads, s, d]
    """

    def __init__(self, model: nn.Module, slots: list[int], width: int):
        super().__init__()
        self.model, self.slots, self.width = model, slots, width

    def forward(
        self, encoder_attention_mask: Tensor, input_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        cache = _empty()
        for n, slot in enumerate(self.slots):
            own, source = past[4 * n : 4 * n + 2], past[4 * n + 2 : 4 * n + 4]
            cache.self_attention_cache.update(*own, slot)
            cache.cross_attention_cache.update(*source, slot)
            cache.is_updated[slot] = True
        # What is made of these is not asked for: what was kept of the source is taken.
        states = past[2].new_zeros(len(input_ids), past[2].shape[2], self.width)
        logits = _logits(self.model, encoder_attention_mask, input_ids, states, cache)
        return logits, [part for slot in self.slots for part in parts_of(cache.self_attention_cache, slot)]


def graphs(model: nn.Module) -> Iterator[Graph]:
    """The three graphs of a model in float32."""
    given = sample(model, padding=0)
    ids, said = given["input_ids"], given["decoder_input_ids"]
    mask = torch.ones_like(ids)
    mask[1:, -2:] = 0
    yield Graph(
        ENCODER,
        Encoder(model),
        {"input_ids": ids, "attention_mask": mask},
        {name: {0: _FREE, 1: _FREE} for name in ("input_ids", "attention_mask")},
        ["input_ids", "attention_mask"],
        ["last_hidden_state"],
    )
    states, cache = Encoder(model)(ids, mask), _empty()
    _logits(model, mask, said, states, cache)
    slots = [n for n in range(len(cache.self_attention_cache.layers)) if all(p is not None for p in _parts(cache, n))]
    past = [part for slot in slots for part in _parts(cache, slot)]
    names = [f"{n}.{side}.{part}" for n in range(len(slots)) for side in SIDES for part in ("key", "value")]
    free = {0: _FREE, 1: _FREE}
    yield Graph(
        BEGINNING,
        Beginning(model, slots),
        {"encoder_attention_mask": mask, "input_ids": said, "encoder_hidden_states": states},
        {"encoder_attention_mask": free, "input_ids": free, "encoder_hidden_states": free},
        ["encoder_attention_mask", "input_ids", "encoder_hidden_states"],
        ["logits", *(f"present.{name}" for name in names)],
    )
    yield Graph(
        CONTINUATION,
        Continuation(model, slots, states.shape[-1]),
        {"encoder_attention_mask": mask, "input_ids": said[:, :2], "past": past},
        {"encoder_attention_mask": free, "input_ids": free, "past": [{0: _FREE, 2: _FREE} for _ in past]},
        ["encoder_attention_mask", "input_ids", *(f"past_key_values.{name}" for name in names)],
        ["logits", *(f"present.{name}" for name in names if f".{SIDES[0]}." in name)],
    )


def _empty() -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def _halves(cache: Any) -> tuple[Any, Any]:
    return cache.self_attention_cache, cache.cross_attention_cache


def parts_of(half: Any, slot: int) -> tuple[Any, Any]:
    """Keys and values of a layer; None of one without attention."""
    if slot >= len(half.layers):
        return None, None
    return getattr(half.layers[slot], "keys", None), getattr(half.layers[slot], "values", None)


def _parts(cache: Any, slot: int) -> list[Any]:
    return [part for half in _halves(cache) for part in parts_of(half, slot)]


def _logits(model: nn.Module, mask: Tensor, ids: Tensor, states: Tensor, cache: Any) -> Tensor:
    from transformers.modeling_outputs import BaseModelOutput

    out = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        attention_mask=mask,
        decoder_input_ids=ids,
        cache=cache,
        use_cache=True,
    )
    return output_logits(out).float()
