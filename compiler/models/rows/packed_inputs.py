"""Rows of models that take several inputs: all numbers of a row stand one behind the other, in float32.

Inputs of a stated size come first, in the order of `parts`; tokens come last, as many as there are. Token ids below
2**24 are exact in float32, and no vocabulary is larger.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

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
WAVE, FRAMES = 1600, 64  # samples (a tenth of a second) and frames of features, where a model takes any number
_BANDS = ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins")  # features per frame, in configs
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


def is_speech_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model is an encoder of sounds with a decoder that says what was said."""
    hears = bool(sound_shape(model))  # asked first: a signature takes longer, and every forward asks
    return hears and "decoder_input_ids" in inspect.signature(inspect.unwrap(type(model).forward)).parameters


def hears_fixed_length(model: nn.Module) -> bool:
    """Whether the config of a model that hears says how long its sounds are, as Whisper's does."""
    sizes = ("num_mel_bins", "max_source_positions")
    reads_features = getattr(model, "main_input_name", "") == "input_features"
    return reads_features and all(hasattr(getattr(model, "config", None), name) for name in sizes)


def frames_of(model: nn.Module) -> int:
    """Number of images per video of a model that takes videos alone; 0 of others."""
    main, config = getattr(model, "main_input_name", ""), getattr(model, "config", None)
    names = {"pixel_values": "num_frames", "pixel_values_videos": "frames_per_clip"}
    frames = getattr(config, names.get(main, ""), None)
    return frames if isinstance(frames, int) and not _accepts(model, "input_ids") else 0


def has_image_and_text_towers(model: nn.Module) -> bool:
    """Whether a model has two towers, for images and for texts, and is given both at once. Others read alone."""
    towers = (getattr(type(model), f"get_{kind}_features", None) for kind in ("text", "image"))
    has_both = _accepts(model, "input_ids", "pixel_values") and not pretrained(model).can_generate()
    if not has_both or not all(map(callable, towers)):
        return False
    image_config = _of_images(model.config)
    return hasattr(image_config, "image_size") and hasattr(image_config, "num_channels")


def can_generate_from_ids_alone(model: Any) -> bool:
    """Whether a model goes on from token ids alone: Whisper hears first, Pop2Piano's own `generate` wants sounds, and a
    decoder beside an encoder begins with a token that its config names."""
    if not getattr(model, "can_generate", bool)() or packed_input_parts(model) or not is_start(model):
        return False
    signature = inspect.signature(model.generate).parameters.values()
    needed = {p.name for p in signature if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return needed <= {"input_ids", "inputs"}


def is_start(model: Any) -> bool:
    """Whether `generate` knows the first token of a decoder beside an encoder; other decoders go on from a prompt."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return True
    config = getattr(model, "generation_config", None)
    return any(getattr(config, name, None) is not None for name in ("decoder_start_token_id", "bos_token_id"))


def packed_input_parts(model: nn.Module) -> tuple[PackedInput, ...]:
    """Inputs at the start of a packed row; empty for models with one input."""
    if is_speech_encoder_decoder(model):
        return (PackedInput(pretrained(model).main_input_name, sound_shape(model), torch.float32),)
    if has_image_and_text_towers(model):
        return (PackedInput("pixel_values", image_shape(model.config), torch.float32),)
    dummies = None if is_pretrained(model) else getattr(model, "dummy_inputs", None)
    if not isinstance(dummies, Mapping):
        return ()
    inputs = [
        PackedInput(name, tuple(x.shape[1:]), x.dtype)
        for name, x in dummies.items()
        if isinstance(x, Tensor) and x.dim()
    ]
    return tuple(inputs) if len(inputs) > 1 else ()


def tokens_of(model: nn.Module) -> str:
    """The name of the tokens that a row ends with; "" where it has none."""
    if is_speech_encoder_decoder(model):
        return "decoder_input_ids"
    return "input_ids" if has_image_and_text_towers(model) else ""


def unpack_inputs_and_tokens(model: nn.Module, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The parts of rows [b, n] by name, as wide as the model's numbers, and the tokens behind them [b, t]."""
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    layout, at = packed_input_parts(model), 0
    inputs: dict[str, Any] = {}
    _refuse_rows_of_other_layout(model, layout, rows)
    for part in layout:
        values = rows[:, at : at + part.size].reshape(len(rows), *part.shape)
        inputs[part.name] = values.to(kind if part.dtype.is_floating_point else part.dtype)
        at += part.size
    if not is_pretrained(model):
        dummies: Mapping[str, Any] = getattr(model, "dummy_inputs", {})
        inputs |= {name: value for name, value in dummies.items() if name not in inputs}  # numbers and switches
    return inputs, rows[:, at:].long()


def packed(inputs: Mapping[str, Tensor], order: tuple[str, ...]) -> Tensor:
    """Rows [n, numbers] of tensors [n, ...]; ids are to be below `EXACT`."""
    return torch.cat([inputs[name].reshape(len(inputs[name]), -1).float() for name in order], dim=1)


def _refuse_rows_of_other_layout(model: nn.Module, layout: tuple[PackedInput, ...], rows: Tensor) -> None:
    size, has_tokens = sum(part.size for part in layout), bool(tokens_of(model))
    fits = (
        rows.is_floating_point() and rows.dim() == 2 and (rows.shape[1] > size if has_tokens else rows.shape[1] == size)
    )
    if not fits:
        names = [*(part.name for part in layout), *([tokens_of(model)] if has_tokens else [])]
        expected = ", ".join(f"`{name}`" for name in names)
        raise other_parts(
            f"{type(model).__name__} {'hears sounds: it ' if is_speech_encoder_decoder(model) else ''}"
            f"takes {expected}, and its rows hold something else",
            help="give it rows of `tensors`" + (" or `sounds`" if is_speech_encoder_decoder(model) else ""),
        ).rejection()


def image_shape(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model sees."""
    image_config = _of_images(config)
    size = image_config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return image_config.num_channels, height, width


def _of_images(config: Any) -> Any:
    return getattr(config, "vision_config", None) or config


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
    if hears_fixed_length(model):
        return pretrained(model).config.num_mel_bins, 2 * pretrained(model).config.max_source_positions
    parts = (config, getattr(config, "encoder_config", None))
    sizes = ((part, getattr(part, name, None)) for part in parts for name in _BANDS)
    bands = next((size * getattr(part, "input_channels", 1) for part, size in sizes if isinstance(size, int)), 0)
    return (FRAMES, _stacked(model, bands)) if bands else ()


def _stacked(model: nn.Module, bands: int) -> int:
    """Features of an input: those of several frames in a row, where an encoder's first layer is a linear one of as many
    inputs, as Granite Speech 5's."""
    encoder = getattr(model, "encoder", None)
    layers = encoder.modules() if isinstance(encoder, nn.Module) else iter(())
    first = next((layer for layer in layers if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d))), None)
    return first.in_features if isinstance(first, nn.Linear) and first.in_features % bands == 0 else bands


def _accepts(model: nn.Module, *names: str) -> bool:
    if not is_pretrained(model):
        return False
    return set(names) <= set(inspect.signature(inspect.unwrap(type(model).forward)).parameters)
