"""A whole state-space mixer over many positions, some hundreds at a time.

What lies between a mixer's projections is several times as wide as its input. Over a long sequence that
leaves every cache, and the pages which the system hands out for it anew in every layer cost more time than
the scan. A piece at a time, with states handed on, it is read where it was just written; products are as
fast, and what a layer needs beside its result does not grow with the length. As with steps, whether a mixer
is of one of the two published families is not looked up: the first positions that it meets are computed both
ways.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ....kernels.causal_conv import CausalConv
from ....kernels.selective_scan import SelectiveScan
from ....kernels.ssd_scan import SsdScan
from .cached_positions import count_positions
from .decode_steps import Filtered, Selective, Ssd, allclose, normalize_dt_b_c
from .functions import PACKED

if TYPE_CHECKING:
    from .mixer import MixerCall

ROWS = 384  # of a piece: with more of them products are hardly faster, and what they leave is colder
LEAST = 32  # positions of a piece, and of the proof


class ChunkState(NamedTuple):
    """State carried from chunk to chunk."""

    window: Tensor  # [b, c, k]: what the convolution read last, zeros before the first position
    state: Tensor | None  # of the scan


Family = Callable[[Any, Tensor, Tensor | None, ChunkState], tuple[Tensor, ChunkState]]
_proven: "WeakKeyDictionary[nn.Module, Family | None]" = WeakKeyDictionary()


def scan_in_chunks_or_whole(call: "MixerCall") -> Any:
    """A mixer's forward: by pieces where it is of a family and nothing came before, else the whole."""
    mixer: Any = call.mixer  # a module of any class, until it has proven to be of a family
    if not _can_scan_in_chunks(call):
        return call.full_result()
    if mixer not in _proven:
        first = call.hidden[:, :LEAST]
        expected = call.forward(mixer, first)
        _proven[mixer] = next(
            (f for f in (selective_chunk, ssd_chunk) if _chunk_matches(f, mixer, first, expected)), None
        )
    family = _proven[mixer]
    if family is None:
        return call.full_result()
    out, last = scan_in_chunks(family, mixer, call.hidden, call.mask, _even_chunk_length(*call.hidden.shape[:2]))
    if call.cache is not None:
        call.cache.update_conv_state(last.window, mixer.layer_idx)
        call.cache.update_recurrent_state(last.state, mixer.layer_idx)
        count_positions(call.cache, mixer.layer_idx, call.hidden.shape[1] - last.window.shape[2])
    return out


def _even_chunk_length(sequences: int, length: int) -> int:
    """Positions of a piece, such that all are about equal."""
    largest = max(LEAST, ROWS // sequences)
    return -(-length // -(-length // largest))


def _can_scan_in_chunks(call: "MixerCall") -> bool:
    if call.hidden.shape[1] < LEAST or not call.hidden.numel():
        return False
    if any(call.kwargs.get(word) is not None for word in PACKED):
        return False
    if call.mask is not None and call.mask.shape != call.hidden.shape[:2]:
        return False
    if any(m._forward_hooks or m._forward_pre_hooks for m in call.mixer.modules()):
        return False  # who listens to a projection expects one call
    if call.cache is None:
        return True
    index = call.mixer.layer_idx
    return call.cache.get_conv_state(index) is None and not call.cache.is_recording_past(index)


def _chunk_matches(family: Family, mixer: Any, hidden: Tensor, expected: Tensor) -> bool:
    try:
        actual, _ = scan_in_chunks(family, mixer, hidden, None, LEAST // 2)
    except (AttributeError, RuntimeError, ValueError, TypeError):  # it is no mixer of that family
        return False
    return allclose(actual, expected)


def scan_in_chunks(
    run_chunk: Family, mixer: Filtered, hidden: Tensor, mask: Tensor | None, chunk_size: int
) -> tuple[Tensor, ChunkState]:
    """A mixer over hidden [b, t, w], `chunk_size` positions at a time, and what is carried after the last."""
    filters = mixer.conv1d.weight
    carried = ChunkState(hidden.new_zeros(len(hidden), len(filters), filters.shape[-1]), None)
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    for start in range(0, hidden.shape[1], chunk_size):
        piece = slice(start, start + chunk_size)
        live = None if mask is None else mask[:, piece, None]
        out[:, piece], carried = run_chunk(mixer, _masked(hidden[:, piece], live), live, carried)
    return out, carried


# -- the two families ----------------------------------------------------------------------------------------


def selective_chunk(
    mixer: Selective, hidden: Tensor, mask: Tensor | None, initial_state: ChunkState
) -> tuple[Tensor, ChunkState]:
    """Mamba-1: hidden [b, t, w] -> [b, t, w]; the state is [b, c, n]."""
    channels, n = mixer.A_log.shape
    x, z = mixer.in_proj(hidden).split(channels, 2)
    x, window = _convolve_chunk_and_window(mixer, x, mask, initial_state.window)
    parts = mixer.x_proj(x).split([mixer.x_proj.out_features - 2 * n, n, n], 2)
    dt, b, c = normalize_dt_b_c(mixer, parts)
    dt = linear(dt, mixer.dt_proj.weight)  # the scan adds the bias
    a = -torch.exp(mixer.A_log.float())
    y, state = SelectiveScan.native(
        x.mT, dt.mT, a, b.mT, c.mT, mixer.D, z.mT, mixer.dt_proj.bias, True, initial_state.state, None
    )
    return mixer.out_proj(y.mT), ChunkState(window, state)


def ssd_chunk(mixer: Ssd, hidden: Tensor, mask: Tensor | None, initial_state: ChunkState) -> tuple[Tensor, ChunkState]:
    """Mamba-2: hidden [b, t, w] -> [b, t, w]; the state is [b, h, p, n]."""
    heads, groups, inner = mixer.num_heads, mixer.n_groups, mixer.num_heads * mixer.head_dim
    channels = initial_state.window.shape[1]
    gate, mixed, dt = mixer.in_proj(hidden).split([inner, channels, heads], 2)
    mixed, window = _convolve_chunk_and_window(mixer, mixed, mask, initial_state.window)
    x, b, c = mixed.split([inner, (channels - inner) // 2, (channels - inner) // 2], 2)
    a = -torch.exp(mixer.A_log.float())
    least, upper = map(float, mixer.time_step_limit)
    x, b, c = (part.unflatten(2, (count, -1)) for part, count in ((x, heads), (b, groups), (c, groups)))
    bounds = least, upper
    y, state = SsdScan.native(x, dt, a, b, c, mixer.D, mixer.dt_bias, True, *bounds, initial_state.state, None)
    y = mixer.norm(y.flatten(2), gate)
    return mixer.out_proj(y.to(hidden.dtype)), ChunkState(window, state)


def _convolve_chunk_and_window(
    mixer: Filtered, x: Tensor, mask: Tensor | None, window: Tensor
) -> tuple[Tensor, Tensor]:
    """x [b, t, c] after the convolution, and what it has seen by then."""
    weight, k = mixer.conv1d.weight[:, 0], window.shape[2]
    if CausalConv.unsupported_reason(weight, mixer.activation):
        raise TypeError(f"a convolution with {mixer.activation}")
    y = CausalConv.native(x.mT, weight, mixer.conv1d.bias, window[:, :, 1:], None, mixer.activation is not None)
    return _masked(y.mT, mask), torch.cat([window, x[:, -k:].mT], 2)[:, :, -k:].contiguous()


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else (x * mask).to(x.dtype)
