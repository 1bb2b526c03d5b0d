"""The packed linear kernels against plain torch, at every level."""

import math

import pytest
import torch
from effc.kernels import levels, packed
from effc.kernels.native import KernelError
from effc.kernels.ops import KERNELS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from tests.kernels.layers import LINEAR, assert_close, reference, run, weight

BF16 = [name for name in LINEAR if "int" not in name]
INT16 = "dense_linear_int8_int16"
SIZES = st.integers(1, 150)
FIXTURE = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("kernel", LINEAR)
def test_every_size_gives_what_the_reference_gives(kernel, level):
    for n, k in KERNELS[kernel].cases():
        w = weight(n, k, 0.5, seed=n)
        own = KERNELS[kernel].pack(w)
        for rows in (1, 2, 4, 6, 8, 11, 16, 37):
            x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows))
            bias = torch.randn(n, generator=torch.Generator().manual_seed(k))
            assert_close(run(kernel, x, own, bias, n), reference(kernel, x, own, bias, n))


@pytest.mark.parametrize("kernel", LINEAR)
@FIXTURE
@given(
    n=SIZES,
    k=SIZES,
    rows=st.integers(0, 64),
    density=st.sampled_from([0, 0.03, 0.2, 0.5, 0.8, 1]),
    half=st.booleans(),
    bias=st.sampled_from([None, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_any_layer_gives_what_the_reference_gives(level, kernel, n, k, rows, density, half, bias, seed):
    w = weight(n, k, density, seed)
    own = KERNELS[kernel].pack(w)
    dtype = torch.bfloat16 if half else torch.float32
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    b = None if bias is None else torch.ones(n, dtype=bias) * 0.5
    assert_close(run(kernel, x, own, b, n), reference(kernel, x, own, b, n))


@pytest.mark.parametrize("kernel", LINEAR)
def test_a_long_input_and_many_rows_pass_every_panel_and_chunk(kernel):
    w = weight(70, 4200, 0.3)
    own = KERNELS[kernel].pack(w)
    x = torch.randn(401, 4200, generator=torch.Generator().manual_seed(0))
    assert_close(run(kernel, x, own, None, 70), reference(kernel, x, own, None, 70))


@pytest.mark.parametrize("kernel", LINEAR)
def test_one_or_two_rows_behind_a_whole_chunk_are_as_right_as_all_others(kernel, level):
    own = KERNELS[kernel].pack(weight(20, 1100, 0.5))  # more than one depth of a panel
    x = torch.randn(514, 1100, generator=torch.Generator().manual_seed(0))
    for rows in (513, 514):
        assert_close(run(kernel, x[:rows], own, None, 20), reference(kernel, x[:rows], own, None, 20))


@pytest.mark.parametrize("kernel", ["dense_linear", "sparse_linear"])
@pytest.mark.parametrize("level", [levels.MODEL, "amx"])
def test_on_tiles_a_row_is_the_same_to_the_bit_whatever_stands_beside_it(kernel, level):
    if levels.level_unavailability_reason(level):
        pytest.skip(levels.level_unavailability_reason(level))
    w = weight(90, 700, 0.4)
    own = KERNELS[kernel].pack(w)
    x = torch.randn(40, 700, generator=torch.Generator().manual_seed(1))
    with levels.at_forced_level(level):
        alone = torch.cat([run(kernel, row[None], own, None, 90) for row in x])
        for rows in (2, 15, 16, 17, 31, 32, 33, 40):
            assert torch.equal(run(kernel, x[:rows], own, None, 90), alone[:rows]), rows


@pytest.mark.parametrize("kernel", BF16)
def test_what_is_packed_is_the_weight_rounded_to_bfloat16(kernel, level):
    for n, k in KERNELS[kernel].cases():
        w = weight(n, k, 0.4, seed=k)
        own = KERNELS[kernel].pack(w)
        assert torch.equal(KERNELS[kernel].unpack(own), w.bfloat16().float())
        assert torch.equal(torch.ops.effc.unpack_linear(own, n, k), w.bfloat16().float())


@pytest.mark.parametrize("kernel", [name for name in LINEAR if "int8" in name])
def test_an_int8_weight_is_off_by_at_most_half_a_step_of_its_output(kernel, level):
    w = weight(33, 70, 0.7) * torch.logspace(-6, 3, 33)[:, None]
    found = torch.ops.effc.unpack_linear(KERNELS[kernel].pack(w), 33, 70)
    step = w.abs().amax(1, keepdim=True) / 127
    assert ((found - w).abs() <= step / 2 * 1.0001).all()  # 1.0001: float32 rounding


@pytest.mark.parametrize("kernel", LINEAR)
def test_equal_weights_pack_to_equal_bytes_at_every_level_and_thread_count(kernel):
    w = weight(130, 190, 0.5)
    found = []
    for name in [n for n in (*levels.NAMES, levels.MODEL) if not levels.level_unavailability_reason(n)]:
        with levels.at_forced_level(name):
            found += [KERNELS[kernel].pack(w, threads=t) for t in (1, 3)]
            strided = weight(260, 380, 0.5)[::2, ::2].copy_(w)
            found += [KERNELS[kernel].pack(w.T.contiguous().T), KERNELS[kernel].pack(strided)]
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("kernel", [name for name in LINEAR if name not in BF16])
def test_int8_and_int4_give_the_same_bits_at_every_level(kernel):
    own = KERNELS[kernel].pack(weight(70, 330, 0.5))
    for rows in (1, 5, 15 if kernel == "dense_linear_int4" else 40):  # more rows of int4 are bfloat16 on AMX
        x = torch.randn(rows, 330, generator=torch.Generator().manual_seed(rows))
        found = []
        for name in [n for n in (*levels.NAMES, levels.MODEL) if not levels.level_unavailability_reason(n)]:
            with levels.at_forced_level(name):
                found.append(run(kernel, x, own, None, 70))
        assert all(torch.equal(found[0], other) for other in found)


def test_a_row_of_inputs_of_16_bits_is_the_same_to_the_bit_whatever_stands_beside_it(level):
    own = KERNELS[INT16].pack(weight(90, 700, 1.0))
    x = torch.randn(40, 700, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([run(INT16, row[None], own, None, 90) for row in x])
    for rows in (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 40):
        assert torch.equal(run(INT16, x[:rows], own, None, 90), alone[:rows]), rows


@settings(max_examples=30, deadline=None)
@given(n=SIZES, k=st.integers(1, 600), rows=st.integers(1, 20), spread=st.floats(0, 3), seed=st.integers(0, 99))
def test_inputs_of_16_bits_are_off_by_at_most_half_a_step_of_what_one_in_96_exceeds(n, k, rows, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator) * torch.logspace(-spread, spread, k)  # a few that are far larger
    own = KERNELS[INT16].pack(weight(n, k, 1.0, seed))
    held = KERNELS[INT16].unpack(own).double()
    exact = x.double() @ held.T
    off = (run(INT16, x, own, None, n).double() - exact).abs()
    ordered = x.double().abs().sort(-1, descending=True).values
    rare = math.ceil(k / 96)
    common = ordered[:, rare : rare + 1] if rare < k else torch.zeros(rows, 1).double()
    # At most an eighth of an octave above, and what 16 bits hold below.
    not_rare = (ordered * (ordered <= common * 2 ** (1 / 4))).amax(-1, keepdim=True)
    step = torch.maximum(not_rare, ordered[:, :1] * 127 / 32639) / 127
    rounded = step * 0.5001 * held.abs().sum(1)
    assert (off <= rounded + 2**-21 * x.double().abs() @ held.abs().T).all()  # and four roundings in float32


def test_inputs_of_16_bits_that_are_whole_steps_are_multiplied_exactly(level):
    w = torch.randint(-127, 128, (33, 300), generator=torch.Generator().manual_seed(0)).float()
    w[:, 0] = 127
    x = torch.randint(-127, 128, (11, 300), generator=torch.Generator().manual_seed(1)).float()
    x[:, 100], x[:, 5], x[:, 6], x[::2, 290] = 127, 32639, -32639, -12345
    found = run(INT16, x, KERNELS[INT16].pack(w), None, 33)
    exact = x.double() @ w.double().T
    assert ((found.double() - exact).abs() <= 2**-22 * (x.double().abs() @ w.double().abs().T)).all()


@pytest.mark.parametrize("rare", [0, 1, 6, 24])
def test_upper_bytes_count_wherever_they_are_in_many_rows(level, rare):
    """Outliers in the first and the last four of a panel's depth, in fours of their own or of all rows."""
    generator = torch.Generator().manual_seed(rare)
    x = torch.randn(45, 1300, generator=generator)
    for row in range(45):
        x[row, torch.randperm(1300, generator=generator)[:rare]] *= 80
        x[row, [0, 511, 512, 1299][: rare // 6]] = 200.0
    own = KERNELS[INT16].pack(weight(90, 1300, 1.0))
    alone = torch.cat([run(INT16, row[None], own, None, 90) for row in x])
    assert torch.equal(run(INT16, x, own, None, 90), alone)
    assert_close(alone, KERNELS[INT16].reference(x, own, None, 90))


def test_the_longest_input_of_16_bits_fits_its_sums(level):
    """Largest codes all of one sign, so that either half's sum is as far from zero as it can be."""
    own = KERNELS[INT16].pack(torch.ones(1, 66000))
    x = torch.ones(2, 66000) * torch.tensor([[1.0], [-1.0]])
    assert run(INT16, x, own, None, 1).flatten().tolist() == pytest.approx([66000, -66000], rel=1e-6)


@pytest.mark.parametrize("kernel", LINEAR)
def test_threads_do_not_change_a_bit(kernel):
    own, x = KERNELS[kernel].pack(weight(700, 600, 0.5)), torch.randn(3, 600)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found += [run(kernel, x, own, None, 700), run(kernel, x.repeat(11, 1), own, None, 700)[:3]]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[2]) and torch.equal(found[0], found[4])
    assert torch.equal(found[1], found[3]) and torch.equal(found[1], found[5])


@pytest.mark.parametrize("kernel", LINEAR)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floating_point_numbers_go_through_float32_and_come_back_as_they_were(kernel, dtype):
    w, x = weight(20, 40, 0.5), torch.randn(3, 40, generator=torch.Generator().manual_seed(2)).to(dtype)
    own = KERNELS[kernel].pack(w)
    found = run(kernel, x, own, None, 20)
    assert found.dtype == dtype == KERNELS[kernel].fake(x, own, None, 20).dtype
    assert torch.equal(found, run(kernel, x.float(), own, None, 20).to(dtype))


@pytest.mark.parametrize(
    "x", [torch.ones(2, 40, dtype=torch.int32), torch.tensor(1.0), torch.ones(2, 39), torch.ones(2, 0)]
)
def test_what_is_no_input_of_the_layer_is_refused(x):
    own = KERNELS["sparse_linear"].pack(weight(20, 40, 0.5))
    with pytest.raises(KernelError, match=r"input|arguments do not fit"):
        run("sparse_linear", x, own, None, 20)


@pytest.mark.parametrize(
    ("bias", "said"), [(torch.ones(3), r"\[3\] does not fit 20"), (torch.ones(20, device="meta"), "lies on meta")]
)
def test_a_bias_that_the_kernel_can_not_read_is_refused(bias, said):
    own = KERNELS["sparse_linear"].pack(weight(20, 40, 0.5))
    with torch.no_grad(), pytest.raises(KernelError, match=said):
        KERNELS["sparse_linear"].call_op_or_kernel(torch.ones(2, 40), own, bias, 20)


@pytest.mark.parametrize("kernel", LINEAR)
def test_leading_dimensions_and_strides_are_read_as_torch_reads_them(kernel):
    own = KERNELS[kernel].pack(weight(20, 40, 0.5))
    wide = torch.randn(6, 100)
    for x in (
        wide[:, 30:70],
        wide[::2, :40],
        wide[:, ::2][:, :40],
        wide.T[:40].T,
        torch.randn(2, 3, 40),
        torch.randn(40),
        torch.randn(2, 0, 40),
        wide[:1, :40].expand(4, 40),
    ):
        assert_close(run(kernel, x, own, None, 20), KERNELS[kernel].reference(x.contiguous(), own, None, 20))


@pytest.mark.parametrize("kernel", LINEAR)
def test_empty_outputs_and_rows_of_zeros_give_the_bias(kernel, level):
    w = weight(40, 50, 0.5)
    w[3:20] = 0
    own, bias = KERNELS[kernel].pack(w), torch.arange(40.0)
    y = run(kernel, torch.randn(2, 50), own, bias, 40)
    assert torch.equal(y[:, 3:20], bias[3:20].expand(2, 17))
    assert torch.equal(run(kernel, torch.zeros(2, 50), own, bias, 40), bias.expand(2, 40))
    nothing = KERNELS[kernel].pack(w * 0)
    assert torch.equal(run(kernel, torch.randn(2, 50), nothing, bias, 40), bias.expand(2, 40))


@pytest.mark.parametrize("kernel", LINEAR)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_input_that_is_not_finite_shows_in_its_row_alone(kernel, value, level):
    own = KERNELS[kernel].pack(weight(40, 50, 1.0))
    for rows in (2, 40):
        x = torch.randn(rows, 50)
        x[1, 7] = value
        y = run(kernel, x, own, None, 40)
        assert not y[1].isfinite().any() and y[0].isfinite().all() and y[2:].isfinite().all()


def test_a_sparse_weight_is_as_small_as_its_bitmap_allows():
    dense = KERNELS["dense_linear"].pack(weight(1024, 1024, 1.0)).numel()
    half = KERNELS["sparse_linear"].pack(weight(1024, 1024, 0.5)).numel()
    assert half / dense == pytest.approx(0.5 + 1 / 16, abs=0.01)
    facts = packed.packed_facts(KERNELS["sparse_linear"].pack(weight(64, 64, 0.5)))
    assert facts.kernel == "sparse_linear" and facts.density == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("kernel", [name for name in LINEAR if "int4" not in name])
def test_gradients_are_those_of_the_unpacked_weight(kernel):
    # Numbers with few bits, so that bfloat16 and int8 hold them and the difference quotient exactly.
    w = torch.randint(-4, 5, (5, 6)).float()
    w[:, 0] = 127
    own = KERNELS[kernel].pack(w)
    x = torch.randn(3, 6, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    y = run(kernel, x, own, bias, 5)
    grad = torch.randn(3, 5)
    y.backward(grad)
    assert torch.allclose(x.grad, grad @ w, atol=1e-3) and torch.allclose(bias.grad, grad.sum(0))


@pytest.mark.parametrize("kernel", BF16)
@pytest.mark.filterwarnings("ignore:Input #0 requires gradient")
def test_gradients_pass_gradcheck_on_numbers_that_bfloat16_holds(kernel):
    own = KERNELS[kernel].pack(torch.randint(-4, 5, (5, 6)).float())
    x = (torch.randint(-8, 9, (3, 6)) / 8).requires_grad_()

    def layer(v):
        return run(kernel, v, own, None, 5)

    assert torch.autograd.gradcheck(layer, x, eps=0.125, atol=1e-4, rtol=1e-4)


class Layer(torch.nn.Module):
    def __init__(self, kernel: str, w: torch.Tensor):
        super().__init__()
        self.kernel, self.n = kernel, len(w)
        self.register_buffer("packed", KERNELS[kernel].pack(w))

    def forward(self, x):
        return run(self.kernel, x, self.packed, None, self.n).relu()


@pytest.mark.parametrize("kernel", LINEAR)
def test_export_keeps_the_op_and_the_batch_dynamic(kernel):
    layer = Layer(kernel, weight(20, 40, 0.5))
    shapes = {"x": {0: torch.export.Dim("rows", min=2, max=64)}}
    program = torch.export.export(layer, (torch.randn(3, 40),), dynamic_shapes=shapes)
    assert any(str(node.target) == f"effc.{kernel}.default" for node in program.graph.nodes)
    for rows in (2, 30):
        x = torch.randn(rows, 40)
        assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("kernel", LINEAR)
def test_torch_finds_schema_fake_and_autograd_in_agreement(kernel):
    own, x = KERNELS[kernel].pack(weight(20, 40, 0.5)), torch.randn(3, 40, requires_grad=True)
    op = getattr(torch.ops.effc, kernel).default
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, (x, own, torch.randn(20), 20), test_utils=checks)


def test_a_compiled_layer_gives_what_the_layer_gives():
    layer = Layer("sparse_linear", weight(20, 40, 0.5))
    x = torch.randn(3, 40)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_a_plain_layer_and_a_dense_one_agree():
    w, x = weight(48, 64, 1.0), torch.randn(5, 64).bfloat16()
    found = run("dense_linear", x, KERNELS["dense_linear"].pack(w), None, 48)
    assert_close(found, linear(x, w.bfloat16()))


@pytest.mark.parametrize("kernel", LINEAR)
def test_torch_computes_the_same_after_ours_in_one_thread(kernel):
    """On a processor with AMX both shape the thread's tiles; elsewhere this says little."""
    w, x = weight(96, 256, 1.0), torch.randn(64, 256).bfloat16()
    before = linear(x, w.bfloat16())
    ours = run(kernel, x, KERNELS[kernel].pack(w), None, 96)
    for _ in range(2):
        assert torch.equal(linear(x, w.bfloat16()), before)
        assert torch.equal(run(kernel, x, KERNELS[kernel].pack(w), None, 96), ours)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,), (2, 3, 4)])
def test_a_layer_without_inputs_or_outputs_is_refused(shape):
    for kernel in LINEAR:
        with pytest.raises(KernelError, match="at least one output and one input"):
            KERNELS[kernel].pack(torch.zeros(shape))


@pytest.mark.parametrize("kernel", LINEAR)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_refused(kernel, value, dtype):
    w = weight(40, 70, 0.5).to(dtype)
    w[39, 69] = value
    with pytest.raises(KernelError, match="a weight is NaN or infinite"):
        KERNELS[kernel].pack(w)


def test_more_inputs_than_sums_can_hold_are_refused():
    with pytest.raises(KernelError, match="more inputs than this kernel's sums can hold"):
        KERNELS["sparse_linear_int8"].pack(torch.ones(1, 66001))
    assert "66001 inputs" in KERNELS["dense_linear_int8"].unsupported_reason(1, 66001)
    assert KERNELS["dense_linear_int8"].unsupported_reason(1, 66000) == ""
    with pytest.raises(KernelError, match="more inputs"):
        KERNELS["block_sparse_linear"].pack(torch.ones(1, 131073))
