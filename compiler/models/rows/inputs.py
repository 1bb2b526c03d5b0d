"""Inputs of a model from rows: its arguments, the ends of texts, and the tokens to predict.

A row of a model that reads one sequence is that sequence. A row of an encoder with a decoder is both: its first half
what the encoder is given, its second half what the decoder says.
"""

import inspect
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.config_classes import model_class_from_architectures
from ..checkpoints.origin import CODE_POINTS
from ..checkpoints.pretrained import is_pretrained, pretrained
from .packed_inputs import (
    SAMPLES,
    is_media_encoder_decoder,
    main_input_name,
    other_parts,
    packed_input_parts,
    parameter_names,
    token_input_name,
    unpack_inputs_and_tokens,
)

# Inputs that hold no ids.
NUMBERS = {"pixel_values", "pixel_values_videos", "input_features", "input_values", "past_values"}


def forward_args_and_kwargs(model: nn.Module, rows: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a model for rows [b, t], on its device, without a cache."""
    rows, no_cache = rows.to(device_of(model)), use_cache_false_kwargs(model)
    if packed_input_parts(model):
        return (), _packed_arguments(model, rows) | no_cache
    if rows.is_floating_point():
        return (rows.to(dtype_of(model)),), no_cache
    if not hasattr(model, "can_generate"):
        return (rows,), no_cache
    if (main := main_input_name(model)) in SAMPLES:
        raise other_parts(
            f"{type(model).__name__} takes `{main}`, and its rows are token ids", help="give it rows of `tensors`"
        ).rejection()
    if is_encoder_decoder(model):
        source, target = source_and_target(rows)
        decoder_inputs = {"decoder_input_ids": decoder_inputs_of(model, target), **no_cache}
        return (source,), {**_attention_mask_kwargs(source, pad_id_of(model)), **decoder_inputs}
    return (rows,), (
        no_cache if pretrained(model).can_generate() else {**_attention_mask_kwargs(rows, pad_id_of(model)), **no_cache}
    )


def _packed_arguments(model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """Arguments of a model for rows that pack several inputs."""
    named, tokens = unpack_inputs_and_tokens(model, rows)
    if not token_input_name(model):
        return named
    if is_media_encoder_decoder(model):
        return named | {"decoder_input_ids": decoder_inputs_of(model, tokens)}
    return named | {"input_ids": tokens, **_attention_mask_kwargs(tokens, pad_id_of(model))}


def device_of(model: nn.Module) -> torch.device:
    """Device of the first of a model's tensors; called in every forward, so the others are not collected."""
    return next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of what a model computes with: images that it is given are to be so, too; not all of them see to it."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def use_cache_false_kwargs(model: nn.Module) -> dict[str, Any]:
    """`use_cache=False` for models that know it."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model is an encoder with a decoder, which take a sequence each; one that effc's engine runs, too."""
    if not is_pretrained(model) and not hasattr(model, "facts"):
        return False
    names = parameter_names(type(model).forward)
    is_decoder_alone = "input_ids" in names and not getattr(getattr(model, "config", None), "is_encoder_decoder", True)
    return "decoder_input_ids" in names and not is_decoder_alone  # BLIP-2 is either, by its config


def reads_tokens_alone(config: Mapping[str, Any]) -> bool:
    """Whether a model of that config, as plain JSON, takes no pictures, sounds or series; yes for unknown classes."""
    kind = model_class_from_architectures(str(config.get("model_type")), config.get("architectures"))
    return kind is None or parameter_names(kind.forward).isdisjoint(NUMBERS)


def is_encoder_decoder_config(config: Mapping[str, Any]) -> bool:
    """Whether a config, as plain JSON, is that of an encoder-decoder."""
    kind = model_class_from_architectures(str(config.get("model_type")), config.get("architectures"))
    return kind is not None and "decoder_input_ids" in parameter_names(kind.forward)


def reads_tokens(config: Mapping[str, Any]) -> bool:
    """Whether a model of a config, as plain JSON, reads tokens, not images or sounds that a decoder puts into words."""
    kind = model_class_from_architectures(str(config.get("model_type")), config.get("architectures"))
    return kind is None or kind.main_input_name == "input_ids"


def source_and_target(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Source and target of rows [b, t]: [b, t // 2] each; the last of an odd number is left out."""
    half = rows.shape[1] // 2
    return rows[:, :half], rows[:, half : 2 * half]


def decoder_inputs_of(model: nn.Module, target: Tensor) -> Tensor:
    """Decoder inputs for a target: the start token, and all but the last of the target's tokens."""
    return torch.cat([torch.full_like(target[:, :1], decoder_start_id(model)), target[:, :-1]], dim=1)


def decoder_start_id(model: nn.Module) -> int:
    """The token that a target begins with."""
    hf_model = pretrained(model)
    first = hf_model.config.get_text_config(decoder=True)
    return next(
        (
            token
            for config in (getattr(hf_model, "generation_config", None), hf_model.config, first)  # none without a head
            for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id")
            if isinstance(token := getattr(config, name, None), int)
        ),
        0,
    )


def vocabulary_size(model: nn.Module, *, decoder: bool = False) -> int | None:
    """Vocabulary size of a model's inputs, or of its outputs, where its config states it: a translator may have two.
    Code points, where a model hashes its ids."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    two_sided = decoder and is_encoder_decoder(model)
    text = config.get_text_config(**({"decoder": True} if two_sided else {}))
    side_size = getattr(text, "decoder_vocab_size" if two_sided else "src_vocab_size", None)
    hashed = CODE_POINTS if not decoder and getattr(text, "num_hash_buckets", None) else None
    return side_size or getattr(text, "vocab_size", None) or hashed


def pad_id_of(model: nn.Module) -> int | None:
    """The token that fills rows up, where the config says."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    token = getattr(text, "pad_token_id", None)
    return token if isinstance(token, int) else None


def non_padding_mask(rows: Tensor, pad_id: int | None) -> Tensor:
    """Mask of tokens in rows [b, t] that are no padding at the end; a row of padding alone keeps its first."""
    if pad_id is None or rows.is_floating_point():
        return torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
    behind = (rows != pad_id).flip(1).long().cumsum(1).flip(1) > 0  # [b, t] a token that is none follows, or is here
    behind[:, 0] = True
    return behind


def _attention_mask_kwargs(rows: Tensor, pad_id: int | None) -> dict[str, Tensor]:
    """A mask where rows are filled up; whole rows go without one."""
    attended = non_padding_mask(rows, pad_id)
    return {} if bool(attended.all()) else {"attention_mask": attended.long()}


def targets_and_prediction_mask(model: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Targets of a model's logits for rows, [b, p], and the mask of those that count, [b, p]: None for all."""
    tokens = unpack_inputs_and_tokens(model, rows)[1] if token_input_name(model) else rows
    if not is_encoder_decoder(model):
        return tokens[:, 1:], None
    target = tokens if is_media_encoder_decoder(model) else source_and_target(rows)[1]
    return target, non_padding_mask(target, pad_id_of(model))
