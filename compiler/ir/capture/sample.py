"""The small batch that models are captured with, and the state in which they run it."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.integrations.moe import ExpertsInterface

from ....dsl.syntax.diagnostics import Fault
from ...models.rows.inputs import dtype_of, vocabulary_size
from ...models.rows.packed_inputs import (
    PICTURES,
    WAVE,
    has_image_and_text_towers,
    is_media_encoder_decoder,
    main_input_name,
    media_shape,
    packed_input_parts,
    parameter_names,
    prepend_placeholders,
    sound_shape,
    token_input_name,
)

unknown_inputs = Fault(
    "unknown-inputs",
    "Nothing says what a module's forward takes.\n\n"
    "Models of transformers are run on token ids, pixels, videos, sounds or series made from their config, or on "
    "pixels, videos or sounds with tokens; those that need more are not. Any other module names small inputs "
    "of its own in the attribute or property "
    "`dummy_inputs`: the keyword arguments of its forward, tensors whose first axis is the batch. A module around a "
    "model of transformers that takes more than effc makes:\n\n"
    "    class Seen(torch.nn.Module):\n"
    "        def __init__(self):\n"
    "            super().__init__()\n"
    '            self.model = AutoModelForImageTextToText.from_pretrained("./model")\n'
    '            self.dummy_inputs = {"input_ids": torch.ones(2, 8, dtype=torch.long),\n'
    '                                 "pixel_values": torch.rand(2, 3, 224, 224)}\n\n'
    "        def forward(self, input_ids, pixel_values):\n"
    "            return self.model(input_ids=input_ids, pixel_values=pixel_values).logits\n\n"
    '`module("seen.py:Seen")` names it in a recipe, and `tensors("rows.safetensors")` its rows.',
    exit="environment",
)

_WRAP = "wrap it in a module of your own that has `dummy_inputs`, and give it rows of `tensors`"
BATCH, LENGTH, PADDING = 2, 7, 2  # odd length: no chunk or window size divides it
COUNT = "create_position_ids_from_input_ids"  # of transformers: positions of RoBERTa and its kin


def sample_inputs(
    model: nn.Module, batch: int = BATCH, length: int = LENGTH, padding_per_row: int = PADDING
) -> dict[str, Any]:
    """Keyword arguments of a forward: left-padded ids [2, 7] with mask, positions and a cache, pixels, or sounds.

    Raises Reject (unknown-inputs) for a module that is none of transformers and has no `dummy_inputs`, and for models
    that read neither one sequence of tokens nor images.
    """
    if not isinstance(model, PreTrainedModel):
        return _declared_dummy_inputs(model, batch)
    names, main = parameter_names(type(model).forward), main_input_name(model) or "input_ids"
    device = next(model.parameters()).device
    if main == "pixel_values" and "spatial_shapes" in names:  # SigLIP 2
        raise unknown_inputs(
            f"{type(model).__name__} takes patches of images with `spatial_shapes`, and effc makes whole images",
            help=_WRAP,
        ).rejection()
    if token_input_name(model):
        return _media_with_tokens(model, batch, length, padding_per_row)
    if main in PICTURES:
        return {main: sample_images(model, batch, device).to(dtype_of(model))}
    if main == "input_values":
        return {
            main: _with_channel_axis_if_needed(model, sample_waveforms(model.config, batch, device).to(dtype_of(model)))
        }
    if main == "past_values" and hasattr(model.config, "num_input_channels"):
        return {main: sample_time_series(model.config, batch, device).to(dtype_of(model))}
    if sound_shape(model):
        return {main: sample_sounds(model, batch, device).to(dtype_of(model))}
    _refuse_unsupported_inputs(model, main, names)
    words = vocabulary_size(model) or 1
    inputs = sample_tokens(words, batch, length, padding_per_row, device)
    if "use_cache" in names:
        inputs["use_cache"] = True
    if "decoder_input_ids" in names:
        inputs |= sample_decoder_inputs(inputs["input_ids"] % (vocabulary_size(model, decoder=True) or words))
    return {name: value for name, value in inputs.items() if name in names}


def _media_with_tokens(model: PreTrainedModel, batch: int, length: int, padding_per_row: int) -> dict[str, Any]:
    """Images, videos or sounds with the tokens that a model reads or says beside them."""
    names, device = parameter_names(type(model).forward), next(model.parameters()).device
    (part,) = packed_input_parts(model)
    numbers = _deterministic_numbers((batch, *part.shape), 0).to(device).to(dtype_of(model))
    words = vocabulary_size(model, decoder=True) or 1
    read = sample_tokens(words, batch, length, padding_per_row, device)
    if is_media_encoder_decoder(model):
        media = {part.name: numbers.sub(1) if sound_shape(model) else numbers}
        return media | sample_decoder_inputs(read["input_ids"]) | {"use_cache": True}
    ids = prepend_placeholders(model, read["input_ids"])
    if ids.shape[1] > length:  # as many rows as were asked for, none of them filled up
        read = {"input_ids": ids}
    inputs = read | {part.name: numbers} | ({"use_cache": True} if not has_image_and_text_towers(model) else {})
    return {name: value for name, value in inputs.items() if name in names}


def sample_decoder_inputs(ids: Tensor) -> dict[str, Tensor]:
    """Decoder inputs beside sources: as many rows, shorter, one of them with a mask."""
    target = ids.flip(1)[:, : max(1, ids.shape[1] - 2)]
    mask = torch.ones_like(target)
    mask[1:, :1] = 0
    return {"decoder_input_ids": target, "decoder_attention_mask": mask}


def _refuse_unsupported_inputs(model: PreTrainedModel, main_input: str, input_names: frozenset[str]) -> None:
    """Models that read something else than one row of tokens or one image, or write several tokens at a time."""
    name = type(model).__name__
    if main_input != "input_ids":
        raise unknown_inputs(
            f"{name} takes `{main_input}`, and effc doesn't know what it would be given there", help=_WRAP
        ).rejection()
    if {"decoder_input_ids", "pixel_values", "bbox"} <= input_names:  # UDOP
        raise unknown_inputs(
            f"{name} reads texts with `bbox` and `pixel_values`, where they stand on an image of their page, and effc "
            "makes token ids alone",
            help=_WRAP,
        ).rejection()
    codebooks = getattr(model.config.get_text_config(decoder=True), "num_channels", 1)
    if "decoder_input_ids" in input_names and codebooks > 1:  # Dia writes sound
        raise unknown_inputs(
            f"the decoder of {name} takes `decoder_input_ids` of {codebooks} codebooks at each position, and effc "
            "makes rows of one",
            help=_WRAP,
        ).rejection()
    if type(vocabulary_size(model)) is not int:
        raise unknown_inputs(
            f"the config of {name} states no `vocab_size`, below which token ids would be drawn",
            help="write it into its config.json, or wrap the model in a module of your own that has `dummy_inputs`",
        ).rejection()


def first_position_id(model: nn.Module) -> int:
    """The number of a row's first position: RoBERTa and its kin begin behind the one of padding.

    compiler/artifacts/verify_child.py has the same for itself: it runs where nothing of effc is imported.
    """
    position_ids, padding = _position_function_and_padding(model)
    return 0 if position_ids is None else int(position_ids(torch.tensor([[padding + 1]]), padding)[0, 0])


def uncounted_token_id(model: nn.Module) -> int | None:
    """The token that gets no position wherever it stands, in such a model."""
    position_ids, padding = _position_function_and_padding(model)
    return None if position_ids is None else padding


def _position_function_and_padding(model: nn.Module) -> tuple[Callable[[Tensor, int], Tensor] | None, int]:
    """Function that numbers a model's tokens by their kind, and the number that it leaves out."""
    for module in model.modules():
        home = sys.modules.get(type(module).__module__)  # which counts for Luke and MPNet, whose classes do not
        position_ids, padding = getattr(module, COUNT, getattr(home, COUNT, None)), getattr(module, "padding_idx", None)
        if callable(position_ids) and type(padding) is int:
            return position_ids, padding
    return None, 0


