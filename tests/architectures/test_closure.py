"""The closure rule: a model without some items computes what it computes when nobody hears them.

For any choice of channels, heads and KV heads of any groups at once: the sliced model equals the one whose readers of
these items are zero. Logits are of size 1 to 50 in float32, and slicing changes the order of sums, hence 3e-4 of the
largest.
"""

import copy
import functools
import json
import random

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.core.architectures import FILE
from effc.compiler.evaluation import equivalence
from effc.compiler.ir.capture.capture import capture, full_model_unit
from effc.compiler.ir.program import Program
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.compiler.transforms.search.widths import slice_groups
from effc.dsl.checker.skeleton import Group
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.architectures import table

torch.set_num_threads(1)
KINDS = {  # one architecture for each way in which groups lie
    "fused and grouped query": "fused qkv",
    "concatenated, depthwise and grouped convolutions": "skip and concat",
    "batch norms and coupled residuals": "resnet",
    "inverted residuals": "mobilenet_v2",
    "packed experts": "mixtral",
    "interleaved": "gpt_neox",
    "two inputs": "two towers",
    "one block three times": "shared block",
    "pixels": "vit",
    "post-norm": "bert",
    "one bias of constants for several layers": "t5",
}
SHARE = 3e-4
ROWS = json.loads(FILE.read_text(encoding="utf-8"))["rows"]  # test_matrix.py holds them to what runs
CAPTURED = [name for name in table.NAMES if ROWS[name]["capture"][0] == "green"]


@functools.cache
def captured(name: str) -> Program:
    return capture(table.model(name))


def chosen(groups: list[Group], seed: int) -> list[tuple[Group, set[int]]]:
    """Some groups and some of their items, never all; of query and KV heads of a module only one kind."""
    rng = random.Random(seed)
    cuts, sites = [], set()
    for group in rng.sample(groups, min(len(groups), 4)):
        if group.count < 2 or (group.kind != "channels" and group.site in sites):
            continue
        sites |= {group.site} if group.kind != "channels" else set()
        block = group.per_block or group.count
        step = 4 if "experts" in group.members[0].tensor else 1  # as their grouped product wants it
        gone = step * rng.randint(1, block // step - 1) if block > step else 0
        items = {start + i for start in range(0, group.count, block) for i in rng.sample(range(block), gone)}
        cuts += [(group, items)] if items else []
    return cuts


def timeouts(model: nn.Module, group: Group, items: set[int]) -> None:
    for member in group.members[-group.readers :]:
        lost = torch.tensor([i for item in items for i in member.indices(item)])
        with torch.no_grad():
            model.get_parameter(member.tensor).index_fill_(member.axis, lost, 0.0)


def check(name: str, seed: int) -> None:
    apart = ("experts", "ssm_heads", "ssm_channels", "ssm_state")  # other ways to mask them: tests/passes
    cuts = chosen([g for g in skeleton_of(captured(name)).groups if g.count > 1 and g.kind not in apart], seed)
    silenced, program = copy.deepcopy(captured(name).model), copy.deepcopy(captured(name))
    for group, items in cuts:
        timeouts(silenced, group, items)
    with Rewriter(program) as rewrite:
        slice_groups(program, rewrite, cuts)
    expected, found = (
        equivalence.record_logits_of_sample_calls(silenced),
        equivalence.record_logits_of_sample_calls(program.model),
    )
    largest = max(float(x.abs().max()) for x in expected)
    assert equivalence.max_difference(expected, found) <= SHARE * max(1.0, largest)


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6))
@pytest.mark.slow
def test_a_sliced_model_is_the_one_that_hears_nothing_of_what_went(name, seed):
    check(name, seed)


@pytest.mark.heavy
@pytest.mark.parametrize("name", [n for n in CAPTURED if n not in KINDS.values()])
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_so_it_is_of_every_architecture(name, seed):
    check(name, seed)


class Mixed(nn.Module):
    """Channels between two modules that meet a matrix of the layer's own, and a bias that has a row per channel."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(12, 8)
        self.mix, self.shift = nn.Parameter(torch.randn(16, 12)), nn.Parameter(torch.randn(1, 12))

    def forward(self, x):
        return x + self.down((self.up(x).relu() @ self.mix + self.shift).tanh())


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Mixed(), Mixed()])
        self.dummy_inputs = {"x": torch.randn(2, 3, 8)}

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_matrix_that_is_read_directly_has_rows_and_columns():
    program = capture(Stack().eval())
    first = [g for g in skeleton_of(program).groups if g.members[0].tensor.startswith("layers.0")]
    assert [[(m.tensor, m.axis) for m in g.members] for g in first] == [
        [("layers.0.up.weight", 0), ("layers.0.up.bias", 0), ("layers.0.mix", 0)],
        [("layers.0.mix", 1), ("layers.0.shift", 1), ("layers.0.down.weight", 1)],
    ]
    assert len({(g.site, g.kind) for g in skeleton_of(program).groups}) == 4, "each has a site of its own"


def test_experts_of_a_width_that_torch_cannot_multiply_are_refused_before_anything_is_cut():
    program = copy.deepcopy(captured("mixtral"))
    group = next(g for g in skeleton_of(program).groups if g.kind == "channels")
    with pytest.raises(Reject) as refused, Rewriter(program) as rewrite:
        slice_groups(program, rewrite, [(group, {0})])
    assert refused.value.diagnostics[0].slug == "odd-experts"
    assert sum(p.numel() for p in program.model.parameters()) == sum(
        p.numel() for p in captured("mixtral").model.parameters()
    )


class SamePadding(nn.Conv2d):
    """A convolution that pads in a way of its own."""

    def forward(self, x):
        x = nn.functional.pad(x, (1, 1, 0, 2))
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.deep = SamePadding(3, 12, 3), SamePadding(12, 12, 3, groups=12)
        self.last = SamePadding(12, 5, 3, bias=False)
        self.dummy_inputs = {"x": torch.randn(2, 3, 8, 8)}

    def forward(self, x):
        return self.last(self.deep(self.first(x)).relu())


def test_a_layer_that_is_a_torch_layer_but_for_its_forward_is_looked_into():
    program = capture(Padded().eval())
    silenced = copy.deepcopy(program.model)
    (group,) = skeleton_of(program).groups
    assert {(m.tensor, m.axis) for m in group.members} == {
        ("first.weight", 0),
        ("first.bias", 0),
        ("deep.weight", 0),
        ("deep.bias", 0),
        ("last.weight", 1),
    }
    timeouts(silenced, group, {1, 7})
    with Rewriter(program) as rewrite:
        slice_groups(program, rewrite, [(group, {1, 7})])
    assert (
        equivalence.max_difference(
            equivalence.record_logits_of_sample_calls(silenced),
            equivalence.record_logits_of_sample_calls(program.model),
        )
        <= SHARE
    )


def test_a_net_that_returns_a_tensor_has_one_graph_of_all_its_layers():
    assert any(node.op == "output" for node in full_model_unit(capture(Stack())).graph.nodes)


def test_layers_that_share_a_table_of_biases_have_their_heads_in_one_group():
    groups = skeleton_of(captured("t5 encoder")).groups
    assert len({(g.kind, g.per_block, g.members) for g in groups}) == len(groups)
