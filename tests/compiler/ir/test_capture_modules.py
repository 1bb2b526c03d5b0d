"""Modules that are no language model are captured too, where something says what they take."""

import pytest
import torch
import transformers
from effc.compiler.ir.capture.capture import capture
from effc.dsl.syntax.diagnostics import Reject
from torch import nn

from tests.compiler.ir.test_capture import bind


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


def test_a_model_whose_config_states_no_vocabulary_is_refused():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.CanineModel(transformers.CanineConfig(**sizes, num_hash_buckets=64))
    model.config.num_hash_buckets = 0
    with pytest.raises(Reject, match="the config of CanineModel states no `vocab_size`") as refused:
        capture(model)
    assert refused.value.diagnostics[0].slug == "unknown-inputs"
