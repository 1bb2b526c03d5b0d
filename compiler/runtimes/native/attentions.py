"""Attention, recognised by what it computes: scale, softcap, window and sinks are found by trying."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...ir.layers import leaves

_ATOL = 2e-5  # of float32 outputs of size one
SHORT = 9  # keys, where no window is near


@dataclass(frozen=True)
class Attention:
    """softmax(softcap(q @ k.T * scale) over the last `window` keys and the sinks) @ v.

    bidirectional  a position sees those that follow too, as far as a window lets it
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None  # that a score gains for each token of distance less
    distances: Tensor | None = None  # [heads, columns] that it gains at each, as `distances.table` has them
    bidirectional: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, position: int | None = None) -> Tensor:
        """q [h, d] of position `position`, by default the last, k and v [g, n, d] -> [h, d]."""
        group = q.shape[0] // k.shape[0]
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
        scores = torch.einsum("hd,hnd->hn", q, k) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        length = scores.shape[1]
        back = (length - 1 if position is None else position) - torch.arange(length)
        if self.slopes is not None:
            scores = scores - self.slopes[:, None] * back
        if self.distances is not None:
            columns = self.distances.shape[1]
            first = columns // 2 if self.bidirectional else columns - 1
            scores = scores + self.distances[:, (first - back).clamp(0, columns - 1)]
        visible = (back.abs() if self.bidirectional else back.where(back >= 0, length)) < (self.window or length)
        scores[:, ~visible] = -torch.inf
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks[:, None]], 1)
        return torch.einsum("hn,hnd->hd", scores.softmax(-1)[:, : v.shape[1]], v)


