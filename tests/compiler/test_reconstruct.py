"""What readers do about channels that go: least squares, on the device of the weights, solved once."""

import pytest
import torch
from effc.compiler import importance
from effc.compiler.capture import capture
from effc.compiler.reconstruct import Moments, Reconstruction, readers, repaired, silenced
from effc.compiler.rehearsal import weightless
from effc.dsl.diagnostics import Reject
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests import tiny

IDS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(2))


def read(program, folder, ids=IDS):
    """Moments of what all readers of channels and heads are given."""
    moments = Moments(folder)
    modules = [m.tensor.rpartition(".")[0] for g in program.skeleton.groups for m in readers(g)]
    with torch.no_grad():
        moments.collect(program, modules, lambda: program.model(ids, use_cache=False), 1 << 30)
    return moments


class OneDevice(TorchDispatchMode):
    """Refuses an operation on tensors of two devices; one number may come from anywhere."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
            assert len({t.device.type for t in tensors}) <= 1, f"{func} on {[t.device.type for t in tensors]}"
        return func(*args, **kwargs)


class Real(Moments):
    """Moments that are read as they are where everything else is only shapes."""

    def of(self, module):
        with _disable_current_modes():
            return super().of(module)

    def norms(self, module):
        with _disable_current_modes():
            return super().norms(module)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_everything_is_computed_on_the_device_of_the_weights(tmp_path, name):
    program = capture(tiny.model(name))
    groups = program.skeleton.groups
    read(program, tmp_path)
    moments = Real(tmp_path)
    there = weightless(program)                  # the meta device stands for one: it is not the CPU
    with FakeTensorMode(allow_non_fake_inputs=True), OneDevice():
        for group in groups:
            for ranking in (importance.l1(there, group), importance.wanda(there, group, moments),
                            importance.obs(there, group, moments)):
                assert ranking.device.type == "cpu" and ranking.shape == (group.count,)
            for weights in (silenced(there.model, group, [1]),
                            Reconstruction(there, moments).without(group, {0}, [1])):
                assert {w.device.type for w in weights.values()} == {"meta"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_inputs_that_are_not_finite_are_refused_by_module(tmp_path, value):
    program = capture(tiny.model("llama"))
    with torch.no_grad():
        program.model.model.layers[1].mlp.up_proj.weight[5] = value            # 1e30: its square is infinite
    with pytest.raises(Reject) as refused:
        read(program, tmp_path)
    found = refused.value.diagnostics[0]
    assert found.fault.slug == "not-a-number"
    assert "model.layers.1.mlp.down_proj" in found.message and found.help
    with pytest.raises(Reject):                                  # a run that goes on does not take what is there
        read(program, tmp_path)


def test_inputs_that_depend_on_each_other_are_solved_with_more_damping():
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    moment = (x.T @ x)                                          # rank 3, and rounding makes it indefinite
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(moment.double())
    new = repaired(torch.ones(2, 40), moment, [], [0, 1], 0.0)
    assert new.isfinite().all() and not new[:, :2].any()


def test_items_that_depend_on_each_other_are_ranked(tmp_path):
    program = capture(tiny.model("llama"))
    moments = read(program, tmp_path, IDS[:1, :3])              # 3 tokens, 96 channels
    scores = importance.obs(program, program.skeleton.groups[0], moments, damping=0.0)
    assert scores.isfinite().all()