def sample_images(model: nn.Module, batch: int, device: Any = "cpu") -> Tensor:
    """Images [batch, channels, height, width] or videos [batch, frames, ...] of the size that a config names."""
    return _deterministic_numbers((batch, *media_shape(model)), 0).to(device)


def sample_sounds(model: nn.Module, batch: int, device: Any = "cpu") -> Tensor:
    """Sounds [batch, ...] of the shape that a model hears, in -1..1."""
    return _deterministic_numbers((batch, *sound_shape(model)), 0).sub(1).to(device)


def sample_waveforms(config: Any, batch: int, device: Any = "cpu") -> Tensor:
    """Sound as it is: samples [batch, t], or pictures of it [batch, frames, bands] where the config says how long."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return _deterministic_numbers((batch, config.max_length, config.num_mel_bins), 0).sub(1).to(device)
    return _deterministic_numbers((batch, WAVE), 0).sub(1).to(device)


def sample_time_series(config: Any, batch: int, device: Any = "cpu") -> Tensor:
    """Time series [batch, context, channels] of the length that the config names, in -1..1."""
    return _deterministic_numbers((batch, config.context_length, config.num_input_channels), 0).sub(1).to(device)


class _Entry(Exception):
    """A convolution and what it is given, which ends the forward that found out."""


def _with_channel_axis_if_needed(model: nn.Module, samples: Tensor) -> Tensor:
    """Samples [batch, t] with an axis of channels where a model's first convolution is given them as they come."""

    def record(module: nn.Conv1d, args: tuple[Tensor, ...]) -> None:
        raise _Entry(module.in_channels, args[0].shape)

    hooks = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, nn.Conv1d)]
    try:
        with torch.no_grad():
            model(samples)
    except _Entry as entry:
        channels, shape = entry.args
        return samples[:, None].expand(-1, channels, -1) if len(shape) == 2 else samples
    except Exception:  # a model's forward may raise anything; capture says what
        return samples
    finally:
        for hook in hooks:
            hook.remove()
    return samples


