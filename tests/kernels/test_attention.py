"""Decode attention over a growing cache, against plain torch, at every level."""

import pytest
import torch
from effc.kernels.cache import Cache
from effc.kernels.native import KernelError
from effc.kernels.ops import KERNELS
from effc.kernels.packed_attention import unpack_head_blocks

NAMES = {True: "sparse_attention", False: "dense_attention"}


def tokens(heads: int, count: int, d: int, seed: int = 0, sequences: int = 2):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(sequences, heads, count, d, generator=generator) for _ in range(2))


def attended(q, k, v, group: int):
    """Plain float32 attention of one token over rounded keys and values."""
    k, v = (t.bfloat16().float().repeat_interleave(group, 1) for t in (k, v))
    scores = q.bfloat16().float()[:, :, None] @ k.mT * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v)[:, :, 0]


def reference(cache: Cache, q):
    return KERNELS[NAMES[cache.sparse]].reference(
        q, cache.stream, cache.offsets, cache.keys, cache.values, cache.blocks, cache.recent, cache.d**-0.5
    )


def assert_near(found, wanted) -> None:
    """The weights of the softmax are rounded to bfloat16: 2**-8 of the values, which are at most about 4."""
    assert float((found.float() - wanted.float()).abs().max()) < 4 * 2**-8


@pytest.mark.parametrize("case", KERNELS["dense_attention"].cases(), ids=str)
def test_a_dense_cache_attends_as_torch_does_while_it_grows(level, case):
    heads, group, d, count = case
    k, v = tokens(heads, count, d)
    cache, at = Cache(heads, d, count, sequences=2), 0
    for step in (count // 3, 1, 1, count):
        step = min(step, count - at)
        cache.append(k[:, :, at : at + step], v[:, :, at : at + step])
        at += step
        if at:
            q = torch.randn(2, heads * group, d, generator=torch.Generator().manual_seed(at))
            assert_near(cache.attend(q), attended(q, k[:, :, :at], v[:, :, :at], group))
    assert cache.length == count


@pytest.mark.parametrize("keep", [(0.5, 0.3), (1.0, 0.02)], ids=str)
def test_a_sparse_cache_attends_to_what_it_kept(level, keep):
    for heads, group, d, count in KERNELS["sparse_attention"].cases():
        k, v = tokens(heads, count, d)
        cache = Cache(heads, d, count, 2, keep)
        cache.append(k, v)
        for dtype in (torch.float32, torch.bfloat16):
            q = torch.randn(2, heads * group, d, generator=torch.Generator().manual_seed(d)).to(dtype)
            found = cache.attend(q)
            assert found.dtype == dtype
            assert_near(found, reference(cache, q))


def test_one_token_at_a_time_and_all_at_once_make_the_same_cache():
    k, v = tokens(2, 150, 48)
    whole, grown = Cache(2, 48, 200, 2, (0.4, 0.6)), Cache(2, 48, 200, 2, (0.4, 0.6))
    whole.append(k, v)
    for i in range(150):
        grown.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    assert grown.length == whole.length == 150 and torch.equal(grown.offsets, whole.offsets)
    q = torch.randn(2, 4, 48)
    assert torch.equal(grown.attend(q), whole.attend(q))


def test_sinks_and_the_newest_tokens_are_kept_whole_and_others_by_share():
    k, v = tokens(1, 320, 64, sequences=1)
    cache = Cache(1, 64, 320, 1, (0.25, 0.25), window=64, sinks=32)
    cache.append(k, v)
    keys, values = unpack_head_blocks(cache.stream[0], cache.offsets[0, : cache.blocks + 1], 64, True)
    assert (keys[:32] != 0).all() and torch.equal(keys[:32], k[0, 0, :32].bfloat16().float())
    shares = (keys[32:] != 0).float().reshape(-1, 32 * 64).mean(1)
    assert torch.allclose(shares, torch.tensor(0.25), atol=0.01) and (values[:32] != 0).all()
    assert torch.equal(cache.keys[0, : cache.recent], k[0, 0, -cache.recent :].bfloat16()) and cache.recent >= 64
    kept = keys[32:][keys[32:] != 0].abs()
    assert kept.min() > k[0, 0, 32:64].abs().median()
    dense = Cache(1, 64, 320)
    dense.append(k, v)
    assert cache.bytes < 0.7 * dense.bytes


def test_a_cache_that_is_full_says_so():
    cache = Cache(1, 16, 40)
    k, v = tokens(1, 40, 16, sequences=1)
    cache.append(k, v)
    with pytest.raises(KernelError, match="holds 40 tokens, and 41 are wanted"):
        cache.append(k[:, :, :1], v[:, :, :1])


def test_large_scores_neither_overflow_nor_vanish(level):
    k, v = tokens(1, 100, 32, sequences=1)
    cache = Cache(1, 32, 100)
    cache.append(k * 100, v)
    q = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0)) * 100
    assert_near(cache.attend(q), attended(q, k * 100, v, 1))


@pytest.mark.parametrize("sparse", [True, False])
def test_offsets_that_leave_the_stream_are_refused(level, sparse):
    k, v = tokens(1, 200, 32, sequences=1)
    q = torch.randn(1, 2, 32)
    for block, wrong in ((0, 1 << 40), (1, -64), (2, 1 << 62), (1, 5)):
        cache = Cache(1, 32, 200, 1, (0.5, 0.5) if sparse else (1.0, 1.0))
        cache.append(k, v)
        cache.offsets[0, block] = wrong
        with pytest.raises(KernelError, match="the cache can't be used"):
            cache.attend(q)


def test_parts_that_do_not_belong_together_are_refused():
    cache = Cache(2, 32, 64)
    k, v = tokens(2, 64, 32, sequences=1)
    cache.append(k, v)
    parts = [cache.stream, cache.offsets, cache.keys, cache.values, cache.blocks, cache.recent, 1.0]
    op = torch.ops.effc.dense_attention
    with pytest.raises(KernelError, match="does not fit a cache of 2 heads"):
        op(torch.randn(1, 3, 32), *parts)
    with pytest.raises(KernelError, match="do not belong together"):
        op(torch.randn(1, 2, 16), *parts)
    with pytest.raises(KernelError, match="arguments do not fit"):
        op(torch.randn(1, 2, 32), *parts[:4], 99, 0, 1.0)


def test_torch_finds_schema_and_fake_in_agreement():
    cache = Cache(2, 32, 128)
    cache.append(*tokens(2, 100, 32, sequences=1))
    parts = (torch.randn(1, 4, 32), cache.stream, cache.offsets, cache.keys, cache.values, cache.blocks, cache.recent)
    torch.library.opcheck(
        torch.ops.effc.dense_attention.default, (*parts, 0.2), test_utils=("test_schema", "test_faketensor")
    )
