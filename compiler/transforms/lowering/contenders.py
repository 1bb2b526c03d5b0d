"""Contenders for a linear module or an attention: our kernels, and the strongest that torch offers."""

import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from ....kernels import levels, native, packed
from ....kernels.cache import Cache
from ....kernels.ops import LINEARS
from .racing import Contender, cold_copies

EAGER, PREPACKED, DYNAMIC = "torch", "torch pre-packed", "torch int8 dynamic"
GROUPED = "torch grouped rows"


def kernel_contender(kernel: str, w: Tensor, x: Tensor) -> Contender:
    """Pack a weight [n, k] for one of our kernels, as a contender of the race."""
    first = LINEARS[kernel].pack(w)

    def repack() -> Tensor:
        copied = packed.allocate_zero_bytes(first.numel())
        copied.copy_(first)
        packed.check_packed_weight(kernel, copied, len(w))
        return copied

    packed_copies = cold_copies(repack, first.numel())
    call, n = LINEARS[kernel].call_op_or_kernel, len(w)
    return Contender(kernel, [partial(call, x, p, None, n) for p in packed_copies], first.numel())


def eager_linear_contender(w: Tensor, x: Tensor) -> Contender:
    """Plain `nn.Linear`."""
    operands = cold_copies(w.clone, w.nbytes)
    return Contender(EAGER, [partial(linear, x, p) for p in operands], w.nbytes)


def prepacked_linear_contender(w: Tensor, x: Tensor) -> Contender:
    """Prepacked weights as by inductor's freezing: oneDNN's layout, created once for these rows."""
    w, x = w.bfloat16(), x.bfloat16()
    operands = cold_copies(lambda: torch.ops.mkldnn._reorder_linear_weight(w.clone(), len(x)), w.nbytes)
    op = torch.ops.mkldnn._linear_pointwise
    return Contender(PREPACKED, [partial(op, x, p, None, "none", [], "") for p in operands], w.nbytes)


def dynamic_int8_linear_contender(w: Tensor, x: Tensor) -> Contender:
    """torch's dynamic quantisation: one scale for the weight, x rounded on every call."""
    engines = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = "x86" if "x86" in engines else "qnnpack"
    scale = max(float(w.abs().max()), 1e-8) / 127
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is to go: until then it is the opponent
        quantised = torch.quantize_per_tensor(w.float(), scale, 0, torch.qint8)
    operands = cold_copies(lambda: torch.ops.quantized.linear_prepack(quantised, None), w.numel())
    wide, op = x.float(), torch.ops.quantized.linear_dynamic
    return Contender(DYNAMIC, [partial(op, wide, p, reduce_range=False) for p in operands], w.numel())


def available_torch_contenders(
    w: Tensor, x: Tensor, optional_names: Sequence[str] = (PREPACKED, DYNAMIC)
) -> list[Contender]:
    """The plain one, and of `optional_names` those that this build of torch has on this processor."""
    contenders = [eager_linear_contender(w, x)]
    for name in optional_names:
        try:
            contender = {PREPACKED: prepacked_linear_contender, DYNAMIC: dynamic_int8_linear_contender}[name](w, x)
            contender.calls[0]()
            contenders.append(contender)
        except (RuntimeError, NotImplementedError, AttributeError):  # without oneDNN, FBGEMM or AVX-512 for bfloat16
            continue
    return contenders


def memory_read_contender(bytes_read: int, threads: int) -> Contender:
    """Reading as many bytes and doing nothing with them."""
    operands = cold_copies(lambda: packed.allocate_zero_bytes(bytes_read).fill_(1), bytes_read)
    call, level = native.library_function("read"), levels.active_level_code()

    def read(memory: Tensor) -> object:  # and keeps it: a pointer alone would not
        return call(level, memory.data_ptr(), bytes_read, threads)

    return Contender("read", [partial(read, p) for p in operands], bytes_read)


def grouped_rows_contender(q: Tensor, k: Tensor, v: Tensor) -> Contender:
    """Attention of one token in plain torch: the query heads of a key head as rows."""
    rows = q.view(1, k.shape[1], -1, k.shape[3])
    operands = cold_copies(lambda: (k.clone(), v.clone()), 2 * k.nbytes)
    return Contender(GROUPED, [partial(scaled_dot_product_attention, rows, *p) for p in operands], 2 * k.nbytes)


def cached_attention_contender(q: Tensor, k: Tensor, v: Tensor, keep_share: float) -> Contender:
    """Our attention over a cache that keeps this share."""

    def filled() -> Cache:
        cache = Cache(k.shape[1], k.shape[3], k.shape[2], 1, (keep_share, keep_share), window=64)
        cache.append(k, v)
        return cache

    operands = cold_copies(filled, 2 * k.nbytes)
    name = "dense_attention" if keep_share == 1 else "sparse_attention"
    return Contender(name, [partial(c.attend, q) for c in operands], operands[0].bytes)


def random_weight(out_features: int, in_features: int, sparsity: float, zeros_in_blocks: bool = False) -> Tensor:
    """Random bfloat16 weights with this share of zeros, in blocks of 16 by 2 where asked."""
    generator = torch.Generator().manual_seed(out_features + in_features)
    w = torch.randn(out_features, in_features, generator=generator)
    if zeros_in_blocks:
        keep = torch.rand(-(-out_features // 16), -(-in_features // 2), generator=generator) >= sparsity
        keep = keep.repeat_interleave(16, 0).repeat_interleave(2, 1)[:out_features, :in_features]
    else:
        keep = torch.rand(out_features, in_features, generator=generator) >= sparsity
    return (w * keep).bfloat16()
