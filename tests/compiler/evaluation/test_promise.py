"""A pass that promises to keep outputs is held to it on every shape, padded and decoding, not on one batch."""

import pytest
import torch
from effc.compiler.evaluation.promise import OutputPromise
from effc.compiler.ir.capture.capture import capture
from effc.compiler.plugin.interfaces import Close
from effc.compiler.transforms.editing.rewrite import Rewriter
from torch import nn

from tests import tiny
from tests.worlds import refused

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "where",
    [
        lambda x: x.shape[0] == 2 and x.shape[1] == 1,
        lambda x: x.shape[:2] == (3, 11),
        lambda x: x.shape[0] == 1,
        lambda x: x.shape[:2] == (2, 7),
    ],
    ids=["decoding", "another shape", "a single token", "shape of capture"],
)
def test_outputs_that_change_in_one_situation_only_break_the_promise(where):
    program = capture(tiny.model("llama"))
    promise = OutputPromise.of(program)
    promise.check(program, Close(atol=0.0))
    program.model.model.layers[1].register_forward_hook(lambda _, args, out: out * 1.01 if where(out) else out)
    reject = refused(lambda: promise.check(program, Close(atol=1e-4)))
    assert reject.diagnostics[0].slug == "promise-broken" and reject.exit == 1


def test_an_edit_within_its_tolerance_keeps_the_promise():
    program = capture(tiny.model("gpt2"))
    promise = OutputPromise.of(program)
    with torch.no_grad():
        for block in program.model.transformer.h:
            block.mlp.c_proj.weight[::2] = 0
    changed = refused(lambda: promise.check(program, Close(atol=1e-4)))
    assert "the pass promises at most 0.0001" in changed.diagnostics[0].message
    promise = OutputPromise.of(program)
    with Rewriter(program) as rewrite:
        for path in program.units:
            keep = range(1, 96, 2)
            for name, axis in (("c_fc.weight", 1), ("c_fc.bias", 0), ("c_proj.weight", 0)):
                rewrite.narrow(f"{path}.mlp.{name}", axis, keep)
    promise.check(program, Close(atol=1e-4))  # the sums leave zeros out


def test_outputs_that_are_no_numbers_break_the_promise():
    program = capture(tiny.model("llama"))
    promise = OutputPromise.of(program)
    with torch.no_grad():
        program.model.lm_head.weight[3, 3] = torch.nan
    assert refused(lambda: promise.check(program, Close(atol=1e9))).diagnostics[0].slug == "promise-broken"


def test_a_module_of_the_user_s_own_is_held_to_its_promise_on_its_inputs():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return (x,)

    program = capture(Tower(), inputs={"x": torch.ones(2, 3, 8)})
    promise = OutputPromise.of(program)
    promise.check(program, Close(atol=0.0))
    with torch.no_grad():
        program.model.layers[0][0].bias += 1
    assert refused(lambda: promise.check(program, Close(atol=1e-4))).diagnostics[0].slug == "promise-broken"


def test_the_model_is_as_it_was_after_a_check():
    model = tiny.model("llama").train()
    program = capture(model)
    OutputPromise.of(program).check(program, Close(atol=0.0))
    assert all(module.training for module in model.modules())
