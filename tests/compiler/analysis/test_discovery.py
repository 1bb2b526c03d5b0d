"""Structure is found on graphs: branches, groups of channels and heads, and the integers that follow them."""

import copy
import functools
import random

import pytest
import torch
from effc.compiler.analysis.discovery.discover import discover
from effc.compiler.ir.capture.capture import capture
from effc.dsl.checker.skeleton import Group, Skeleton
from torch import nn
from transformers import AutoModelForCausalLM

from tests import tiny

torch.set_num_threads(1)  # many more than there are cores wait for each other
TOKENS = torch.tensor([[5, 17, 99, 3, 64, 21, 8], [11, 2, 7, 90, 33, 101, 54]])


@functools.cache
def skeleton(name: str) -> Skeleton:
    return discover(capture(tiny.model(name)))


def groups(name: str, kind: str, layer: int = 0) -> list[Group]:
    unit = skeleton(name).units[layer]
    return [g for g in skeleton(name).groups if g.kind == kind and g.site.startswith(unit)]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


def index_select(model: nn.Module, path: str, axis: int, keep: list[int]) -> None:
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    kept = module._parameters[name].detach().index_select(axis, torch.tensor(keep))
    module._parameters[name] = nn.Parameter(kept)
    if type(module).__name__ == "Conv1D" and name == "weight":
        module.nx, module.nf = module.weight.shape


def set_integer(model: nn.Module, path: str, attribute: str, value: int) -> None:
    module = model.get_submodule(path)
    if attribute.startswith("config."):
        module.config = copy.copy(module.config)
        setattr(module.config, attribute.removeprefix("config."), value)
    else:
        setattr(module, attribute, value)


def slice_away(model: nn.Module, group: Group, dead: list[int]) -> None:
    """Remove items: slice every member, set every attribute. The rewriter has no part in it."""
    for member in group.members:
        gone = {i for item in dead for i in member.indices(item)}
        size = model.get_parameter(member.tensor).shape[member.axis]
        index_select(model, member.tensor, member.axis, [i for i in range(size) if i not in gone])
    for path, attribute, per in group.attributes:
        value = per * (group.count - len(dead))
        assert value == int(value), f"{path}.{attribute} would be {value}"
        set_integer(model, path, attribute, int(value))


def zero_readers(model: nn.Module, group: Group, dead: list[int]) -> None:
    """The same in the original: what the items say is no longer heard."""
    for member in group.members[-group.readers :]:
        weight = model.get_parameter(member.tensor)
        gone = torch.tensor([i for item in dead for i in member.indices(item)])
        with torch.no_grad():
            weight.index_fill_(member.axis, gone, 0.0)


