"""The first call of every unit, found by running the model once."""

import copy
import traceback
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin

from ...models.rows.forward import in_eval_mode
from ...models.rows.inputs import is_encoder_decoder
from ..unit import positional_argument_names
from .failed_forward import (
    failing_module_path,
    failing_source_line,
    first_sentence,
    random_draw_diagnostic,
    remedy_for_failed_forward,
    unsupported_model,
)
from .random_draws import NoDraws, RandomDraw
from .sample import can_make_sample_inputs, meta_forward_patches, sample_inputs
from .signature import call_signature, module_signature

# How models say that a size or a cache is not one for them. A wrong name or type would be a mistake of ours.
_CANT_RUN = (RuntimeError, ValueError, IndexError)
_PACKAGE = __name__.partition(".")[0]  # the package: an environment may lie inside of the folder of its sources
_OTHER_SHAPE = (3, 11, 3)  # batch, length, left padding of each further row


@dataclass
class UnitCall:
    """The arguments of a unit's first call: `free` become placeholders, `statics` are baked.

    plain   a call for rows without padding and mask: what it lacks of another call's arguments is None then
    masks   of the same call where no cache is kept, if there are none otherwise
    """

    free: dict[str, Any] = field(default_factory=dict)
    statics: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    masks: dict[str, Any] = field(default_factory=dict)

    def with_masks_as_arguments(self) -> "UnitCall":
        statics = {name: value for name, value in self.statics.items() if name not in self.masks}
        return replace(self, free=self.free | self.masks, statics=statics, masks={})


@dataclass
class Calls:
    order: list[str] = field(default_factory=list)  # unit paths as they were called
    signatures: dict[str, Any] = field(default_factory=dict)  # unit path -> signature
    first: dict[Any, UnitCall] = field(default_factory=dict)  # signature -> the first call that had it
    irregular: dict[str, str] = field(default_factory=dict)  # path -> why a list element is no unit


def outermost_list_elements(model: nn.Module) -> dict[str, nn.Module]:
    """The elements of module lists that lie in no other element, by path."""
    modules: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if type(module) is nn.ModuleList and not any(path.startswith(f"{outer}.") for outer in modules):
            modules |= {f"{path}.{name}" if path else name: child for name, child in module.named_children()}
    return modules


def record_first_calls(model: nn.Module, inputs: dict[str, Any]) -> Calls:
    """Run the model once and keep, per distinct signature, the arguments of a unit's first call.

    A module that is none of transformers and has no repeated layers is one unit, "".
    Raises Reject (unsupported-model) if the model's own forward fails.
    """
    calls = _record_calls(model, inputs, outermost_list_elements(model))
    if not calls.order and not isinstance(model, PreTrainedModel):
        root_calls = _record_calls(model, inputs, {"": model})
        root_calls.irregular = calls.irregular
        return root_calls
    paths = {calls.signatures[path]: path for path in reversed(calls.order)}
    _add_uncached_masks(model, inputs, {path: calls.first[signature] for signature, path in paths.items()})
    return calls


def _add_uncached_masks(model: nn.Module, inputs: dict[str, Any], calls: dict[str, UnitCall]) -> None:
    """Add masks that a model hands on only where it keeps no cache: FSMT takes a call with one for a token, which needs
    no causal mask."""
    if not calls or inputs.get("use_cache") is not True or not is_encoder_decoder(model):
        return
    for path, uncached in _record_until_all_called(model, inputs | {"use_cache": False}, [*calls]).items():
        call = calls[path]
        call.masks |= {name: x for name, x in uncached.free.items() if "mask" in name and name not in call.free}


