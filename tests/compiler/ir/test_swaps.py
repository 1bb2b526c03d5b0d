"""A module that a pass puts in another's place comes back with the stored edits."""

import copy

import pytest
import torch
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.layers import swap_table
from effc.compiler.transforms.editing.rewrite import Rewriter
from torch import nn

from tests import tiny
from tests.compiler.transforms.test_rewrite import ROUNDING, rebuilt
from tests.equivalence import max_logit_difference


class Scaled(nn.Module):
    """A linear layer that keeps its weight at half its size: what a pass may put in place of a Linear."""

    def __init__(self, outputs, inputs, device=None):
        super().__init__()
        self.stored = nn.Parameter(torch.empty(outputs, inputs, device=device))

    def spec(self):
        return {"outputs": self.stored.shape[0], "inputs": self.stored.shape[1]}

    @classmethod
    def from_spec(cls, old, spec):
        return cls(spec["outputs"], spec["inputs"], old.weight.device)

    def forward(self, x):
        return nn.functional.linear(x, self.stored * 2)


@pytest.fixture
def swappable(monkeypatch):
    """`Scaled`, as if effc's table of classes had it."""
    monkeypatch.setitem(swap_table.CLASSES, "Scaled", Scaled)
    return Scaled


def test_a_module_that_was_put_in_is_a_leaf_and_comes_back(swappable):
    model = tiny.model("llama")
    reference = copy.deepcopy(model)
    program = capture(model)
    path = "model.layers.1.mlp.down_proj"
    old = model.get_submodule(path)
    with Rewriter(program) as rewrite:
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            rewrite.narrow(f"model.layers.1.mlp.{name}.weight", axis, range(80))
        new = swappable(64, 80)
        new.stored.data = old.weight.detach() / 2
        rewrite.swap_module(path, new)
    with torch.no_grad():
        reference.get_submodule(path).weight[:, 80:].zero_()
    assert max_logit_difference(reference, model) < ROUNDING
    targets = [node.target for node in program.units["model.layers.1"].graph.nodes]
    assert "mlp.down_proj" in targets
    assert path not in {p.removesuffix(".weight") for p in program.edits.shapes}
    assert max_logit_difference(model, rebuilt(program, "llama")) == 0.0


def test_a_module_that_no_stored_artifact_could_name_is_not_put_in():
    program = capture(tiny.model("llama"))
    with pytest.raises(AssertionError, match="a stored artifact could not name it"):
        Rewriter(program).swap_module("model.layers.0.mlp.down_proj", Scaled(64, 96))
