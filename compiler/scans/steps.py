"""One position of a whole state-space mixer while decoding, in a few calls of kernels.

With one token the projections are all that takes time, and torch reads their weights at less than half of the
memory's speed; what is between them is some dozens of small operations. A step does the same in six calls. It
is written for the two published families, and whether a mixer is of one is not looked up by name: at its first
token a mixer is run both ways on the same state, and takes the step from then on only where the results agree.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...kernels.causal_conv import CausalConv
from ...kernels.causal_conv_step import CausalConvStep
from ...kernels.row_product import MOST_ROWS, RowProduct
from ...kernels.selective_step import SelectiveStep
from ...kernels.sequences import FLOATS
from ...kernels.ssd_step import SsdStep

_NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")
Step = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
_proven: "WeakKeyDictionary[nn.Module, Step | None]" = WeakKeyDictionary()


class Call(NamedTuple):
    """What a mixer's forward is given."""

    hidden: Any
    cache: Any
    mask: Any


def of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    names = ("hidden_states", "cache", "attention_mask")
    return Call(*(args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)))


def run(mixer: nn.Module, whole: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A mixer's forward: a step where there is one for this call, else `whole`."""
    call = of_call(args, kwargs)
    states, hidden = _states(mixer, call), call.hidden
    if states is None:
        return whole(*args, **kwargs)
    if mixer in _proven:
        step = _proven[mixer]
        return whole(*args, **kwargs) if step is None else step(mixer, hidden, *states)
    copies = [state.clone() for state in states]
    wanted = whole(*args, **kwargs)
    known = (selective, ssd)
    _proven[mixer] = next((s for s in known if _agrees(s, mixer, hidden, copies, wanted, states)), None)
    return wanted


def _states(mixer: nn.Module, call: Call) -> tuple[Tensor, Tensor] | None:
    """The states that a step moves on; None where a call is no plain step."""
    hidden, cache, mask = call
    if cache is None or mask is not None or hidden is None or hidden.shape[1] != 1 or torch.is_grad_enabled():
        return None
    if type(hidden) is not Tensor or hidden.device.type != "cpu" or hidden.dtype not in FLOATS:
        return None
    index = vars(mixer).get("layer_idx")
    if index is None or cache.is_recording_past(index):
        return None
    states = cache.get_conv_state(index), cache.get_recurrent_state(index)
    return None if states[0] is None or states[1] is None else states


def _agrees(step: Step, mixer: nn.Module, hidden: Tensor, before: list[Tensor], wanted: Tensor,
            after: tuple[Tensor, ...]) -> bool:
    """Whether a step gives what the mixer gave, and leaves the states as it did."""
    own = [state.clone() for state in before]
    try:
        found = step(mixer, hidden, *own)
    except (AttributeError, RuntimeError, ValueError, TypeError):     # it is no mixer of that family
        return False
    return all(near(a, b) for a, b in zip((found, *own), (wanted, *after), strict=True))


def near(found: Tensor, wanted: Tensor) -> bool:
    """Within float32 sums in another order; in bfloat16 the library rounds between operations, a kernel not."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    most = 1e-5 if found.dtype is torch.float32 else 2 ** -5
    return bool((found.float() - wanted.float()).abs().max() <= most * wanted.float().abs().max() + 1e-7)


# -- the two families ----------------------------------------------------------------------------------------

def selective(mixer: nn.Module, hidden: Tensor, seen: Tensor, state: Tensor) -> Tensor:
    """Mamba-1: hidden [b, 1, w], seen [b, c, k], state [b, c, n] -> [b, 1, w]."""
    channels, n = state.shape[1:]
    both = _product(mixer.in_proj, hidden[:, 0])                                  # [b, 2 c]
    x = _convolved(mixer, both[:, :channels], seen)
    parts = _product(mixer.x_proj, x).split([mixer.x_proj.out_features - 2 * n, n, n], 1)
    dt, b, c = normed(mixer, parts)
    dt = RowProduct.native(dt, mixer.dt_proj.weight, None)
    y = SelectiveStep.native(state, x, dt, mixer.A_log, b, c, mixer.D, both[:, channels:], mixer.dt_proj.bias,
                             True, True)
    return _product(mixer.out_proj, y)[:, None]


def ssd(mixer: nn.Module, hidden: Tensor, seen: Tensor, state: Tensor) -> Tensor:
    """Mamba-2: hidden [b, 1, w], seen [b, c, k], state [b, h, p, n] -> [b, 1, w]."""
    (batch, heads, p, n), channels = state.shape, seen.shape[1]
    inner = heads * p
    gate, mixed, dt = _product(mixer.in_proj, hidden[:, 0]).split([inner, channels, heads], 1)
    mixed = _convolved(mixer, mixed, seen)
    x, b, c = mixed.split([inner, (channels - inner) // 2, (channels - inner) // 2], 1)
    b, c = b.view(batch, -1, n), c.view(batch, -1, n)
    x = x.view(batch, heads, p)
    y = SsdStep.native(state, x, dt, mixer.A_log, b, c, mixer.D, mixer.dt_bias, True, True)
    y = mixer.norm(y.view(batch, 1, inner), gate[:, None])
    return _product(mixer.out_proj, y[:, 0].to(hidden.dtype))[:, None]


def normed(mixer: nn.Module, parts: Iterable[Tensor]) -> list[Tensor]:
    """The time step, B and C of Mamba-1, after the norms that some models have for them."""
    norms = (mixer._modules.get(name) for name in _NORMS)
    return [part if norm is None else norm(part) for part, norm in zip(parts, norms, strict=True)]


def _convolved(mixer: nn.Module, x: Tensor, seen: Tensor) -> Tensor:
    weight = mixer.conv1d.weight[:, 0]
    if CausalConv.accepts(weight, mixer.activation):
        raise TypeError(f"a convolution with {mixer.activation}")
    return CausalConvStep.native(x, seen, weight, mixer.conv1d.bias, mixer.activation is not None)


def _product(linear: nn.Module, x: Tensor) -> Tensor:
    """A projection of a few rows; what was put in its place, or is listened to, is called."""
    plain = type(linear) is nn.Linear and not (linear._forward_hooks or linear._forward_pre_hooks)
    if plain and "forward" not in vars(linear) and len(x) <= MOST_ROWS and linear.weight.dtype is x.dtype:
        return RowProduct.native(x, linear.weight, linear.bias)
    return linear(x)


