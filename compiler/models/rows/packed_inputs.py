"""Rows of models that take several inputs: all numbers of a row stand one behind the other, in float32.

Inputs of a stated size come first, in the order of `parts`; tokens come last, as many as there are. Token ids below
2**24 are exact in float32, and no vocabulary is larger.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....dsl.syntax.diagnostics import Fault
from ..checkpoints.pretrained import is_pretrained, pretrained

other_parts = Fault(
    "other-parts",
    "A row has other parts than the model takes.\n\n"
    "A model of several inputs, as one of images with texts, of sounds, or a module whose `dummy_inputs` are several, "
    "is given rows that hold all of them: of `tensors`, and of `sounds` where it hears.",
    exit="environment",
)
SAMPLES = ("input_values", "past_values")  # main inputs that hold sounds or time series, and no ids
PICTURES = ("pixel_values", "pixel_values_videos")  # main inputs that hold images or videos
WAVE, FRAMES = 1600, 64  # samples (a tenth of a second) and frames of features, where a model takes any number
_BANDS = ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins")  # features per frame, in configs
IMAGE = 64  # pixels of a side where a model takes images of any size
FRAMES_OF_VIDEO = 4  # images of a video where a config names none: those of InstructBLIP
_FRAMES = ("num_frames", "frames_per_clip")  # names of configs
_CHANNELS = ("num_channels", "in_chans")
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
EXACT = 1 << 24  # integers below it are what they were after float32


@dataclass(frozen=True)
class PackedInput:
    """An input of a stated size: its shape in a row, and whether its numbers are whole."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return prod(self.shape)


def is_media_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model is an encoder of sounds or images with a decoder of tokens."""
    return token_input_name(model) == "decoder_input_ids"


def token_input_name(model: nn.Module) -> str:
    """The name of the tokens that a row ends with; "" where it has none."""
    if not main_input_name(model):  # a plain module
        return ""
    names, config = parameter_names(type(model).forward), getattr(model, "config", None)
    is_decoder_alone = "input_ids" in names and not getattr(config, "is_encoder_decoder", False)
    if "decoder_input_ids" in names and not is_decoder_alone:
        return "decoder_input_ids" if media_shape(model) else ""
    if "input_ids" in names and (has_image_and_text_towers(model) or reads_pictures(model)):
        return "input_ids"
    return ""


def main_input_name(model: nn.Module) -> str:
    return str(getattr(model, "main_input_name", ""))


def reads_pictures(model: nn.Module) -> bool:
    """Whether the main input of a model is an image or a video."""
    return is_pretrained(model) and main_input_name(model) in PICTURES


def has_fixed_audio_length(model: nn.Module) -> bool:
    """Whether the config of a model that hears says how long its sounds are, as Whisper's does."""
    sizes = ("num_mel_bins", "max_source_positions")
    reads_features = getattr(model, "main_input_name", "") == "input_features"
    return reads_features and all(hasattr(getattr(model, "config", None), name) for name in sizes)


def frames_per_video(model: nn.Module) -> int:
    """Number of images per video of a model that takes videos; 0 of others."""
    if not reads_pictures(model):
        return 0
    config = _image_config(model.config)
    frames = next((n for name in _FRAMES if isinstance(n := getattr(config, name, None), int)), 0)
    has_no_images = main_input_name(model) == PICTURES[1] or _placeholder_id_field(model.config).startswith("video")
    return frames or (FRAMES_OF_VIDEO if has_no_images else 0)


def has_image_and_text_towers(model: nn.Module) -> bool:
    """Whether a model has two towers, for images and for texts, and is given both at once. Others read alone."""
    towers = (getattr(type(model), f"get_{kind}_features", None) for kind in ("text", "image"))
    has_both = is_pretrained(model) and {"input_ids", PICTURES[0]} <= parameter_names(type(model).forward)
    if not has_both or pretrained(model).can_generate() or not all(map(callable, towers)):
        return False
    image_config = _image_config(model.config)
    return hasattr(image_config, "image_size") and hasattr(image_config, "num_channels")


