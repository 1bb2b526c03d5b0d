"""Forms of code that some releases of transformers have and others not, and that leave no trace in a graph."""

import pytest
import torch
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.layers.hub_kernels import unwrap_kernel_module
from torch import nn
from transformers import integrations

from tests.compiler.ir.test_capture import bind


class SplitBehindTheLast(nn.Module):
    """A layer that keeps the last `kept` rows apart, as scans do whose states are recorded."""

    def __init__(self, kept=0):
        super().__init__()
        self.inner, self.kept = nn.Linear(8, 8), kept

    def forward(self, x):
        first, last = torch.tensor_split(x, [x.shape[1] - self.kept], dim=1)
        return self.inner(first), last


def calls(program):
    return [node.target for node in program.units[""].graph.nodes if node.op.startswith("call_f")]


def test_a_split_behind_the_last_position_is_no_operation():
    model, x = SplitBehindTheLast(), torch.randn(2, 5, 8)
    expected = model(x)
    program = capture(model, inputs={"x": torch.ones(2, 3, 8)})
    assert torch.tensor_split not in calls(program)
    first, last = bind(program)(x)
    assert torch.equal(first, expected[0]) and last.shape == (2, 0, 8)


def test_a_split_before_the_last_position_stays():
    model, x = SplitBehindTheLast(2), torch.randn(2, 5, 8)
    expected = model(x)
    program = capture(model, inputs={"x": torch.ones(2, 3, 8)})
    assert torch.tensor_split in calls(program)
    for actual, part in zip(bind(program)(x), expected, strict=True):
        assert torch.equal(actual, part)


@pytest.mark.skipif(not integrations.hub_kernels.is_kernels_available(), reason="needs the package kernels")
def test_a_function_that_a_kernel_may_replace_is_read_as_it_is_written():
    def causal_conv1d_fn(x):
        return x

    decorate = integrations.use_kernel_func_from_hub_with_fallback("causal_conv1d_fn", "causal_conv1d")
    wrapped = decorate(causal_conv1d_fn)
    assert isinstance(wrapped, nn.Module)
    assert unwrap_kernel_module(wrapped).__wrapped__ is causal_conv1d_fn


@pytest.mark.parametrize("value", [None, len, nn.Linear(2, 2), nn.Linear])
def test_anything_else_is_not_unwrapped(value):
    assert unwrap_kernel_module(value) is value