class HeadSizes(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


@dataclass(frozen=True)
class ScoreBias:
    """Bias that an option of an attention adds to its scores: `at` a row's length, and as a `table` by distance."""

    option: str
    at: Callable[[int], Tensor]
    table: Tensor


@torch.no_grad()
def recognise_attention(
    module: nn.Module,
    mask_of_length: Any,
    head_sizes: HeadSizes,
    options: dict[str, Any],
    score_bias_of: Callable[..., ScoreBias | None] = lambda bidirectional: None,
) -> Attention | None:
    """Attention that the module's `attention` computes, or None.

    mask_of_length   n -> the mask of n keys as the module is handed it: [1, 1, n, n] or None
    score_bias_of    whether a text is seen whole -> what scores gain by distance, if anything
    """
    heads, _, head_dim, _ = head_sizes
    module = _shallow_copy_in_float32(module)
    named = candidate_windows(module, options)
    bidirectional = is_bidirectional(module, mask_of_length, head_sizes, options)
    gain = score_bias_of(bidirectional=bidirectional)
    if gain is not None:
        options = {**options, gain.option: gain}
    if bidirectional:
        named = list(dict.fromkeys(n for w in named for n in (w, w + 1, w // 2 + 1)))
        known = [
            row
            for n in trial_lengths(named)
            for row in _record_bidirectional_trial(module, mask_of_length, head_sizes, options, n)
        ]
        forms = [
            replace(form, bidirectional=True) for form in _candidate_attentions(module, head_dim, heads, options, named)
        ]
    else:
        known = [
            (*_record_causal_trial(module, mask_of_length, head_sizes, options, n), None) for n in trial_lengths(named)
        ]
        forms = [*_candidate_attentions(module, head_dim, heads, options, named)]
    for form in forms:
        form = form if gain is None or not gain.table.any() else replace(form, distances=gain.table)
        pairs = [(form(q, k, v, at), expected) for q, k, v, expected, at in known]
        if known and all(torch.allclose(actual, expected, atol=_ATOL, rtol=_ATOL) for actual, expected in pairs):
            return form
    return None


def is_bidirectional(module: nn.Module, mask_of_length: Any, head_sizes: HeadSizes, options: dict[str, Any]) -> bool:
    """Whether the first position of a text sees the second: what it gives changes with that one's value."""
    mask_value = mask_of_length(2)
    if mask_value is None and getattr(module, "is_causal", True):
        return False
    q, k, v = _seeded_random_qkv(head_sizes, 2, 2)
    first, _ = leaves.attention(module, q, k, v, _float_mask_to_float32(mask_value), **options)
    v[:, :, 1] += 1
    other, _ = leaves.attention(module, q, k, v, _float_mask_to_float32(mask_value), **options)
    return not torch.equal(first[0, 0], other[0, 0])


def _record_bidirectional_trial(
    module: nn.Module, mask_of_length: Any, head_sizes: HeadSizes, options: dict[str, Any], length: int
) -> list[tuple[Any, ...]]:
    """Trial of bidirectional attention, at the first position, one in the middle and the last."""
    q, k, v = _seeded_random_qkv(head_sizes, length, length)
    out, _ = leaves.attention(
        module,
        q,
        k,
        v,
        _float_mask_to_float32(mask_of_length(length)),
        **_options_for_last_queries(options, length, length),
    )
    return [(q[0, :, at], k[0], v[0], out[0, at].float(), at) for at in (0, length // 2, length - 1)]


def _seeded_random_qkv(head_sizes: HeadSizes, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, h, queries, d], k and v [1, g, keys, d]; the same for the same `num_keys`."""
    heads, kv_heads, head_dim, value_dim = head_sizes
    generator = torch.Generator().manual_seed(num_keys)
    shapes = ((1, heads, num_queries, head_dim), (1, kv_heads, num_keys, head_dim), (1, kv_heads, num_keys, value_dim))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def _float_mask_to_float32(mask: Tensor | None) -> Tensor | None:
    return mask.float() if mask is not None and mask.dtype.is_floating_point else mask


def _record_causal_trial(
    module: nn.Module, mask_of_length: Any, head_sizes: HeadSizes, options: dict[str, Any], length: int
) -> tuple[Tensor, ...]:
    """q of the last position, k, v and what the module makes of them."""
    q, k, v = _seeded_random_qkv(head_sizes, 1, length)
    mask_value = mask_of_length(length)
    last = None if mask_value is None else mask_value[:, :, -1:, -length:]
    out, _ = leaves.attention(
        module, q, k, v, _float_mask_to_float32(last), **_options_for_last_queries(options, length, 1)
    )
    return q[0, :, 0], k[0], v[0], out[0, 0].float()


def _options_for_last_queries(options: dict[str, Any], length: int, num_queries: int) -> dict[str, Any]:
    """Options for the last queries of a row: those that are made of its length are computed."""
    return {
        name: x.at(length)[:, :, -num_queries:].float() if isinstance(x, ScoreBias) else x
        for name, x in options.items()
    }


def _shallow_copy_in_float32(module: nn.Module) -> nn.Module:
    """The module with its own numbers as float32, without copying its layers."""
    import copy

    light = copy.copy(module)
    light._parameters = {
        n: None if p is None else nn.Parameter(p.float(), requires_grad=False) for n, p in module._parameters.items()
    }
    light._buffers = {
        n: b.float() if b is not None and b.is_floating_point() else b for n, b in module._buffers.items()
    }
    return light


def candidate_windows(module: nn.Module, options: dict[str, Any]) -> list[int]:
    """Widths of a window that the call, the module or its config names."""
    config = getattr(module, "config", None)
    named = (
        options.get("sliding_window"),
        getattr(module, "sliding_window", None),
        getattr(config, "sliding_window", None),
        getattr(config, "window_size", None),
    )
    return list(dict.fromkeys(w for w in named if type(w) is int and w > 0))


def trial_lengths(windows: list[int]) -> list[int]:
    return [SHORT, *(w + 3 for w in windows)]


def _candidate_attentions(
    module: nn.Module, head_dim: int, heads: int, options: dict[str, Any], windows: list[int]
) -> Iterator[Attention]:
    named = (options.get("scaling"), getattr(module, "scaling", None), head_dim**-0.5)
    scales = dict.fromkeys(float(s) for s in named if isinstance(s, (int, float)))
    caps = [options.get("softcap"), getattr(module, "attn_logit_softcapping", None)]
    softcaps = dict.fromkeys([None, *(float(c) for c in caps if isinstance(c, (int, float)))])
    tensors = [options.get("s_aux"), getattr(module, "sinks", None)]
    sinks = [None, *(s.detach().float() for s in tensors if isinstance(s, Tensor) and s.shape == (heads,))]
    for scale, softcap, window, sink in product(scales, softcaps, [None, *windows], sinks):
        yield replace(Attention(scale), softcap=softcap, window=window, sinks=sink)
