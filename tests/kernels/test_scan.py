"""Scans and convolutions along a sequence against plain torch, at every level: forward, backward, states, bounds."""

import pytest
import torch
from effc.kernels.native import KernelError
from effc.kernels.ops import KERNELS
from torch.autograd import gradcheck

LAST = float("inf")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
CONV, SELECTIVE, SSD = (KERNELS[name] for name in ("causal_conv", "selective_scan", "ssd_scan"))
BOUNDS = pytest.mark.parametrize("bounds", ["all", "padded"])


def random(*shape: int, seed: int, dtype=torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def live(kind: str, batches: int, length: int) -> torch.Tensor | None:
    """Left padding, a shorter sequence, one of nothing: as many as there are sequences."""
    ranges = [(length // 3, length), (0, length - length // 4), (length // 2, length // 2)]
    return None if kind == "all" else torch.tensor([ranges[i % 3] for i in range(batches)])


def selective(case, dtype=torch.float32, bounds=None, gate=True):
    """Arguments of `selective_scan`, lying in memory as a mixer's do."""
    b, c, n, t = case
    both = random(b, t, 2 * c, seed=1, dtype=dtype).mT
    parts = random(b, t, 3 + 2 * n, seed=2, dtype=dtype)
    dt = random(b, c, t, seed=3, dtype=dtype)  # as `weight @ x` leaves it: channel by channel
    return [
        both[:, :c],
        dt,
        -torch.exp(random(c, n, seed=4)),
        parts[:, :, 3 : 3 + n].mT,
        parts[:, :, 3 + n :].mT,
        random(c, seed=5),
        both[:, c:] if gate else None,
        random(c, seed=6),
        True,
        random(b, c, n, seed=7),
        bounds,
    ]


def ssd(case, dtype=torch.float32, bounds=None, limits=(0.0, LAST)):
    b, h, p, g, n, t = case
    mixed = random(b, t, h * p + 2 * g * n, seed=1, dtype=dtype)
    x, one, two = mixed.split([h * p, g * n, g * n], 2)
    return [
        x.view(b, t, h, p),
        random(b, t, h, seed=3, dtype=dtype),
        -torch.exp(random(h, seed=4)),
        one.view(b, t, g, n),
        two.view(b, t, g, n),
        random(h, seed=5),
        random(h, seed=6),
        True,
        *limits,
        random(b, h, p, n, seed=7),
        bounds,
    ]


def conv(case, dtype=torch.float32, bounds=None, silu=True):
    b, c, t, k = case
    before = random(b, c, k - 1, seed=4, dtype=dtype) if k > 1 else None
    return [random(b, t, c, seed=1, dtype=dtype).mT, random(c, k, seed=2), random(c, seed=3), before, bounds, silu]


MAKERS = {CONV: (conv, 0, 2), SELECTIVE: (selective, 0, 3), SSD: (ssd, 0, 5)}  # maker, batches, length in a case
CASES = [(kernel, case) for kernel in MAKERS for case in kernel.cases()]
EACH = pytest.mark.parametrize("kernel, case", CASES, ids=lambda x: x.name if isinstance(x, type) else str(x))


def parts(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_near(found, wanted, share: float) -> None:
    for one, two in zip(parts(found), parts(wanted), strict=True):
        assert one.shape == two.shape and one.dtype == two.dtype
        if two.numel():
            worst = float((one.double() - two.double()).abs().max())
            assert worst <= share * float(two.double().abs().max()) + 1e-6


# -- forward -------------------------------------------------------------------------------------------------


@DTYPES
@BOUNDS
@EACH
def test_a_kernel_gives_what_plain_torch_gives(level, kernel, case, bounds, dtype):
    # float32 sums in another order; bfloat16 inputs are the same numbers, and only the result is rounded
    make, batches, length = MAKERS[kernel]
    given = make(case, dtype, live(bounds, case[batches], case[length]))
    share = 1e-5 if dtype is torch.float32 else 2**-8
    assert_near(getattr(torch.ops.effc, kernel.name)(*given), kernel.reference(*given), share)


@EACH
def test_without_states_biases_gates_and_skips_it_is_the_same_as_with_zeros(kernel, case):
    make = MAKERS[kernel][0]
    given = make(case)
    optional = [
        i
        for i, x in enumerate(given)
        if isinstance(x, torch.Tensor) and i in {CONV: (2, 3), SELECTIVE: (5, 7, 9), SSD: (5, 6, 10)}[kernel]
    ]
    bare, zeroed = list(given), list(given)
    for i in optional:
        bare[i], zeroed[i] = None, torch.zeros_like(given[i])
    assert_near(kernel.native(*bare), kernel.native(*zeroed), 1e-6)


@pytest.mark.parametrize("kernel", [SELECTIVE, SSD], ids=lambda k: k.name)
def test_a_scan_in_two_parts_is_the_scan_of_the_whole(level, kernel):
    # the state that goes out of one part goes into the next
    case = (2, 40, 16, 150) if kernel is SELECTIVE else (2, 4, 24, 2, 16, 150)
    given = MAKERS[kernel][0](case)
    along = {SELECTIVE: (2, (0, 1, 3, 4, 6)), SSD: (1, (0, 1, 3, 4))}[kernel]
    place = {SELECTIVE: 9, SSD: 10}[kernel]
    y, state = kernel.native(*given)
    first, second = list(given), list(given)
    for i in along[1]:
        first[i], second[i] = given[i].split([67, 83], along[0])
    left, second[place] = kernel.native(*first)
    right, last = kernel.native(*second)
    assert_near((torch.cat([left, right], along[0]), last), (y, state), 1e-5)


@pytest.mark.parametrize("kernel", [SELECTIVE, SSD], ids=lambda k: k.name)
def test_padding_on_either_side_changes_nothing(level, kernel):
    case = (1, 20, 8, 40) if kernel is SELECTIVE else (1, 3, 17, 1, 8, 40)
    axis = 2 if kernel is SELECTIVE else 1
    given = MAKERS[kernel][0](case)
    inside = [
        x[:, :, 9:31] if axis == 2 and i in (0, 1, 3, 4, 6) else x[:, 9:31] if axis == 1 and i in (0, 1, 3, 4) else x
        for i, x in enumerate(given)
    ]
    y, state = kernel.native(*given[:-1], torch.tensor([[9, 31]]))
    wanted, last = kernel.native(*inside)
    assert torch.equal(y.narrow(axis, 9, 22), wanted) and torch.equal(state, last)
    assert not y.narrow(axis, 0, 9).any() and not y.narrow(axis, 31, 9).any()


@DTYPES
def test_steps_one_after_the_other_are_the_scan(level, dtype):
    b, c, n, t = 2, 33, 16, 7
    x, dt, a, one, two, d, z, bias, softplus, state, _ = selective((b, c, n, t), dtype)
    y, last = SELECTIVE.native(x, dt, a, one, two, d, z, bias, softplus, state, None)
    own = state.clone()
    found = [
        torch.ops.effc.selective_step(
            own, x[:, :, i], dt[:, :, i], torch.log(-a), one[:, :, i], two[:, :, i], d, z[:, :, i], bias, softplus, True
        )
        for i in range(t)
    ]
    share = 1e-5 if dtype is torch.float32 else 2**-7
    assert_near((torch.stack(found, 2), own), (y, last), share)


@DTYPES
def test_steps_of_heads_one_after_the_other_are_their_scan(level, dtype):
    b, h, p, g, n, t = 2, 6, 17, 2, 24, 7
    x, dt, a, one, two, d, bias, softplus, least, most, state, _ = ssd((b, h, p, g, n, t), dtype)
    y, last = SSD.native(x, dt, a, one, two, d, bias, softplus, least, most, state, None)
    own = state.clone()
    found = [
        torch.ops.effc.ssd_step(own, x[:, i], dt[:, i], torch.log(-a), one[:, i], two[:, i], d, bias, softplus, True)
        for i in range(t)
    ]
    share = 1e-5 if dtype is torch.float32 else 2**-7
    assert_near((torch.stack(found, 1), own), (y, last), share)


@DTYPES
@pytest.mark.parametrize("k, width", [(4, 4), (4, 3), (2, 5), (1, 1)])
def test_steps_of_a_convolution_are_the_convolution(level, dtype, k, width):
    x, weight, bias = random(2, 37, 9, seed=1, dtype=dtype), random(37, k, seed=2), random(37, seed=3)
    state = random(2, 37, width, seed=4, dtype=dtype)
    before = state[:, :, width - k + 1 :] if k > 1 else None
    wanted = CONV.native(x, weight, bias, before, None, True)
    found = [torch.ops.effc.causal_conv_step(x[:, :, i], state, weight, bias, True) for i in range(9)]
    assert_near(torch.stack(found, 2), wanted, 1e-5 if dtype is torch.float32 else 2**-7)
    assert torch.equal(state, x[:, :, -width:])


@DTYPES
def test_a_product_with_few_rows_is_the_product(level, dtype):
    for m, n, k in KERNELS["row_product"].cases():
        x, w = random(m, k, seed=m, dtype=dtype), random(n, k, seed=n, dtype=dtype)
        for bias in (None, random(n, seed=k)):
            given = (x, w, bias)
            assert_near(
                torch.ops.effc.row_product(*given),
                KERNELS["row_product"].reference(*given),
                1e-5 if dtype is torch.float32 else 2**-8,
            )


@DTYPES
@pytest.mark.parametrize("gated", [True, False])
def test_a_gated_norm_is_the_norm_behind_the_gate(level, dtype, gated):
    for m, groups, width in KERNELS["gated_norm"].cases():
        x, gate = (random(m, groups * width, seed=s, dtype=dtype) for s in (1, 2))
        given = (x, gate if gated else None, random(groups * width, seed=3), 1e-5, groups)
        assert_near(
            torch.ops.effc.gated_norm(*given),
            KERNELS["gated_norm"].reference(*given),
            1e-5 if dtype is torch.float32 else 2**-7,
        )


def test_more_threads_give_the_same_bits():
    for kernel, case in ((SELECTIVE, (2, 100, 16, 70)), (SSD, (1, 5, 32, 1, 16, 130)), (CONV, (2, 48, 100, 4))):
        given, found = MAKERS[kernel][0](case), []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(parts(kernel.native(*given)))
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_time_step_is_held_within_its_bounds():
    given = ssd((1, 2, 8, 1, 8, 20), limits=(0.3, 0.9))
    assert_near(SSD.native(*given), SSD.reference(*given), 1e-5)
    free = ssd((1, 2, 8, 1, 8, 20))
    assert not torch.allclose(SSD.native(*given)[0], SSD.native(*free)[0])


def test_large_steps_and_gates_neither_overflow_nor_vanish(level):
    given = selective((1, 16, 4, 30))
    given[1], given[6] = given[1] * 60, given[6] * 200
    y, state = SELECTIVE.native(*given)
    assert y.isfinite().all() and state.isfinite().all()
    assert_near((y, state), SELECTIVE.reference(*given), 1e-5)


def test_what_is_not_a_number_stays_so():
    given = selective((1, 16, 4, 30))
    given[0] = given[0].clone()
    given[0][0, 3, 10] = float("nan")
    y = SELECTIVE.native(*given)[0]
    assert y[0, 3, 10:].isnan().all() and y[0, 3, :10].isfinite().all() and y[0, 4].isfinite().all()


# -- backward ------------------------------------------------------------------------------------------------


def learning(given):
    return [
        x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in given
    ]


def gradients(function, given, weights):
    given = learning(given)
    results = [y for y in parts(function(*given)) if y.numel()]
    sum((y.to(w.dtype) * w).sum() for y, w in zip(results, weights, strict=True)).backward()
    return [x.grad for x in given if isinstance(x, torch.Tensor) and x.requires_grad]


@BOUNDS
@EACH
def test_gradients_are_those_of_plain_torch_in_double(level, kernel, case, bounds):
    make, batches, length = MAKERS[kernel]
    given = make(case, bounds=live(bounds, case[batches], case[length]))
    results = parts(kernel.reference(*given))
    weights = [random(*y.shape, seed=9 + i) for i, y in enumerate(results)]
    wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given]
    wanted = gradients(kernel.reference, wide, [w.double() for w in weights])
    found = gradients(getattr(torch.ops.effc, kernel.name), given, weights)
    for one, two in zip(found, wanted, strict=True):
        # float32 sums of up to a million products that largely cancel
        assert float((one - two).abs().max()) <= 1e-4 * float(two.abs().max()) + 1e-5


@pytest.mark.filterwarnings("ignore:Input #")
@pytest.mark.parametrize(
    "kernel, case",
    [(CONV, (2, 3, 5, 3)), (SELECTIVE, (2, 3, 2, 5)), (SSD, (2, 2, 3, 1, 2, 5))],
    ids=lambda x: x.name if isinstance(x, type) else str(x),
)
def test_gradcheck_finds_no_fault(kernel, case):
    # inputs are float32: steps of 1e-2 leave differences exact to about 1e-3
    given = learning(MAKERS[kernel][0](case))
    assert gradcheck(getattr(torch.ops.effc, kernel.name), given, eps=1e-2, atol=5e-3, rtol=1e-2, nondet_tol=0.0)


def test_a_gradient_of_bfloat16_is_bfloat16_and_near():
    given = selective((1, 20, 4, 12), torch.bfloat16)
    weights = [random(*y.shape, seed=9) for y in SELECTIVE.reference(*given)]
    found = gradients(torch.ops.effc.selective_scan, given, weights)
    wanted = gradients(SELECTIVE.reference, given, weights)
    for one, two in zip(found, wanted, strict=True):
        assert one.dtype == two.dtype and float((one - two).abs().max()) <= 2**-6 * float(two.abs().max())


# -- what torch and people expect ----------------------------------------------------------------------------


@EACH
def test_torch_finds_schema_fake_and_gradient_in_agreement(kernel, case):
    if 1 in case[1:]:
        return  # a size of one tells nothing about strides
    torch.library.opcheck(
        getattr(torch.ops.effc, kernel.name).default,
        tuple(learning(MAKERS[kernel][0](case))),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize(
    "place, wrong, said",
    [
        (1, random(2, 4, 5, seed=0), "a time step of shape"),
        (2, random(4, 2, seed=0), "A of shape"),
        (3, random(2, 5, 6, seed=0), "B of shape"),
        (5, random(4, seed=0), "D of shape"),
        (6, random(2, 3, 4, seed=0), "gate"),
        (7, random(2, seed=0), "bias of shape"),
        (9, random(2, 3, 9, seed=0), "a state of shape"),
        (10, torch.tensor([[0, 5]]), "bounds"),
        (10, torch.tensor([[0, 6], [0, 5]]), "leave a sequence of 5 positions"),
        (10, torch.tensor([[3, 2], [0, 5]]), "end before they begin"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_a_sentence(place, wrong, said):
    given = selective((2, 3, 2, 5))
    given[place] = wrong
    with pytest.raises(KernelError, match=said):
        torch.ops.effc.selective_scan(*given)


def test_heads_that_groups_do_not_divide_and_odd_states_are_refused():
    given = ssd((1, 3, 4, 1, 5, 6))
    given[3] = given[4] = random(1, 6, 2, 5, seed=0)
    with pytest.raises(KernelError, match="do not fit"):
        SSD.native(*given)
    given = ssd((1, 3, 4, 1, 5, 6))
    given[10] = random(1, 3, 5, 4, seed=0)
    with pytest.raises(KernelError, match=r"a state of shape \[1, 3, 5, 4\] does not fit: \[1, 3, 4, 5\] is wanted"):
        SSD.native(*given)


def test_memory_does_not_grow_with_the_length():
    """What a scan holds besides its result: nothing that has as many numbers as there are positions."""
    import resource

    def peak(length: int) -> int:
        x = torch.zeros(1, length, 64)
        given = (
            x.mT,
            x.mT,
            -torch.ones(64, 16),
            *[torch.zeros(1, length, 16).mT] * 2,
            None,
            None,
            None,
            True,
            None,
            None,
        )
        SELECTIVE.native(*given)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = peak(1024)
    # x, dt are one; B, C are one; y: 16 MB, 4 MB and 16 MB at 64k positions. All states would be 256 MB.
    assert peak(65536) - before < 80 * 1024