def some_items(group: Group, seed: int) -> list[int]:
    """Items that may go: of query heads under grouped-query attention one per KV head."""
    rng = random.Random(seed)
    if group.per_block:
        return [first + rng.randrange(group.per_block) for first in range(0, group.count, group.per_block)]
    return sorted(rng.sample(range(group.count), max(1, group.count // 3)))


@pytest.mark.parametrize("kind", ["channels", "heads", "kv_heads"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_removing_items_equals_silencing_them(name, kind):
    found = groups(name, kind)
    if kind == "kv_heads" and not found:
        pytest.skip("every head has keys and values of its own")
    sliced, silenced = tiny.model(name), tiny.model(name)
    before = logits(sliced)
    for seed, group in enumerate(g for layer in (0, 2) for g in groups(name, kind, layer)):
        dead = some_items(group, seed)
        slice_away(sliced, group, dead)
        zero_readers(silenced, group, dead)
    after = logits(sliced)
    assert torch.allclose(after, logits(silenced), atol=2e-4), "float32 in another order, logits up to 50"
    assert (after - before).abs().max() > 1e-2, "the removed items mattered"


@pytest.mark.parametrize("name", tiny.NAMES)
def test_groups_partition_what_they_claim(name):
    shapes = skeleton(name).shapes()
    for group in skeleton(name).groups:
        for member in group.members:
            claimed = [i for item in range(group.count) for i in member.indices(item)]
            assert len(set(claimed)) == len(claimed), f"{member} gives an index to two items"
            assert set(claimed) <= set(range(shapes[member.tensor][member.axis])), f"{member} is out of range"


@pytest.mark.parametrize("name", tiny.NAMES)
def test_groups_of_one_kind_share_no_index(name):
    for kind in ("channels", "heads", "kv_heads"):
        claimed = [
            (m.tensor, m.axis, i)
            for g in skeleton(name).groups
            if g.kind == kind
            for m in g.members
            for item in range(g.count)
            for i in m.indices(item)
        ]
        assert len(set(claimed)) == len(claimed)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_layer_has_attention_and_mlp(name):
    found = skeleton(name)
    for unit in found.units:
        branches = [b for b in found.branches if b.unit == unit]
        assert sorted(b.role for b in branches) == ["attention", "mlp"]
        parts = [path for b in branches for path in b.parts]
        assert len(set(parts)) == len(parts)
        own = {p.path for p in found.parts if p.path.startswith(f"{unit}.")}
        assert set(parts) == own, "all of these layers' modules belong to one branch or the other"


def remove_branch(unit, branch) -> None:
    """Replace the add by its operand that is not the branch."""
    by_name = {node.name: node for node in unit.graph.nodes}
    join, value = by_name[branch.join], by_name[branch.value]
    (other,) = (x for x in join.args if x is not value)
    join.replace_all_uses_with(other)
    assert not join.users and set(value.users) == {join}, "nobody else reads the branch"


@pytest.mark.parametrize("role", ["attention", "mlp"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_removing_a_branch_equals_silencing_its_last_module(name, role):
    silenced = tiny.model(name)
    (branch,) = (b for b in skeleton(name).branches if b.unit == skeleton(name).units[1] and b.role == role)
    program = capture(tiny.model(name))
    for path in list(program.units):  # own graphs, so that one can differ
        unit = program.units[path]
        if path == branch.unit:
            unit.graph = copy.deepcopy(unit.graph)
            remove_branch(unit, branch)
        unit.install_graph_forward(program.model)
    with torch.no_grad():
        for path in branch.parts:
            for parameter in silenced.get_submodule(path).parameters(recurse=False):
                parameter.fill_(-1.0 if name.startswith("gemma") and "norm" in path else 0.0)  # they add one
    assert torch.allclose(logits(program.model), logits(silenced), atol=1e-5)


def test_query_heads_of_a_fused_projection():
    """Phi3 reads sizes from the config in its forward: the layer's own copy of it must follow."""
    (heads,) = groups("phi3", "heads")
    (blocks,) = groups("phi3", "kv_heads")
    assert (heads.count, heads.per_block, blocks.count) == (4, 2, 2)
    fused = next(m for m in blocks.members if m.tensor.endswith("qkv_proj.weight"))
    assert fused.segments == ((0, 32), (64, 16), (96, 16)), "two q heads, a k head and a v head each"
    assert {(name, per) for _, name, per in blocks.attributes} == {
        ("config.num_attention_heads", 2.0),
        ("num_key_value_heads", 1.0),
    }


def test_interleaved_projection():
    (heads,) = groups("gpt_neox", "heads")
    assert heads.members[0].segments == ((0, 48),), "q, k and v rows of a head lie together"
    assert heads.attributes == ()


def test_integers_that_follow():
    expected = {"llama": {"num_key_value_groups"}, "gpt2": {"split_size"}, "opt": {"num_heads"}, "gpt_neox": set()}
    for name, attributes in expected.items():
        (heads,) = groups(name, "heads")
        assert {attribute for _, attribute, _ in heads.attributes} == attributes


def test_norms_over_head_dim_are_shared():
    for name in ("qwen3", "gemma3_text"):
        for kind in ("heads", "kv_heads"):
            (group,) = groups(name, kind)
            assert not any("norm" in m.tensor for m in group.members)


def test_parallel_branches_meet_in_one_add():
    mlp, attention = skeleton("gpt_neox").branches[:2]
    assert (mlp.join, mlp.role, attention.role) == (attention.join, "mlp", "attention")
    assert mlp.value != attention.value


def test_facts_and_ties():
    found = skeleton("gpt2")
    assert found.tied == (("transformer.wte.weight", "lm_head.weight"),)
    assert found.facts == {
        "hidden": 64,
        "layers": 3,
        "layer_class": "GPT2Block",
        "vocab": 128,
        "positions": 128,
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 16,
        "active_experts": None,
        "dtype": "float32",
        "causal_lm": True,
        "refused": [],
    }


@pytest.mark.parametrize("name", tiny.NAMES)
def test_no_weights_are_needed(name):
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny.config(name))
    assert discover(capture(empty)) == skeleton(name)


class Gated(nn.Module):
    """A layer whose MLP is normalised over all its channels: none may go alone."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.norm(self.up(x)).relu())


class Sorted(nn.Module):
    """A layer that puts its channels in an order that depends on them."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.up(x).sort(-1)[0])


class Scaled(nn.Module):
    """A layer with one scale per channel, read outside of a module."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x):
        return x + self.down(self.up(x) * self.scale)


class ScorePairs(nn.Module):
    """A layer whose attention is written out, with two heads of four channels and a literal of its own."""

    def __init__(self, heads=2):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.heads = heads

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (part(x).view(b, t, self.heads, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        weights = (q @ k.transpose(2, 3)).softmax(-1)
        return x + self.o((weights @ v).transpose(1, 2).reshape(b, t, -1))


class Literal(ScorePairs):
    """The same with a number of heads that no attribute gives."""

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (part(x).view(b, t, 2, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        weights = (q @ k.transpose(2, 3)).softmax(-1)
        return x + self.o((weights @ v).transpose(1, 2).reshape(b, t, -1))


class Stack(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layers = nn.ModuleList([layer(), layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return {"logits": x}


def found_in(layer) -> Skeleton:
    return discover(capture(Stack(layer), inputs={"x": torch.randn(2, 3, 8)}))


@pytest.mark.parametrize("layer, said", [(Gated, "norm"), (Sorted, "sort"), (Literal, "fixed number 2")])
def test_what_cannot_be_narrowed_is_said(layer, said):
    found = found_in(layer)
    assert found.groups == ()
    assert {".".join(path.split(".")[:2]) for path, _ in found.facts["refused"]} == {"layers.0", "layers.1"}
    assert all(said in why for _, why in found.facts["refused"])


def test_a_scale_read_directly_belongs_to_the_channels():
    group = found_in(Scaled).groups[0]
    assert (group.kind, group.count, group.site) == ("channels", 16, "layers.0")
    assert [m.tensor for m in group.members] == [
        "layers.0.up.weight",
        "layers.0.up.bias",
        "layers.0.scale",
        "layers.0.down.weight",
    ]


def test_attention_that_is_written_out_has_heads():
    found = found_in(ScorePairs)
    group = found.groups[0]
    assert (group.kind, group.count, group.attributes) == ("heads", 2, (("layers.0", "heads", 1.0),))
    assert [b.role for b in found.branches] == ["attention", "attention"]


def test_layers_may_differ_in_width():
    """Equal programs share a graph though widths differ: what was recorded of one must not be used of all."""
    model = tiny.model("llama")
    for kind in ("kv_heads", "channels"):
        (group,) = groups("llama", kind, layer=1)
        slice_away(model, group, [1])
    found = discover(capture(model))
    assert [g.count for g in found.groups if g.kind == "channels"] == [96, 95, 96]
    assert [g.count for g in found.groups if g.kind == "heads"] == [4, 2, 4]
    assert [g.count for g in found.groups if g.kind == "kv_heads"] == [2, 1, 2]
    assert found.facts["refused"] == []
