"""Are two models the same function? Asked on the shapes where a wrong one shows.

Comparing tokens misses a wrong cache slot or mask; so logits are compared on the shape of capture, on another
one, on a left-padded batch, and over a prefill and two decode steps, plain and padded.
"""

import inspect
import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..ir.capture.sample import BATCH, LENGTH, PADDING, sample_inputs, sample_tokens
from ..models.rows.forward import in_eval_mode, main_tensor_of_output
from ..models.rows.inputs import is_encoder_decoder, vocabulary_size
from ..models.rows.packed_inputs import is_media_encoder_decoder, token_input_name

_STEPS = 2
_OTHER_BATCH = 3
# (batch, length, padding of each further row)
_SHAPES = ((BATCH, LENGTH, 0), (3, 11, 0), (1, 1, 0), (BATCH, LENGTH, PADDING), (3, 11, 3))


def record_logits_of_sample_calls(
    model: nn.Module, *, vocab_size: int | None = None, seed: int = 0
) -> list[torch.Tensor]:
    """Logits [tokens, vocabulary] of every situation, without those at padding; kept to compare a model with
    what it was before an edit in place.

    Models that read no tokens are observed on their capture sample and on one of another size.
    """
    names = set(inspect.signature(inspect.unwrap(type(model).forward)).parameters)
    with torch.no_grad(), in_eval_mode(model):
        if is_encoder_decoder(model):
            return _encoder_decoder_logits(model)
        reads_more = bool(token_input_name(model)) and not is_media_encoder_decoder(model)
        if "input_ids" not in names or reads_more or not isinstance(model, PreTrainedModel):
            return [main_tensor_of_output(model(**sample_inputs(model, batch))) for batch in (BATCH, _OTHER_BATCH)]
        vocab_size = vocab_size or vocabulary_size(model)
        assert vocab_size is not None, f"the ids of a {type(model).__name__} have no bound"
        observed = [_logits(model, names, sample_tokens(vocab_size, *shape, _device(model), seed)) for shape in _SHAPES]
        if _accepts_cache(model, names):
            for padding in (0, PADDING):
                inputs = sample_tokens(vocab_size, BATCH, LENGTH + _STEPS, padding, _device(model), seed)
                observed += _prefill_and_decode_logits(model, names, inputs)
        return observed


def max_difference(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """The worst absolute difference of two observations; inf where shapes differ or a value isn't finite."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return math.inf
    worst = max(float((a.float() - b.float()).abs().max()) for a, b in zip(before, after, strict=True))
    return worst if math.isfinite(worst) else math.inf


def _logits(model: nn.Module, parameter_names: set[str], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """One forward; an unpadded batch goes without mask and positions, so that both ways are seen."""
    padded = bool((inputs["attention_mask"] == 0).any())
    passed = inputs if padded else {"input_ids": inputs["input_ids"]}
    out = main_tensor_of_output(model(**{name: value for name, value in passed.items() if name in parameter_names}))
    return _without_padding(out, inputs["attention_mask"])


def _without_padding(out: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Without what is said at padding; all of what is said of rows as a whole."""
    return out[mask.bool()] if out.shape[:2] == mask.shape else out


def _encoder_decoder_logits(model: nn.Module) -> list[torch.Tensor]:
    """An encoder with a decoder: whole targets beside sources with padding and without, then a token at a time."""
    observed: list[torch.Tensor] = []
    for shape in _SHAPES:
        inputs = sample_inputs(model, *shape)
        if not shape[2]:
            inputs = {name: value for name, value in inputs.items() if not name.endswith("attention_mask")}
        observed.append(main_tensor_of_output(model(**inputs)))
    for padding in (0, PADDING):
        inputs, cache = sample_inputs(model, BATCH, LENGTH, padding), None
        first = {name: x for name, x in inputs.items() if not name.startswith("decoder_") and name != "use_cache"}
        for position in range(inputs["decoder_input_ids"].shape[1]):
            step = inputs["decoder_input_ids"][:, position : position + 1]
            out = model(**first, decoder_input_ids=step, use_cache=True, **({"cache": cache} if cache else {}))
            cache = out.get("cache")
            observed.append(main_tensor_of_output(out))
    return observed


def _prefill_and_decode_logits(
    model: nn.Module, forward_arguments: set[str], inputs: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Prefill, then one token at a time with the cache: mask and positions given if the batch is padded.

    Nothing for encoders, which have the option but return no cache.
    """
    length = inputs["input_ids"].shape[1] - _STEPS
    padded = bool((inputs["attention_mask"] == 0).any())
    cache: Any = None
    observed = []
    for start, end in ((0, length), *((i, i + 1) for i in range(length, length + _STEPS))):
        passed: dict[str, Any] = {"input_ids": inputs["input_ids"][:, start:end], "use_cache": True}
        if padded and (cache is None or not all(cache.is_linear)):  # a pure state has no use for an old mask
            passed["attention_mask"] = inputs["attention_mask"][:, :end]
        if padded:
            passed["position_ids"] = inputs["position_ids"][:, start:end]
        out = model(**{name: value for name, value in passed.items() if name in forward_arguments}, cache=cache)
        cache = out.get("cache")
        if cache is None:
            return []
        observed.append(_without_padding(main_tensor_of_output(out), inputs["attention_mask"][:, start:end]))
    return observed


def _accepts_cache(model: nn.Module, parameter_names: set[str]) -> bool:
    """Whether the model takes a cache object; that it is a decoder not all of their configs say."""
    return "cache" in parameter_names and not model.config.is_encoder_decoder


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