def _deterministic_numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    """In 0..2; deterministic without torch's generators."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count).view(shape) * 7919 + 31 * seed) % 256).float().div(128)


def can_make_sample_inputs(model: nn.Module) -> bool:
    """Whether `sample_inputs` can make inputs for a model."""
    return isinstance(model, PreTrainedModel) or isinstance(getattr(model, "dummy_inputs", None), Mapping)


def _declared_dummy_inputs(model: nn.Module, batch: int) -> dict[str, Any]:
    """Example inputs that a plain module declares, with another number of rows."""
    if not can_make_sample_inputs(model):
        raise unknown_inputs(
            f"{type(model).__name__} does not say what its forward takes",
            help="give it an attribute `dummy_inputs`: keyword arguments, tensors whose first axis is the batch",
        ).rejection()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dummies: Mapping[str, Any] = getattr(model, "dummy_inputs", {})
    rows = {
        name: x[torch.arange(batch, device=x.device) % len(x)] if isinstance(x, Tensor) and x.dim() else x
        for name, x in dummies.items()
    }
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in rows.items()}


def sample_tokens(
    vocab_size: int, batch: int, length: int, padding_per_row: int, device: Any = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Ids, mask and positions [batch, length]; row i is left-padded by i * padding_per_row positions.

    Deterministic in `seed` without touching torch's generators; values on the meta device don't exist anyway.
    """
    ids = (torch.arange(batch * length).view(batch, length) * 7919 + 31 * seed + 3) % vocab_size
    start = (torch.arange(batch) * padding_per_row).view(batch, 1)
    mask = (torch.arange(length).view(1, length) >= start).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    named = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: value.to(device) for name, value in named.items()}


@contextmanager
def meta_forward_patches(model: nn.Module) -> Iterator[None]:
    """Inside, masks of a model on the meta device are built without looking whether padding occurs: nothing is there to
    see.

    Experts are computed in batches there: grouped products have no shapes but for bfloat16, and a loop over the
    experts that were hit needs numbers.
    """
    if next(model.parameters()).device.type != "meta":
        yield
        return
    experts: Any = ExpertsInterface  # whose method is another one for a while
    tracing, find = masking_utils.is_tracing, experts.get_interface
    masking_utils.is_tracing = lambda tensor=None: True
    experts.get_interface = lambda self, name, default: self["batched_mm"]
    try:
        yield
    finally:
        masking_utils.is_tracing, experts.get_interface = tracing, find