def can_generate_from_ids_alone(model: Any) -> bool:
    """Whether a model goes on from token ids alone: Whisper hears first, Pop2Piano's own `generate` wants sounds, and a
    decoder beside an encoder begins with a token that its config names."""
    if (
        not getattr(model, "can_generate", bool)()
        or packed_input_parts(model)
        or not has_start_token_for_generate(model)
    ):
        return False
    signature = inspect.signature(model.generate).parameters.values()
    needed = {p.name for p in signature if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return needed <= {"input_ids", "inputs"}


def has_start_token_for_generate(model: Any) -> bool:
    """Whether `generate` knows the first token of a decoder beside an encoder; other decoders go on from a prompt."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return True
    config = getattr(model, "generation_config", None)
    return any(getattr(config, name, None) is not None for name in ("decoder_start_token_id", "bos_token_id"))


def packed_input_parts(model: nn.Module) -> tuple[PackedInput, ...]:
    """Inputs at the start of a packed row; empty for models with one input."""
    if token_input_name(model):
        main = main_input_name(model)
        name = main if media_shape(model) else PICTURES[0]
        return (PackedInput(name, media_shape(model) or image_shape(model.config), torch.float32),)
    dummies = None if is_pretrained(model) else getattr(model, "dummy_inputs", None)
    if not isinstance(dummies, Mapping):
        return ()
    inputs = [
        PackedInput(name, tuple(x.shape[1:]), x.dtype)
        for name, x in dummies.items()
        if isinstance(x, Tensor) and x.dim()
    ]
    return tuple(inputs) if len(inputs) > 1 else ()


class Placeholders(NamedTuple):
    """A token that stands in rows where an image or a video is read, once for each of its vectors."""

    token: int
    vectors: int


def placeholders_of(model: nn.Module) -> Placeholders | None:
    """Placeholders of a model whose config says how many vectors there are (`num_query_tokens`); else None."""
    if token_input_name(model) != "input_ids" or not (name := _placeholder_id_field(model.config)):
        return None
    config = pretrained(model).config
    count, token = getattr(config, "num_query_tokens", None), getattr(config, name)
    words = getattr(config.get_text_config(), "vocab_size", 0)
    return (
        Placeholders(token, count * (frames_per_video(model) or 1))
        if type(count) is int and 0 <= token < words
        else None
    )


def prepend_placeholders(model: nn.Module, ids: Tensor) -> Tensor:
    """Token ids [b, t] behind the placeholders of a model, without any of them in between; others as they are."""
    placeholders = placeholders_of(model)
    if placeholders is None:
        return ids
    words = pretrained(model).config.get_text_config().vocab_size
    ids = torch.where(ids == placeholders.token, (ids + 1) % words, ids)
    return torch.cat([ids.new_full((len(ids), placeholders.vectors), placeholders.token), ids], dim=1)


def _placeholder_id_field(config: Any) -> str:
    return next((name for name in _PLACEHOLDERS if isinstance(getattr(config, name, None), int)), "")


def unpack_inputs_and_tokens(model: nn.Module, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The parts of rows [b, n] by name, as wide as the model's numbers, and the tokens behind them [b, t]."""
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    layout, at = packed_input_parts(model), 0
    inputs: dict[str, Any] = {}
    _refuse_rows_of_other_layout(model, layout, rows)
    _refuse_wrong_placeholder_count(model, rows[:, sum(part.size for part in layout) :])
    for part in layout:
        values = rows[:, at : at + part.size].reshape(len(rows), *part.shape)
        inputs[part.name] = values.to(kind if part.dtype.is_floating_point else part.dtype)
        at += part.size
    if not is_pretrained(model):
        dummies: Mapping[str, Any] = getattr(model, "dummy_inputs", {})
        inputs |= {name: value for name, value in dummies.items() if name not in inputs}  # numbers and switches
    return inputs, rows[:, at:].long()


def pack_inputs(inputs: Mapping[str, Tensor], order: tuple[str, ...]) -> Tensor:
    """Rows [n, numbers] of tensors [n, ...]; ids are to be below `EXACT`."""
    return torch.cat([inputs[name].reshape(len(inputs[name]), -1).float() for name in order], dim=1)


def _refuse_rows_of_other_layout(model: nn.Module, layout: tuple[PackedInput, ...], rows: Tensor) -> None:
    size, has_tokens = sum(part.size for part in layout), bool(token_input_name(model))
    fits = (
        rows.is_floating_point() and rows.dim() == 2 and (rows.shape[1] > size if has_tokens else rows.shape[1] == size)
    )
    if not fits:
        names = [*(part.name for part in layout), *([token_input_name(model)] if has_tokens else [])]
        expected = ", ".join(f"`{name}`" for name in names)
        raise other_parts(
            f"{type(model).__name__} {'hears sounds: it ' if sound_shape(model) else ''}"
            f"takes {expected}, and its rows hold something else",
            help="give it rows of `tensors`" + (" or `sounds`" if sound_shape(model) else ""),
        ).rejection()


def _refuse_wrong_placeholder_count(model: nn.Module, tokens: Tensor) -> None:
    """Reject rows whose images nothing reads, or too much."""
    placeholders = placeholders_of(model) if not tokens.is_meta else None
    if placeholders is None:
        return
    counts = (tokens == placeholders.token).sum(1)
    if bool((counts != placeholders.vectors).any()):
        raise other_parts(
            f"{type(model).__name__} reads an image at {placeholders.vectors} tokens {placeholders.token} of a row, "
            f"and a row has {int(counts[counts != placeholders.vectors][0])}",
            help="take the `input_ids` that its processor writes",
        ).rejection()


def image_shape(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model sees; of any size where its config names none."""
    image_config = _image_config(config)
    size = next((s for name in ("image_size", "crop_size") if (s := getattr(image_config, name, None))), IMAGE)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = next((n for name in _CHANNELS if (n := getattr(image_config, name, None))), 3)
    return channels, height, width


def _image_config(config: Any) -> Any:
    """The part of a config that says how images are: itself, or that of a tower, a backbone or an encoder."""
    parts = [getattr(config, name, None) for name in ("vision_config", "backbone_config", "encoder")]
    sizes = [part for part in (config, *parts) if any(getattr(part, name, None) for name in _CHANNELS)]
    return next((part for part in (*sizes, *parts) if part is not None), config)


def media_shape(model: nn.Module) -> tuple[int, ...]:
    """Shape of a model's main input in a row, where that is an image, a video or a sound; else ()."""
    if not reads_pictures(model):
        return sound_shape(model)
    frames = frames_per_video(model)
    return (frames, *image_shape(model.config)) if frames else image_shape(model.config)


def sound_shape(model: nn.Module) -> tuple[int, ...]:
    """Shape of a sound that a model hears: samples [t], features [frames, bands], or Whisper's [bands, frames], as many
    frames as its convolutions halve to its positions. () for models that hear nothing."""
    main, config = getattr(model, "main_input_name", ""), getattr(model, "config", None)
    if main == "inputs" and isinstance(encoder := getattr(model, "encoder", None), nn.Module):
        return sound_shape(encoder)  # of a model of its own, beside any decoder
    if main == "input_values":
        return (WAVE,)
    if main != "input_features":
        return ()
    if has_fixed_audio_length(model):
        return pretrained(model).config.num_mel_bins, 2 * pretrained(model).config.max_source_positions
    parts = (config, getattr(config, "encoder_config", None))
    sizes = ((part, getattr(part, name, None)) for part in parts for name in _BANDS)
    bands = next((size * getattr(part, "input_channels", 1) for part, size in sizes if isinstance(size, int)), 0)
    return (FRAMES, _stacked_feature_count(model, bands)) if bands else ()


def _stacked_feature_count(model: nn.Module, n_mel_bands: int) -> int:
    """Features of an input: those of several frames in a row, where an encoder's first layer is a linear one of as many
    inputs, as Granite Speech 5's."""
    encoder = getattr(model, "encoder", None)
    layers = encoder.modules() if isinstance(encoder, nn.Module) else iter(())
    first = next((layer for layer in layers if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d))), None)
    return first.in_features if isinstance(first, nn.Linear) and first.in_features % n_mel_bands == 0 else n_mel_bands


@cache
def parameter_names(forward: Callable[..., Any]) -> frozenset[str]:
    """Names of the arguments of a forward; kept, as every call of a model asks for them."""
    return frozenset(inspect.signature(inspect.unwrap(forward)).parameters)
