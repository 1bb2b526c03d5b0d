"""Decoding of mixers that lost their scan: their projections and convolution on kernels, outputs as before."""

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.layers.fast_mixers import remove_mixer_kernels, use_mixer_kernels
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.compiler.transforms.editing.scan_removal import drop_scan
from effc.kernels.causal_conv_step import CausalConvStep
from effc.kernels.row_product import RowProduct

from tests import mixers
from tests.passes.test_cpu_scan import generated


def without_first_scan(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model whose first mixer has no scan, and that mixer."""
    program = capture(mixers.model(name))
    scan = skeleton_of(program).scans[0]
    with Rewriter(program) as rewrite:
        drop_scan(program, rewrite, scan)
    return program.model, program.model.get_submodule(scan.site)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "bamba"])
def test_a_mixer_without_a_scan_decodes_on_kernels(name, monkeypatch):
    model, mixer = without_first_scan(name)
    before = generated(model)
    calls = {RowProduct: set(), CausalConvStep: set()}
    for kernel in calls:

        def native(x, *args, kernel=kernel, inner=kernel.native):
            calls[kernel].update(id(each) for each in args if each is not None)
            return inner(x, *args)

        monkeypatch.setattr(kernel, "native", native)
    use_mixer_kernels(model)
    after = generated(model)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(after.sequences, before.sequences)
    assert {id(mixer.in_proj.weight), id(mixer.out_proj.weight)} <= calls[RowProduct]
    assert id(mixer.conv1d.bias) in calls[CausalConvStep]


def test_projections_keep_gradients_hooks_and_the_way_back():
    model, mixer = without_first_scan("mamba2")
    before = generated(model).logits
    seen = []
    use_mixer_kernels(model)
    mixer.in_proj.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    generated(model)
    assert len(seen) == 6
    with torch.enable_grad():
        model(torch.tensor([[5]])).logits.sum().backward()
    assert mixer.in_proj.weight.grad is not None
    remove_mixer_kernels(model)
    assert not any("forward" in vars(child) for child in mixer.children())
    assert all(map(torch.equal, before, generated(model).logits))
