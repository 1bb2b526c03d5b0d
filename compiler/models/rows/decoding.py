"""Tokens fed to a model one by one over its cache of keys and values."""

from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ....dsl.syntax.diagnostics import Fault
from ...core.events import iterate_and_report
from .batch_limit import max_rows_per_forward
from .forward import RowNll, evaluating, logits_of_output, token_losses
from .inputs import device_of, is_encoder_decoder

no_cache = Fault("no-cache", "Decoding needs a cache of keys and values, and the model has none.")
CACHES = ("cache", "past_key_values", "cache_params")  # newest name first; later ones may be its aliases


def cache_kwargs_of(output: Any) -> dict[str, Any]:
    """The cache that a forward returned, as the next one takes it."""
    name = next((n for n in CACHES if n in output), None)
    if name is None:
        raise no_cache(f"{type(output).__name__} holds none of {', '.join(CACHES)}").rejection()
    return {name: output[name]}


def use_cache_kwargs(model: nn.Module) -> dict[str, Any]:
    """Arguments that ask a forward for its cache; empty where it takes no `use_cache`."""
    return {"use_cache": True} if "use_cache" in signature(model.forward).parameters else {}


def logits_while_decoding(model: nn.Module, ids: Tensor, prompt_length: int) -> Iterator[Tensor]:
    """Logits [b, vocab] float32 behind the prompt of `ids` [b, length], then behind each of the other tokens."""
    ids = ids.to(device_of(model))
    caching = use_cache_kwargs(model)
    if not caching or is_encoder_decoder(model):
        raise no_cache(f"{type(model).__name__} is no decoder with a cache that grows token by token").rejection()
    out = model(input_ids=ids[:, :prompt_length], **caching)
    yield logits_of_output(out)[:, -1].float()
    for position in range(prompt_length, ids.shape[1]):
        out = model(input_ids=ids[:, position : position + 1], **caching, **cache_kwargs_of(out))
        yield logits_of_output(out)[:, -1].float()


def decoded_row_nll(model: nn.Module, rows: Tensor, n_decoded: int) -> RowNll:
    """Nats over the last `n_decoded` tokens of each of `rows` [n, length], fed one by one behind the others."""
    prompt_length, sums = rows.shape[1] - n_decoded, []
    with evaluating(model):
        for ids in rows.split(max_rows_per_forward()):
            targets = iterate_and_report(ids[:, prompt_length:].unbind(1), "decoded tokens", n_decoded)
            losses = [
                token_losses(values, column.to(values.device)).cpu().double()
                for column, values in zip(targets, logits_while_decoding(model, ids, prompt_length), strict=False)
            ]
            sums += torch.stack(losses).sum(0).tolist()
    return RowNll(sums, [n_decoded] * len(sums))
