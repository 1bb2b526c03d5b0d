"""One position of a whole state-space mixer while decoding, in a few calls of kernels.

With one token the projections are all that takes time, and torch reads their weights at less than half of the
memory's speed; what is between them is some dozens of small operations. A step does the same in six calls. It
is written for the two published families, and whether a mixer is of one is not looked up by name: at its first
token a mixer is run both ways on the same state, and takes the step from then on only where the results agree.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ....kernels.causal_conv import CausalConv
from ....kernels.causal_conv_step import CausalConvStep
from ....kernels.row_product import MAX_ROWS, RowProduct
from ....kernels.selective_step import SelectiveStep
from ....kernels.sequences import FLOATS
from ....kernels.ssd_step import SsdStep
from .cached_positions import count_positions

if TYPE_CHECKING:
    from .mixer import MixerCall


class Filtered(Protocol):
    """Parts that both families share: projections around a convolution."""

    in_proj: nn.Module
    out_proj: nn.Module
    conv1d: nn.Conv1d
    activation: str | None
    A_log: Tensor
    D: Tensor


class Selective(Filtered, Protocol):
    """A mixer of Mamba-1."""

    x_proj: nn.Linear
    dt_proj: nn.Linear
    _modules: dict[str, nn.Module | None]


class Ssd(Filtered, Protocol):
    """A mixer of Mamba-2."""

    num_heads: int
    n_groups: int
    head_dim: int
    norm: nn.Module
    dt_bias: Tensor
    time_step_limit: Iterable[float]


_NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")
# Of a mixer that may be of the family: what it lacks is found out where it is tried.
Step = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
_proven: "WeakKeyDictionary[nn.Module, Step | None]" = WeakKeyDictionary()


def step_or_full_forward(call: "MixerCall") -> Any:
    """A mixer's forward for one position: a step where there is one for this call, else the whole."""
    states = _cached_mixer_states(call)
    if states is None:
        return call.full_result()
    if call.mixer not in _proven:
        return _full_forward_and_prove_step(call, states)
    step = _proven[call.mixer]
    if step is None:
        return call.full_result()
    count_positions(call.cache, vars(call.mixer)["layer_idx"], 1)
    return step(call.mixer, call.hidden, *states)


def _full_forward_and_prove_step(call: "MixerCall", states: tuple[Tensor, Tensor]) -> Any:
    """The whole, and from then on the step that gives the same."""
    copies = [state.clone() for state in states]
    expected = call.full_result()
    _proven[call.mixer] = next(
        (
            step
            for step in (selective_step, ssd_step)
            if _step_matches(step, call.mixer, call.hidden, copies, expected, states)
        ),
        None,
    )
    return expected


def _cached_mixer_states(call: "MixerCall") -> tuple[Tensor, Tensor] | None:
    """The states that a step moves on; None where a call is no plain step."""
    index = vars(call.mixer).get("layer_idx")
    if call.cache is None or call.mask is not None or index is None or call.cache.is_recording_past(index):
        return None
    states = call.cache.get_conv_state(index), call.cache.get_recurrent_state(index)
    return None if states[0] is None or states[1] is None else states


def _step_matches(
    step: Step,
    mixer: nn.Module,
    hidden: Tensor,
    states_before: list[Tensor],
    expected: Tensor,
    states_after: tuple[Tensor, ...],
) -> bool:
    """Whether a step gives what the mixer gave, and leaves the states as it did."""
    copies = [state.clone() for state in states_before]
    try:
        actual = step(mixer, hidden, *copies)
    except (AttributeError, RuntimeError, ValueError, TypeError):  # it is no mixer of that family
        return False
    return all(allclose(a, b) for a, b in zip((actual, *copies), (expected, *states_after), strict=True))


