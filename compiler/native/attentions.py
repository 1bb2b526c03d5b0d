"""Attention, recognised by what it computes: scale, softcap, window and sinks are found by trying."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import leaves

_ATOL = 2e-5  # of float32 outputs of size one
SHORT = 9  # keys, where no window is near


@dataclass(frozen=True)
class Attention:
    """softmax(softcap(q @ k.T * scale) over the last `window` keys and the sinks) @ v."""

    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None  # that a score gains for each token of distance less

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [h, d] of the last position, k and v [g, n, d] -> [h, d]."""
        group = q.shape[0] // k.shape[0]
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
        scores = torch.einsum("hd,hnd->hn", q, k) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.slopes is not None:
            scores = scores + self.slopes[:, None] * torch.arange(1 - scores.shape[1], 1)
        if self.window is not None:
            scores[:, : max(0, scores.shape[1] - self.window)] = -torch.inf
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks[:, None]], 1)
        return torch.einsum("hn,hnd->hd", scores.softmax(-1)[:, : v.shape[1]], v)


@torch.no_grad()
def recognise(
    module: nn.Module, mask: Any, sizes: tuple[int, int, int, int], options: dict[str, Any]
) -> Attention | None:
    """What `attention` of the module computes, or None.

    mask      n -> the mask of n keys as the module is handed it: [1, 1, n, n] or None
    sizes     heads, key heads, width of a key, width of a value
    """
    heads, _, head_dim, _ = sizes
    module = _float(module)
    named = windows(module, options)
    known = [*filter(None, (_trial(module, mask, sizes, options, n) for n in lengths(named)))]
    for form in _forms(module, head_dim, heads, options, named):
        pairs = [(form(q, k, v), found) for q, k, v, found in known]
        if known and all(torch.allclose(ours, found, atol=_ATOL, rtol=_ATOL) for ours, found in pairs):
            return form
    return None


def _trial(
    module: nn.Module, mask: Any, sizes: tuple[int, int, int, int], options: dict[str, Any], length: int
) -> tuple[Tensor, ...]:
    """q of the last position, k, v and what the module makes of them."""
    heads, kv_heads, head_dim, value_dim = sizes
    generator = torch.Generator().manual_seed(length)
    q = torch.randn((heads, head_dim), generator=generator)
    k = torch.randn((kv_heads, length, head_dim), generator=generator)
    v = torch.randn((kv_heads, length, value_dim), generator=generator)
    seen = mask(length)
    last = None if seen is None else seen[:, :, -1:, -length:].to(seen.dtype)
    if last is not None and last.dtype.is_floating_point:
        last = last.float()
    out, _ = leaves.attention(module, q[None, :, None], k[None], v[None], last, **options)
    return q, k, v, out[0, 0].float()


def _float(module: nn.Module) -> nn.Module:
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


def windows(module: nn.Module, options: dict[str, Any]) -> list[int]:
    """Widths of a window that the call, the module or its config names."""
    config = getattr(module, "config", None)
    named = (
        options.get("sliding_window"),
        getattr(module, "sliding_window", None),
        getattr(config, "sliding_window", None),
        getattr(config, "window_size", None),
    )
    return list(dict.fromkeys(w for w in named if type(w) is int and w > 0))


def lengths(windows: list[int]) -> list[int]:
    return [SHORT, *(w + 3 for w in windows)]


def _forms(
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
