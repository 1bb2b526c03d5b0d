"""Which kernel a module of lower.sparse_cpu gets, by the times and the errors of all that may take it."""

import pytest
import torch
from effc.compiler.transforms.lowering import choice
from effc.compiler.transforms.lowering.choice import KernelChoice, Site, choose_kernel, zero_block_share
from effc.compiler.transforms.lowering.contenders import EAGER
from effc.compiler.transforms.lowering.speed import KernelCase

SITE = Site("up", KernelCase(64, 96, "bfloat16", 0.5, 0.0), 0.5, 64 * 96 * 2)
ALL = tuple(choice.FORMATS.values())


def timed(**seconds):
    return {EAGER: 1.0, **seconds}


def test_the_fastest_kernel_wins_and_says_by_how_much():
    kernel, why = choose_kernel(ALL, timed(dense_linear=0.5, sparse_linear=0.25), {}.get, 0.03)
    assert (kernel, why) == ("sparse_linear", "4 times as fast as torch")


def test_where_torch_is_as_fast_a_module_stays_and_the_reason_has_both_times():
    kernel, why = choose_kernel(ALL, timed(dense_linear=0.98, sparse_linear=1.2), {}.get, 0.03)
    assert kernel == "" and "torch takes 1.0 s" in why and "dense_bf16, 980 ms" in why


def test_of_equals_the_exact_one_wins():
    assert choose_kernel(ALL, timed(sparse_linear=0.51, sparse_linear_int8=0.5), {}.get, 0.03)[0] == "sparse_linear"
    assert choose_kernel(ALL, timed(sparse_linear=0.6, sparse_linear_int8=0.5), {}.get, 0.03)[0] == "sparse_linear_int8"


def test_of_two_that_round_and_are_equally_fast_the_one_that_is_less_off_wins():
    errors = {"dense_linear_int8": 0.02, "dense_linear_int8_int16": 0.005}
    near = timed(dense_linear=0.9, dense_linear_int8=0.5, dense_linear_int8_int16=0.51)
    assert choose_kernel(ALL, near, errors.get, 0.03)[0] == "dense_linear_int8_int16"
    apart = timed(dense_linear=0.9, dense_linear_int8=0.5, dense_linear_int8_int16=0.6)
    assert choose_kernel(ALL, apart, errors.get, 0.03)[0] == "dense_linear_int8"
    assert choose_kernel(ALL, apart, errors.get, 0.01)[0] == "dense_linear_int8_int16"


def test_the_error_of_inputs_of_16_bits_is_an_eighth_of_that_of_8_bits_where_a_channel_is_large():
    module = torch.nn.Linear(256, 64, bias=False)
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 100
    module.weight.data[:, 3] *= 0.01
    off = choice.KernelTrial("up", module, x).relative_output_error
    assert off("sparse_linear_int8") == off("dense_linear_int8") > 8 * off("dense_linear_int8_int16") > 0


def test_no_kernel_is_packed_that_is_slower_than_the_one_that_wins():
    times = timed(
        dense_linear=0.5, sparse_linear=0.4, dense_linear_int8=0.1, sparse_linear_int8=0.2, dense_linear_int4=0.3
    )
    asked = []

    def error(kernel):
        asked.append(kernel)
        return 0.08 if kernel == "dense_linear_int8" else 0.01

    assert choose_kernel(ALL, times, error, 0.03)[0] == "sparse_linear_int8"
    assert asked == ["dense_linear_int8", "sparse_linear_int8"]


def test_of_two_that_are_as_fast_the_coarser_grid_is_not_tried():
    asked = []

    def error(kernel):
        asked.append(kernel)
        return 0.01

    times = timed(sparse_linear_int8=0.2, dense_linear_int4=0.205)
    assert choose_kernel(ALL, times, error, 0.03)[0] == "sparse_linear_int8"
    assert asked == ["sparse_linear_int8"]


def test_int8_that_is_too_far_off_is_left_out_and_named():
    times = timed(dense_linear=0.5, sparse_linear_int8=0.2)
    kernel, why = choose_kernel(ALL, times, {"sparse_linear_int8": 0.08}.get, 0.03)
    assert kernel == "dense_linear" and "sparse_int8 would be off by 8.0% of its outputs" in why


def test_int4_is_judged_by_an_error_of_its_own():
    times = timed(dense_linear=0.5, dense_linear_int8=0.3, dense_linear_int4=0.2)
    errors = {"dense_linear_int8": 0.01, "dense_linear_int4": 0.1}
    kernel, why = choose_kernel(ALL, times, errors.get, 0.03)
    assert kernel == "dense_linear_int8" and "dense_int4 would be off by 10.0% of its outputs" in why
    assert choose_kernel(ALL, times, errors.get, 0.2)[0] == "dense_linear_int4"


def test_ratios_are_against_torchs_strongest_too():
    times = {
        "torch": 8.0,
        "torch pre-packed": 4.0,
        "torch int8 dynamic": 2.0,
        "dense_linear": 3.0,
        "sparse_linear": 1.0,
    }
    found = KernelChoice(SITE, "sparse_linear", "", 10, None, times).to_json()
    assert found["faster_than"] == {"torch": 8, "torch pre-packed": 4, "torch int8 dynamic": 2, "dense_linear": 3}


def test_zero_blocks_are_counted_by_16_outputs_and_2_inputs():
    weight = torch.ones(33, 5)
    weight[:16, 2:4] = 0
    weight[32:, 4:] = 0
    assert zero_block_share(weight) == pytest.approx(2 / 9)