def allclose(actual: Tensor, expected: Tensor) -> bool:
    """Within float32 sums in another order; in bfloat16 the library rounds between operations, a kernel not."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    tolerance = 1e-5 if actual.dtype is torch.float32 else 2**-5
    return bool((actual.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max() + 1e-7)


# -- the two families ----------------------------------------------------------------------------------------


def selective_step(mixer: Selective, hidden: Tensor, window: Tensor, state: Tensor) -> Tensor:
    """Mamba-1: hidden [b, 1, w], seen [b, c, k], state [b, c, n] -> [b, 1, w]."""
    channels, n = state.shape[1:]
    both = _call_projection(mixer.in_proj, hidden[:, 0])  # [b, 2 c]
    x = _convolution_step(mixer, both[:, :channels], window)
    parts = _call_projection(mixer.x_proj, x).split_with_sizes([mixer.x_proj.out_features - 2 * n, n, n], 1)
    dt, b, c = normalize_dt_b_c(mixer, parts)
    dt = RowProduct.native(dt, mixer.dt_proj.weight, None)
    y = SelectiveStep.native(
        state, x, dt, mixer.A_log, b, c, mixer.D, both[:, channels:], mixer.dt_proj.bias, True, True
    )
    return _call_projection(mixer.out_proj, y)[:, None]


def ssd_step(mixer: Ssd, hidden: Tensor, window: Tensor, state: Tensor) -> Tensor:
    """Mamba-2: hidden [b, 1, w], seen [b, c, k], state [b, h, p, n] -> [b, 1, w]."""
    (batch, heads, p, n), channels = state.shape, window.shape[1]
    inner = heads * p
    gate, mixed, dt = _call_projection(mixer.in_proj, hidden[:, 0]).split_with_sizes([inner, channels, heads], 1)
    mixed = _convolution_step(mixer, mixed, window)
    x, b, c = mixed.split_with_sizes([inner, (channels - inner) // 2, (channels - inner) // 2], 1)
    b, c = b.view(batch, -1, n), c.view(batch, -1, n)
    x = x.view(batch, heads, p)
    y = SsdStep.native(state, x, dt, mixer.A_log, b, c, mixer.D, mixer.dt_bias, True, True)
    y = mixer.norm(y.view(batch, 1, inner), gate[:, None])
    return _call_projection(mixer.out_proj, y[:, 0].to(hidden.dtype))[:, None]


def normalize_dt_b_c(mixer: Selective, dt_b_c: Iterable[Tensor]) -> list[Tensor]:
    """The time step, B and C of Mamba-1, after the norms that some models have for them."""
    norms = (mixer._modules.get(name) for name in _NORMS)
    return [part if norm is None else norm(part) for part, norm in zip(dt_b_c, norms, strict=True)]


def _convolution_step(mixer: Filtered, x: Tensor, window: Tensor) -> Tensor:
    weight = mixer.conv1d.weight[:, 0]
    if CausalConv.unsupported_reason(weight, mixer.activation):
        raise TypeError(f"a convolution with {mixer.activation}")
    return CausalConvStep.native(x, window, weight, mixer.conv1d.bias, mixer.activation is not None)


def projection_forward(linear: nn.Linear, x: Tensor) -> Tensor:
    """A projection's forward: x [..., k] by the kernel where it has few rows, else by the class."""
    weight = linear.weight
    is_few = type(x) is Tensor and x.dim() > 1 and 0 < x.numel() <= MAX_ROWS * x.shape[-1]
    if not is_few or not x.is_cpu or not weight.is_cpu or torch.is_grad_enabled():
        return type(linear).forward(linear, x)
    if x.dtype is not weight.dtype or x.dtype not in FLOATS:
        return type(linear).forward(linear, x)
    return RowProduct.native(x.reshape(-1, x.shape[-1]), weight, linear.bias).view(*x.shape[:-1], -1)


def _call_projection(linear: nn.Module, x: Tensor) -> Tensor:
    """A projection of a few rows; what was put in its place, or is listened to, is called."""
    plain = type(linear) is nn.Linear and not (linear._forward_hooks or linear._forward_pre_hooks)
    if plain and "forward" not in vars(linear) and x.shape[0] <= MAX_ROWS and linear.weight.dtype is x.dtype:
        return RowProduct.native(x, linear.weight, linear.bias)
    return linear(x)
