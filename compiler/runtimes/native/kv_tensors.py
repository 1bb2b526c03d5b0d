"""Keys and values that a causal language model keeps, as tensors that a program takes and gives."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ....dsl.syntax.diagnostics import Fault
from ...ir.capture.sample import sample_inputs


def decoder_sample_inputs(model: nn.Module, fault: Fault, remedy: str) -> tuple[dict, list, list]:
    """Example inputs of a decoder: two rows of three tokens after a cache of five, with padding in one row.

    fault    what a model is refused with that keeps anything else
    remedy   what holds such a model
    """
    batch, length, past_length = 2, 3, 5
    sequence = sample_inputs(model, batch=batch, length=past_length + length, padding_per_row=1)
    past, slots = _cached_keys_and_values(
        model, fault, remedy, {n: x[:, :past_length] if isinstance(x, Tensor) else x for n, x in sequence.items()}
    )
    current = {
        n: x if n == "attention_mask" else x[:, past_length:] for n, x in sequence.items() if isinstance(x, Tensor)
    }
    current.setdefault("attention_mask", torch.ones(batch, past_length + length, dtype=torch.int64))
    return current, past, slots


def _cached_keys_and_values(
    model: nn.Module, fault: Fault, remedy: str, inputs: dict[str, Any]
) -> tuple[list[Tensor], list[int]]:
    """Keys and values after a forward, and the slots that have some; Reject where a layer keeps something else."""
    from transformers import DynamicCache

    refuse_recurrent_layers(model, fault, remedy)
    if "cache" not in signature(model.forward).parameters:
        raise fault(f"{type(model).__name__} keeps no keys and values", help=remedy).rejection()
    cache = model(**inputs | {"use_cache": True}, cache=DynamicCache()).cache
    if cache is None:
        kind = type(model).__name__
        raise fault(
            f"{kind} continues no text as its config has it: it keeps no keys and values",
            help="take an encoder with its masked head, as a ...ForMaskedLM",
        ).rejection()
    past: list[Tensor] = []
    slots: list[int] = []
    for number, layer in enumerate(cache.layers):
        if not getattr(layer, "is_initialized", True):  # its attention was cut
            continue
        layer_tensors = getattr(layer, "keys", None), getattr(layer, "values", None)
        parts = [part for part in layer_tensors if isinstance(part, Tensor) and part.dim() == 4]
        if len(parts) < len(layer_tensors):
            kind = type(layer).__name__
            raise fault(f"layer {number} of the cache is a {kind}, no keys and values", help=remedy).rejection()
        past += parts
        slots.append(number)
    return past, slots


def refuse_recurrent_layers(model: nn.Module, fault: Fault, remedy: str) -> None:
    """Raise Reject for models with a layer that goes along the tokens one by one, and keeps a state."""
    for path, module in model.named_modules():
        if any(isinstance(child, nn.Conv1d) for child in module.children()):
            raise fault(
                f"`{path}` ({type(module).__name__}) keeps a state, as mixers and short convolutions do", help=remedy
            ).rejection()
