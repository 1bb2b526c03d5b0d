"""Modules that are no language model are captured too, where something says what they take."""

import pytest
import torch
from effc.compiler.capture.capture import capture
from effc.dsl.diagnostics import Reject
from torch import nn

from tests.compiler.test_capture import bind


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x)


def test_a_module_without_repeated_layers_is_one_unit():
    model, x = Plain(), torch.randn(3, 8)
    expected = model(x)
    program = capture(model, inputs={"x": torch.ones(2, 8)})
    assert list(program.units) == [""]
    assert torch.equal(bind(program)(x), expected)


def test_a_module_that_says_nothing_of_its_inputs_is_refused():
    with pytest.raises(Reject) as refused:
        capture(Plain())
    assert refused.value.diagnostics[0].slug == "unknown-inputs"
    assert "dummy_inputs" in refused.value.diagnostics[0].help
