"""The closed vocabulary of what stays whole in a graph.

Functions: `attention`, `rotary`, `masked`, `cache_update`, `cache_length`, `causal_conv` are ours and canonical, so
that a graph doesn't fix an attention backend or the presence of a cache or a mask; masks, scans and state updates are
the library's own functions, found by where they live and what they are called. Modules: everything of torch.nn, norms,
rotary tables, activations, experts and routers, and whatever comes from outside the model's own source.
"""

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .hub_kernels import unwrap_kernel_module

_ROOT = __name__.partition(".")[0]
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

# The tracer at work, if any: leaf functions ask it first, so that graphs which call them can be traced again.
_tracers: list[Any] = []

_FUNCTION_ROLES = (
    (re.compile(r"create_\w*masks?(_for_generate)?"), "mask"),
    (re.compile(r"apply_\w*rotary\w*"), "rotary"),
    (re.compile(r"causal_conv1d_(fn|update)"), "ssm_conv"),
    (re.compile(r"\w*(_scan|_state_update|_scan_combined|_inner_fn|delta_rule|delta_attention)"), "ssm_scan"),
    (re.compile(r"apply_mask_to_padding_states"), "padding"),
    (re.compile(r"slice_logits_to_keep"), "slice_logits"),
)
_MODULE_ROLES = (
    (re.compile(r"\w*RotaryEmbedding"), "rotary_embedding"),
    (re.compile(r"\w*Norm(Gated)?(1d|2d|3d)?"), "norm"),
    (re.compile(r"\w*Experts"), "experts"),
    (re.compile(r"\w*(Router|MoE\w*Gate)"), "router"),
    (re.compile(r"(\w*Linear|Conv1D)"), "linear"),
    (re.compile(r"\w*Embedding\w*"), "embedding"),
    (re.compile(r"Conv[123]d"), "conv"),
    (re.compile(r"\w*Dropout\w*"), "dropout"),
    (re.compile(r"Identity"), "identity"),
    (re.compile(r"Reft"), "intervention"),
)
ROTARY = "apply_rotary_pos_emb"


def push_tracer(tracer: Any) -> None:
    """Make `tracer` the one that leaf calls report to."""
    _tracers.append(tracer)


def pop_tracer(tracer: Any) -> None:
    assert _tracers and _tracers.pop() is tracer, "tracers end in the order opposite to their start"


def active_tracer() -> Any:
    """The one that calls report to now, if any."""
    return _tracers[-1] if _tracers and _tracers[-1].on else None


def is_tracing() -> bool:
    """Whether calls of leaf functions are recorded now."""
    return active_tracer() is not None