def _record_calls(model: nn.Module, inputs: dict[str, Any], layers: dict[str, nn.Module]) -> Calls:
    calls = Calls()
    counts: dict[str, int] = {}

    def hook(path: str) -> Callable[..., None]:
        def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            counts[path] = counts.get(path, 0) + 1
            arguments = _arguments_by_name(layer, args, kwargs)
            if counts[path] > 1 or not (path == "" or any(map(_is_stream, arguments.values()))):
                return
            calls.order.append(path)
            signature = (structure[path], call_signature(arguments))
            calls.signatures[path] = signature
            if signature not in calls.first:
                calls.first[signature] = split_traced_and_constant(arguments)

        return keep

    # Before our own hooks make layers differ.
    structure = {path: module_signature(layer) for path, layer in layers.items()}
    try:
        with NoDraws():
            run_with_pre_forward_hooks(model, inputs, hook, layers)
    except RandomDraw as error:
        raise random_draw_diagnostic(error, model).rejection() from error
    except Exception as error:  # whatever a model's own code raises, it can't be run
        at = f" in {path}" if (path := failing_module_path(error, model)) else ""
        raise unsupported_model(
            f"{type(model).__name__} fails when it runs{at}: {type(error).__name__}: {first_sentence(error)} "
            f"at {failing_source_line(error, model)}",
            help=remedy_for_failed_forward(error, model, inputs),
        ).rejection() from error
    for path in [path for path in calls.order if counts[path] > 1]:
        calls.order.remove(path)
        calls.irregular[path] = f"called {counts[path]} times in one forward"
    return calls


class _Enough(Exception):
    """All layers that were asked for have been called."""


def record_further_unit_calls(model: nn.Module, inputs: dict[str, Any], paths: list[str]) -> dict[str, list[UnitCall]]:
    """Calls of some units on another shape and in a decode step: a right graph is equal for all.

    Nothing for inputs that were not made by `sample`, and nothing for what the model itself can't run.
    """
    result: dict[str, list[UnitCall]] = {path: [] for path in paths}
    if not paths or not can_make_sample_inputs(model) or set(inputs) != set(sample_inputs(model)):
        return result
    for calls in (
        _record_until_all_called(model, sample_inputs(model, *_OTHER_SHAPE), paths),
        _decode_calls(model, inputs, paths),
    ):
        for path, call in calls.items():
            result[path].append(call)
    for path, call in _generation_calls(model, inputs, paths).items():
        result[path].append(call)
    unmasked = _calls_without_padding(model, paths) if "attention_mask" in inputs else {}
    for path, call in unmasked.items():
        result[path].append(replace(call, plain=True))
    return result


def _generation_calls(model: nn.Module, inputs: dict[str, Any], paths: list[str]) -> dict[str, UnitCall]:
    """Calls of units where a model generates from more than it reads: a second stream of XLNet."""
    if "input_ids" not in inputs or not isinstance(model, PreTrainedModel) or not model.can_generate():
        return {}
    if not isinstance(model, GenerationMixin):
        return {}
    if type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation:
        return {}
    try:
        prepared = model.prepare_inputs_for_generation(inputs["input_ids"])
    except Exception:  # whatever a model's own code raises: it asks for a cache, or for values
        return {}
    prepared = {name: value for name, value in prepared.items() if isinstance(value, torch.Tensor)}
    return _record_until_all_called(model, prepared, paths) if set(prepared) - set(inputs) else {}


def _calls_without_padding(model: nn.Module, paths: list[str]) -> dict[str, UnitCall]:
    """Calls of units for other rows, without padding: encoders pass them no mask then."""
    if not isinstance(model, PreTrainedModel):
        return {}
    unmasked = {
        name: value
        for name, value in sample_inputs(model, padding_per_row=0).items()
        if name not in ("attention_mask", "position_ids", "decoder_attention_mask")
    }
    return _record_until_all_called(model, unmasked, paths)


def _decode_calls(model: nn.Module, inputs: dict[str, Any], paths: list[str]) -> dict[str, UnitCall]:
    """Calls of units for the token after these inputs, with the cache or the state that they left."""
    if "input_ids" not in inputs or not isinstance(model, PreTrainedModel):
        return {}
    if "cache" in positional_argument_names(type(model)):
        caches: list[Cache] = []
        _record_until_all_called(model, inputs, paths, caches)
        left: dict[str, Any] = {"cache": caches[0]} if caches else {}
    else:
        inputs = sample_inputs(model, batch=1)  # more rows RWKV itself decodes wrongly: it broadcasts its state
        left = _outputs_that_are_inputs(model, inputs)
    if not left:
        return {}
    batch, length = inputs["input_ids"].shape
    if "decoder_input_ids" in inputs:
        longer = sample_inputs(model, batch, length + 1)
        step = {"decoder_input_ids": longer["decoder_input_ids"][:, -1:]}
        return _record_until_all_called(
            model, inputs | {"decoder_attention_mask": longer["decoder_attention_mask"]} | step | left, paths
        )
    step = sample_inputs(model, batch, length + 1)
    step |= {name: step[name][:, -1:] for name in ("input_ids", "position_ids") if name in step}
    return _record_until_all_called(model, step | left, paths)


