"""A causal language model as a function of tokens and of the keys and values of those before."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ...dsl.diagnostics import Reject
from ..capture.sample import sample
from .refusal import cannot_write_onnx

KEEPS = "ONNX has no standard op for it; `hf` and `native` hold it"


class Decoder(nn.Module):
    """Logits, and keys and values layer by layer; masks and positions reach over the tokens before.

    given   input_ids [b, t], attention_mask [b, past + t] and, where the model takes some, position_ids [b, t]
    past    keys and values in turns, each [b, heads, past, d]; of layers without attention none
    slots   where in the cache they belong
    """

    def __init__(self, model: nn.Module, slots: list[int]):
        super().__init__()
        self.model, self.slots = model, slots

    def forward(self, given: dict[str, Tensor], past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        cache = filled(past, self.slots)
        logits = self.model(**given, cache=cache, use_cache=True).logits
        return logits.float(), [part for n in self.slots for part in (cache.layers[n].keys, cache.layers[n].values)]


def filled(past: list[Tensor], slots: list[int]) -> Any:
    """A cache with keys and values in it; it never forgets, as windows are in the mask."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, slot in enumerate(slots):
        cache.update(past[2 * layer], past[2 * layer + 1], slot)
    return cache


def inputs_of(model: nn.Module, batch: int = 2, length: int = 3, before: int = 5) -> tuple[dict, list, list]:
    """What a decoder is traced with: some tokens after some others, of which a row lacks a few."""
    whole = sample(model, batch=batch, length=before + length, padding=1)
    past, slots = _kept(model, {n: x[:, :before] if isinstance(x, Tensor) else x for n, x in whole.items()})
    given = {n: x if n == "attention_mask" else x[:, before:] for n, x in whole.items() if isinstance(x, Tensor)}
    given.setdefault("attention_mask", torch.ones(batch, before + length, dtype=torch.int64))
    return given, past, slots


def _kept(model: nn.Module, given: dict[str, Any]) -> tuple[list[Tensor], list[int]]:
    """Keys and values after a forward, and the slots that have some; Reject where a layer keeps something else."""
    from transformers import DynamicCache

    refuse_states(model)
    if "cache" not in signature(model.forward).parameters:
        raise Reject(cannot_write_onnx(f"{type(model).__name__} keeps no keys and values", help=KEEPS))
    cache = model(**given | {"use_cache": True}, cache=DynamicCache()).cache
    if cache is None:
        kind = type(model).__name__
        raise Reject(
            cannot_write_onnx(
                f"{kind} continues no text as its config has it: it keeps no keys and values",
                help="take an encoder with its masked head, as a ...ForMaskedLM",
            )
        )
    kept, slots = [], []
    for number, layer in enumerate(cache.layers):
        if not getattr(layer, "is_initialized", True):  # its attention was cut
            continue
        parts = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not all(isinstance(part, Tensor) and part.dim() == 4 for part in parts):
            kind = type(layer).__name__
            raise Reject(cannot_write_onnx(f"layer {number} of the cache is a {kind}, no keys and values", help=KEEPS))
        kept += parts
        slots.append(number)
    return kept, slots


def refuse_states(model: nn.Module) -> None:
    """Raise Reject for models with a layer that goes along the tokens one by one, and keeps a state."""
    for path, module in model.named_modules():
        if any(isinstance(child, nn.Conv1d) for child in module.children()):
            raise Reject(
                cannot_write_onnx(
                    f"`{path}` ({type(module).__name__}) keeps a state, as mixers and short convolutions do", help=KEEPS
                )
            )