def leaf(role: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a function as one node: while tracing it records itself, else it runs."""

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if is_tracing():
                return _tracers[-1].create_proxy("call_function", call, args, kwargs)
            return function(*args, **kwargs)

        vars(call)["role"] = role
        return call

    return mark


@leaf("attention")
def attention(module: nn.Module, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
    """(output [b, t, h, d], weights or None) by whatever backend the module's config names when it runs.

    q [b, h, t, d], k and v [b, g, s, d] with g dividing h; mask [b, 1, t, s] or None. An option `dropout` is
    the probability in training; it is off while the module evaluates.
    """
    if "dropout" in options and not module.training:
        options["dropout"] = 0.0
    eager = module_function(module, "eager_attention_forward", optional=True)
    config: Any = module.config
    run = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    return run(module, q, k, v, mask, **options)


@leaf("attention")
def grouped_attention(module: nn.Module, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
    """As `attention`, but of one new token the query heads that share keys are rows of one product."""
    from .attention import single_token_attention

    output = single_token_attention(module, q, k, v, mask, options)
    return attention(module, q, k, v, mask, **options) if output is None else (output, None)


@leaf("attention")
def packed_attention(
    module: nn.Module,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    cache: Any,
    layer_idx: int,
    *,
    keep_keys: float,
    keep_values: float,
    window: int,
    sinks: int,
    **options: Any,
) -> Any:
    """`attention` with a `cache_update` before it, over a packed cache; what is older than `window` keeps its largest
    numbers only.

    A prompt attends to itself whole. Without a cache nothing is forgotten.
    """
    from .attention import append_and_attend_per_token, get_or_create_packed_layer, left_padding_counts

    layer = (
        None if cache is None else get_or_create_packed_layer(cache, layer_idx, (keep_keys, keep_values), window, sinks)
    )
    if layer is not None and layer.length:
        return append_and_attend_per_token(layer, q, k, v, mask, options.get("scaling")), None
    if layer is not None:
        layer.append_prompt(k, v, left_padding_counts(mask, k.shape[0], k.shape[2]))
    return attention(module, q, k, v, mask, **options)


@leaf("rotary")
def rotary(module: nn.Module, *args: Any, **options: Any) -> Any:
    """(q, k) turned by their positions: q, k, cos, sin go to the function that the module's source uses."""
    return module_function(module, ROTARY)(*args, **options)


@leaf("mask_added")
def masked(x: Any, mask: Any) -> Any:
    """x with a mask of zeros and minus infinities added, where there is one."""
    return x if mask is None else x + mask


@leaf("cache_update")
def cache_update(cache: Any, k: Any, v: Any, layer_idx: int) -> Any:
    """(k, v) with the cached ones before them; as they are where there is no cache."""
    if cache is None:
        return k, v
    self_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return self_cache.update(k, v, layer_idx)


@leaf("cache_update")
def cross_update(cache: Any, k: Any, v: Any, layer_idx: int) -> Any:
    """(k, v) of what an encoder gave: those that were kept first, of a cache that keeps some.

    Every token makes them anew, and what was kept is taken, so that one graph holds for the first token and all after.
    """
    if cache is None:
        return k, v
    cross_cache = cache.cross_attention_cache
    if cache.is_updated.get(layer_idx):
        return cross_cache.layers[layer_idx].keys, cross_cache.layers[layer_idx].values
    cache.is_updated[layer_idx] = True
    return cross_cache.update(k, v, layer_idx)


@leaf("cache_length")
def cache_length(cache: Any, layer_idx: int = 0) -> int:
    """Number of positions in one slot of the cache."""
    return 0 if cache is None else cache.get_seq_length(layer_idx)


@leaf("ssm_conv")
def causal_conv(cache: Any, x: Any, weight: Any, bias: Any, activation: str | None, layer_idx: int) -> Any:
    """x [b, c, t], each place summed with the k - 1 before it by a filter per channel, weight [c, k], then activated.

    The cache, where there is one, has what came before x and keeps its last k places.
    """
    length, kernel = x.shape[-1], weight.shape[-1]
    inputs = x if cache is None else cache.update_conv_state(x, layer_idx, conv_kernel_size=kernel)
    inputs = F.pad(inputs.to(weight.dtype), (max(0, length + kernel - 1 - inputs.shape[-1]), 0))
    out = F.conv1d(inputs, weight.unsqueeze(1), bias, groups=weight.shape[0])[..., -length:]
    return (out if activation is None else ACT2FN[activation](out)).to(x.dtype)


LEAF_FUNCTIONS = {
    f.__name__: f
    for f in (
        attention,
        grouped_attention,
        packed_attention,
        rotary,
        masked,
        cache_update,
        cross_update,
        cache_length,
        causal_conv,
    )
}


def module_function(module: nn.Module, name: str, *, optional: bool = False) -> Any:
    """The function `name` of the source file in which the module's class, or a base of it, is written."""
    for base in type(module).__mro__:
        function = unwrap_kernel_module(getattr(sys.modules.get(base.__module__), name, None))
        if function is not None:
            return getattr(function, "__effc_original__", function)
    assert optional, f"{type(module).__name__} comes from a file without {name}"
    return None


def function_role(name: str) -> str | None:
    """The role of a library function that stays whole, or None."""
    return next((role for pattern, role in _FUNCTION_ROLES if pattern.fullmatch(name)), None)


def module_role(module: nn.Module) -> str:
    """Role of a leaf module: the role of its class name, or "module"."""
    if type(module).__module__.startswith("transformers.activations") or _is_activation(module):
        return "activation"
    for base in type(module).__mro__:
        for pattern, role in _MODULE_ROLES:
            if pattern.fullmatch(base.__name__) and not (role == "norm" and _contains_layers(module)):
                return role
    return "module"


def _contains_layers(module: nn.Module) -> bool:
    """Whether what is called a norm is more than one: a layer with its norms, or a norm with a gate of its own."""
    return any(isinstance(part, nn.Linear) for part in module.modules())


def is_state_space(module: nn.Module) -> bool:
    """Whether an opaque module is a mixer of the state-space kind: those convolve along the sequence."""
    return any(isinstance(part, nn.Conv1d) for part in module.modules())


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation" and not list(module.parameters())


def is_container(module: nn.Module) -> bool:
    return type(module) in (nn.Module, *_CONTAINERS)


def is_leaf(module: nn.Module, model_module: str) -> bool:
    """Whether a call of the module is one node. `model_module` is the package of the model's own source."""
    if is_container(module):
        return False
    if any(
        base.__module__.startswith("torch.nn.") and base not in (nn.Module, *_CONTAINERS)
        for base in type(module).__mro__
    ):
        return True
    if module_role(module) in ("norm", "rotary_embedding", "experts", "router"):
        return True
    return not is_model_source(type(module).__module__, model_module)


def is_model_source(module_name: str, model_module: str) -> bool:
    """Whether a Python module holds model source, to be traced through."""
    if module_name.startswith(("transformers.models.", "transformers_modules.")):
        return True
    return not module_name.startswith(("torch.", "transformers.", f"{_ROOT}.")) and (
        module_name.partition(".")[0] == model_module.partition(".")[0]
    )


def is_library_leaf(function: Any) -> bool:
    """Whether a function found in a model's source file is one that stays whole."""
    return (
        callable(function)
        and not isinstance(function, type)
        and (function_role(getattr(function, "__name__", "")) is not None)
    )
