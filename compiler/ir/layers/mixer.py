"""A mixer's forward where kernels are: a step, piece by piece, or its class's own over kernels."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....kernels.sequences import FLOATS
from .decode_steps import step_or_full_forward
from .scan_chunks import scan_in_chunks_or_whole


class MixerCall(NamedTuple):
    """Arguments of a mixer's forward; hidden is [b, t, w]."""

    forward: Callable[..., Any]  # the class's, over kernels
    mixer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: Tensor
    cache: Any
    mask: Any

    def full_result(self) -> Any:
        return self.forward(self.mixer, *self.args, **self.kwargs)


@functools.cache
def _takes_cache_and_mask(mixer_class: type[nn.Module]) -> bool:
    """Whether a class's forward takes what steps and chunks are run with: Inkling's convolutions take other things."""
    names = tuple(inspect.signature(inspect.unwrap(mixer_class.forward)).parameters)
    return names[1:4] == ("hidden_states", "cache", "attention_mask")


def run_mixer(forward: Callable[..., Any], mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hidden: Any = args[0] if args else kwargs.get("hidden_states")
    kind: type = type(mixer)
    is_quick = type(hidden) is Tensor and hidden.is_cpu and hidden.dtype in FLOATS and not torch.is_grad_enabled()
    if not is_quick or not _takes_cache_and_mask(kind):
        return forward(mixer, *args, **kwargs)
    cache = args[1] if len(args) > 1 else kwargs.get("cache")
    mask = args[2] if len(args) > 2 else kwargs.get("attention_mask")
    call = MixerCall(forward, mixer, args, kwargs, hidden, cache, mask)
    return step_or_full_forward(call) if hidden.shape[1] == 1 else scan_in_chunks_or_whole(call)