def _outputs_that_are_inputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Outputs of a forward under a name that is also an input."""
    with torch.no_grad(), in_eval_mode(model), meta_forward_patches(model):
        out = model(**inputs)
    names = set(positional_argument_names(type(model))) - set(inputs)
    return {name: out[name] for name in names if name in out and becomes_placeholder(out[name])}


def _record_until_all_called(
    model: nn.Module, inputs: dict[str, Any], paths: list[str], recorded_caches: list[Cache] | None = None
) -> dict[str, UnitCall]:
    """The first calls of these units; the forward is left as soon as the last of them has returned.

    Nothing where the model refuses the inputs: what it can't run itself needs no graph.
    """
    calls: dict[str, UnitCall] = {}

    def hook(path: str) -> Callable[..., None]:
        def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(calls) == len(paths):
                raise _Enough
            if path in paths and path not in calls:
                arguments = _arguments_by_name(layer, args, kwargs)
                calls[path] = split_traced_and_constant(arguments)
                if recorded_caches is not None:
                    recorded_caches.extend(value for value in arguments.values() if isinstance(value, Cache))

        return keep

    try:
        run_with_pre_forward_hooks(model, inputs, hook, {"": model} if "" in paths else outermost_list_elements(model))
    except _Enough:
        pass
    except _CANT_RUN:
        return {}
    except AssertionError as error:
        if not _was_raised_outside_effc(error):
            raise
        return {}
    return calls


def _was_raised_outside_effc(error: Exception) -> bool:
    """Whether it was raised in others' code: XLM asserts what inputs are, and takes those of a cache otherwise."""
    *_, last = traceback.walk_tb(error.__traceback__)
    return str(last[0].f_globals.get("__name__", "")).partition(".")[0] != _PACKAGE


def run_with_pre_forward_hooks(
    model: nn.Module,
    inputs: dict[str, Any],
    make_hook: Callable[[str], Callable[..., None]],
    layers: dict[str, nn.Module],
) -> None:
    handles = [layer.register_forward_pre_hook(make_hook(path), with_kwargs=True) for path, layer in layers.items()]
    try:
        with torch.no_grad(), in_eval_mode(model), meta_forward_patches(model):
            model(**inputs, **_encoder_cache_argument(model, inputs))
    finally:
        for handle in handles:
            handle.remove()


def _encoder_cache_argument(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """A cache for encoders, which make none themselves, but hand on what `generate` gives them."""
    if (
        not isinstance(model, PreTrainedModel)
        or "cache" in inputs
        or "cache" not in positional_argument_names(type(model))
    ):
        return {}
    if getattr(model.config, "is_decoder", True) or is_encoder_decoder(model):
        return {}
    return {"cache": DynamicCache(config=model.config)}


def _arguments_by_name(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(positional_argument_names(type(layer)), args, strict=False)) | kwargs


def _is_stream(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1


def becomes_placeholder(value: Any) -> bool:
    """Whether an argument becomes a placeholder: tensors, caches, and tables that layers hand on to each other."""
    if isinstance(value, (tuple, list)):
        return bool(value) and all(map(becomes_placeholder, value))
    return isinstance(value, (torch.Tensor, Cache, MutableMapping))


def split_traced_and_constant(arguments: dict[str, Any]) -> UnitCall:
    """Free and baked arguments; copied, because the rest of the forward goes on writing to the cache.

    `use_cache` is free where no cache says by itself whether it is there: RWKV's state is a list.
    """
    stateful = "use_cache" in arguments and not any(isinstance(value, Cache) for value in arguments.values())
    memo: dict[int, Any] = {}
    call = UnitCall()
    for name, value in arguments.items():
        if becomes_placeholder(value) or (stateful and name == "use_cache"):
            call.free[name] = copy.deepcopy(value, memo)
        else:
            call.statics[name] = value
    return call
