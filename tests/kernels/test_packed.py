"""Packed bytes that are cut, changed or foreign are refused with a sentence, and never crash."""

import ctypes

import pytest
import torch
from effc.kernels import levels, native, packed
from effc.kernels.native import KernelError
from effc.kernels.ops import KERNELS
from effc.kernels.packed import Header
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.layers import LINEAR, run, weight

N, K = 40, 150


def sample(kernel: str) -> torch.Tensor:
    return KERNELS[kernel].pack(weight(N, K, 0.5)).clone()


def changed(own: torch.Tensor, **fields) -> torch.Tensor:
    """A copy with other header fields."""
    head = Header.from_buffer_copy(bytes(own[:128].numpy()))
    for name, value in fields.items():
        setattr(head, name, value)
    found = own.clone()
    found[:128] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    return found


def sealed(own: torch.Tensor) -> torch.Tensor:
    """A copy whose checksum is right, as one who means harm would make it."""
    found = own.clone()
    seal = native.levels.load_library().effc_seal_for_tests
    seal.argtypes, seal.restype = (ctypes.c_void_p, ctypes.c_int64), None
    seal(found.data_ptr(), found.numel())
    return found


WRONG = [
    ({"magic": b"pickled!"}, "does not begin as a packed weight does"),
    ({"order": 0x04030201}, "other byte order"),
    ({"version": 2}, "another version of effc"),
    ({"kind": 77}, "packed for another kernel"),
    ({"bytes": 1 << 40}, "longer or shorter than its header says"),
    ({"n": 0}, "no sizes of a layer"),
    ({"n": -5}, "no sizes of a layer"),
    ({"k": (1 << 63) - 1}, "no sizes of a layer"),
    ({"k": (1 << 31) - 1}, "another|sections|inputs than"),
    ({"blocks": 1 << 60}, "sections"),
    ({"tiles": 0}, "sections"),
    ({"offsets_at": -128}, "sections"),
    ({"stream_at": 1 << 50}, "sections"),
    ({"hash": 1}, "checksum"),
]


@pytest.mark.parametrize("fields, sentence", WRONG, ids=lambda v: next(iter(v)) if isinstance(v, dict) else None)
@pytest.mark.parametrize("kernel", LINEAR)
def test_a_header_that_says_something_else_is_refused(kernel, fields, sentence):
    with pytest.raises(KernelError, match=sentence):
        packed.checked_aligned_copy(kernel, changed(sample(kernel), **fields), N if "n" not in fields else -1)


@pytest.mark.parametrize("kernel", LINEAR)
def test_a_cut_buffer_is_refused_wherever_it_is_cut(kernel):
    own = sample(kernel)
    for length in (0, 1, 127, 128, 200, own.numel() // 2, own.numel() - 64, own.numel() - 1):
        with pytest.raises(KernelError, match="shorter"):
            packed.checked_aligned_copy(kernel, own[:length], N)
    with pytest.raises(KernelError, match="longer or shorter"):
        packed.checked_aligned_copy(kernel, torch.cat([own, own[:1]]), N)


@pytest.mark.parametrize("kernel", LINEAR)
@settings(max_examples=40, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(kernel, at, bit):
    own = sample(kernel)
    own[int(at * own.numel())] ^= 1 << bit
    with pytest.raises(KernelError):
        packed.checked_aligned_copy(kernel, own, N)


@pytest.mark.parametrize("kernel", LINEAR)
@settings(max_examples=60, deadline=None)
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=8),
    front=st.booleans(),
)
def test_flipped_bits_behind_a_right_checksum_never_leave_the_buffer(kernel, flips, front):
    own = sample(kernel)
    room = min(own.numel(), 900) if front else own.numel()
    for at, bit in flips:
        own[int(at * room)] ^= 1 << bit
    own = sealed(own)
    try:
        own = packed.checked_aligned_copy(kernel, own, N)
    except KernelError:
        return
    head = Header.from_buffer_copy(bytes(own[:128].numpy()))
    run(kernel, torch.zeros(3, head.k), own, None, head.n)


@pytest.mark.parametrize("kernel", ["sparse_linear", "sparse_linear_int8"])
def test_a_mask_that_disagrees_with_its_values_is_refused(kernel):
    own = sample(kernel)
    head = Header.from_buffer_copy(bytes(own[:128].numpy()))
    mask = own[head.stream_at : head.stream_at + 4]
    mask[:] = torch.tensor([255, 255, 255, 255], dtype=torch.uint8)
    with pytest.raises(KernelError, match="its masks do not agree with the values that follow"):
        packed.checked_aligned_copy(kernel, sealed(own), N)


def test_block_numbers_out_of_order_or_range_are_refused():
    own = sample("block_sparse_linear")
    head = Header.from_buffer_copy(bytes(own[:128].numpy()))
    at = head.stream_at + 64
    for wrong in (65535, 5):
        bad = own.clone()
        bad[at + 4 : at + 6] = torch.tensor([wrong], dtype=torch.int32).view(torch.uint8)[:2]
        with pytest.raises(KernelError, match="masks do not agree"):
            packed.checked_aligned_copy("block_sparse_linear", sealed(bad), N)


def test_an_op_checks_bytes_that_nobody_checked_and_again_when_they_change():
    own = sample("sparse_linear")
    x = torch.randn(1, K)
    wanted = run("sparse_linear", x, own, None, N)
    own[300] ^= 1
    with pytest.raises(KernelError, match="checksum"):
        run("sparse_linear", x, own, None, N)
    own[300] ^= 1
    assert torch.equal(run("sparse_linear", x, own, None, N), wanted)


def test_an_op_refuses_what_does_not_fit_the_packed_weight():
    own = sample("sparse_linear")
    with pytest.raises(KernelError, match="sizes are not those of this layer"):
        run("sparse_linear", torch.randn(1, K), own, None, N + 1)
    with pytest.raises(KernelError, match="arguments do not fit"):
        run("sparse_linear", torch.randn(1, K + 1), own, None, N)
    with pytest.raises(KernelError, match="packed for another kernel"):
        run("dense_linear", torch.randn(1, K), own, None, N)
    with pytest.raises(KernelError, match="does not fit 40 outputs"):
        run("sparse_linear", torch.randn(1, K), own, torch.zeros(N + 1), N)
    with pytest.raises(KernelError, match="not a row of bytes"):
        run("sparse_linear", torch.randn(1, K), own.float(), None, N)


@pytest.mark.parametrize("kernel", LINEAR)
def test_an_adopted_buffer_works_like_the_packed_one(kernel):
    own, x = sample(kernel), torch.randn(4, K)
    foreign = torch.cat([torch.zeros(3, dtype=torch.uint8), own])[3:]  # at an odd address
    assert torch.equal(
        run(kernel, x, packed.checked_aligned_copy(kernel, foreign, N), None, N), run(kernel, x, own, None, N)
    )
    with torch.inference_mode():
        assert torch.equal(run(kernel, x, own.clone(), None, N), run(kernel, x, own, None, N))
        assert torch.equal(KERNELS[kernel].pack(weight(N, K, 0.5)), packed.checked_aligned_copy(kernel, own, N))


def test_large_buffers_lie_on_the_boundary_of_a_huge_page():
    room = packed.allocate_zero_bytes(3 << 20)
    assert room.numel() == 3 << 20 and not room.any()
    assert room.data_ptr() % packed.HUGE == 0
    assert levels.load_library() is not None
