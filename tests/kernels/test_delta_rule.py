"""The gated delta rule against plain torch, at every level."""

import pytest
import torch
from effc.kernels.native import KernelError
from effc.kernels.ops import KERNELS

KERNEL = KERNELS["delta_rule"]


def given(batches, heads, p, groups, n, length, by_channel):
    generator = torch.Generator().manual_seed(length)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    q, k = (torch.nn.functional.normalize(random(batches, length, groups, n), dim=-1) for _ in range(2))
    decay = -random(*(batches, length, heads), *([n] if by_channel else [])).abs()
    mixed = random(batches, length, heads * p + 3)  # rows that do not lie one behind another
    v = mixed[..., : heads * p].unflatten(-1, (heads, p))
    return q, k, v, decay, random(batches, length, heads).sigmoid(), random(batches, heads, n, p)


def assert_near(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=2e-5, atol=2e-5)  # sums in other orders


@pytest.mark.parametrize("case", KERNEL.cases(), ids=str)
def test_it_gives_what_plain_torch_gives_and_leaves_the_state_that_it_was_given(level, case):
    q, k, v, decay, beta, state = given(*case)
    kept = state.clone()
    assert_near(torch.ops.effc.delta_rule(q, k, v, decay, beta, state), KERNEL.reference(q, k, v, decay, beta, state))
    assert torch.equal(state, kept)
    assert_near(KERNEL.native(q, k, v, decay, beta, None), KERNEL.reference(q, k, v, decay, beta, None))


def test_two_parts_with_the_state_between_are_the_whole_to_the_bit(level):
    *rows, state = given(2, 4, 70, 2, 20, 50, True)
    y, last = KERNEL.native(*rows, state)
    left, between = KERNEL.native(*(x[:, :17] for x in rows), state)
    right, end = KERNEL.native(*(x[:, 17:] for x in rows), between)
    assert torch.equal(torch.cat([left, right], 1), y) and torch.equal(end, last)


def test_values_that_the_state_holds_already_change_nothing():
    _, k, v, decay, beta, _ = given(1, 2, 8, 2, 8, 4, False)
    state = torch.einsum("bhn,bhp->bhnp", k[:, 0], v[:, 0])  # keys of length one: it answers v
    y, last = KERNEL.native(k[:, :1], k[:, :1], v[:, :1], 0 * decay[:, :1], beta[:, :1], state)
    assert torch.allclose(y, v[:, :1], atol=1e-5) and torch.allclose(last, state, atol=1e-5)


def test_sizes_that_do_not_fit_are_refused_by_name():
    q, k, v, decay, beta, state = given(1, 4, 8, 2, 8, 3, False)
    with pytest.raises(KernelError, match="beta of shape"):
        KERNEL.native(q, k, v, decay, beta[:, :, :3], state)
    with pytest.raises(KernelError, match="a state of shape"):
        KERNEL.native(q, k, v, decay, beta, state.mT[..., :7])
