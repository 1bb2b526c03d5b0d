"""A skeleton survives JSON and its shelf, and forecasts on it come true when the rewriter cuts."""

import functools
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from effc.compiler.analysis.discovery.bypass import other_operand_of_join
from effc.compiler.analysis.discovery.discover import discover, skeleton_of
from effc.compiler.analysis.planning import shrink, skeleton_store
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.dsl.checker.skeleton import Group, Member, Part, Skeleton
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.grids import wide

torch.set_num_threads(1)


@functools.cache
def skeleton(name: str) -> Skeleton:
    return discover(capture(tiny.model(name)))


def keeping(group: Group, seed: int) -> int:
    """A count the group may be narrowed to."""
    step = group.count // group.per_block if group.per_block else 1
    return step * (1 + seed % (group.count // step))


def cut(program, group: Group, count: int) -> None:
    """Keep the first items; of query heads the first ones of every KV head."""
    block = group.per_block or group.count
    kept = count * block // group.count
    dead = [i for i in range(group.count) if i % block >= kept]
    with Rewriter(program) as rewrite:
        for member in group.members:
            gone = {i for item in dead for i in member.indices(item)}
            size = program.model.get_parameter(member.tensor).shape[member.axis]
            rewrite.narrow(member.tensor, member.axis, [i for i in range(size) if i not in gone])
        for path, name, per in group.attributes:
            rewrite.set_attr(f"{path}.{name}", round(per * count))


names = st.sampled_from(tiny.NAMES)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_json_gives_the_same_skeleton_back(name):
    assert Skeleton.from_json(json.loads(json.dumps(skeleton(name).to_json()))) == skeleton(name)


@pytest.mark.parametrize("name", wide(tiny.NAMES, tiny.STAND))
def test_narrowing_on_paper_is_what_discovery_finds_afterwards(name):
    for kind in ("channels", "heads", "kv_heads"):
        program = capture(tiny.model(name))
        group = next((g for g in skeleton(name).groups if g.kind == kind), None)
        if group:
            count = group.count // 2
            cut(program, group, count)
            assert skeleton_of(program) == shrink.with_narrowed_group(skeleton(name), group, count)


def test_query_heads_and_kv_groups_narrow_in_either_order():
    for order in (("heads", "kv_heads"), ("kv_heads", "heads")):
        program = capture(tiny.model("phi3", num_attention_heads=16, num_key_value_heads=4))
        paper = skeleton_of(program)
        for kind in order:
            group = next(g for g in paper.groups if g.kind == kind)
            assert group in skeleton_of(program).groups
            cut(program, group, group.count // 2)
            paper = shrink.with_narrowed_group(paper, group, group.count // 2)
            assert skeleton_of(program) == paper


@pytest.mark.parametrize("name", wide(tiny.NAMES, tiny.STAND))
def test_dropping_a_layer_on_paper_is_what_discovery_finds_afterwards(name):
    program = capture(tiny.model(name))
    unit = skeleton(name).units[1]
    with Rewriter(program) as rewrite:
        rewrite.drop_layer(unit)
    assert skeleton_of(program) == shrink.without_unit(skeleton(name), unit)


@pytest.mark.parametrize("role", ["attention", "mlp"])
@pytest.mark.parametrize("name", wide(tiny.NAMES, tiny.STAND))
def test_dropping_a_branch_on_paper_is_what_discovery_finds_afterwards(name, role):
    program = capture(tiny.model(name))
    branch = next(b for b in skeleton(name).branches if b.unit == skeleton(name).units[1] and b.role == role)
    with Rewriter(program) as rewrite:
        rewrite.drop_branch(
            branch.unit, branch.join, keep=other_operand_of_join(program.units[branch.unit].graph, branch)
        )
    paper, found = shrink.without_branch(skeleton(name), branch), skeleton_of(program)
    assert nodes_apart(found) == nodes_apart(paper)


def nodes_apart(s: Skeleton) -> Skeleton:
    """Without names of graph nodes: an edited graph may number its nodes anew."""
    return replace(s, branches=tuple(replace(b, join="", value="") for b in s.branches))


@settings(deadline=None, max_examples=50)  # the first example captures a model
@given(name=names, seed=st.integers(0, 999), data=st.data())
def test_narrowing_loses_exactly_the_members_shares(name, seed, data):
    before = skeleton(name)
    group = data.draw(st.sampled_from(before.groups))
    count = keeping(group, seed)
    after = shrink.with_narrowed_group(before, group, count)
    lost = 0
    for member in group.members:
        shape = before.shapes()[member.tensor]
        across = 1
        for axis, n in enumerate(shape):
            across *= 1 if axis == member.axis else n
        lost += (group.count - count) * sum(size for _, size in member.segments) * across
    assert shrink.param_count(before) - shrink.param_count(after) == lost
    assert shrink.param_bytes(after) == 4 * shrink.param_count(after)
    for other in after.groups:
        for member in other.members:
            claimed = [i for item in range(other.count) for i in member.indices(item)]
            assert len(set(claimed)) == len(claimed)
            assert max(claimed) < after.shapes()[member.tensor][member.axis]


@settings(deadline=None, max_examples=50)  # the first example captures a model
@given(name=names, seed=st.integers(0, 99), data=st.data())
def test_narrowing_costs_no_more(name, seed, data):
    before = skeleton(name)
    group = data.draw(st.sampled_from(before.groups))
    after = shrink.with_narrowed_group(before, group, keeping(group, seed))
    assert shrink.flops_per_token(after, 512) <= shrink.flops_per_token(before, 512)


@settings(deadline=None, max_examples=50)  # the first example captures a model
@given(names)
def test_layers_can_go_one_by_one(name):
    left = skeleton(name)
    sizes = [shrink.param_count(left)]
    while left.units:
        left = shrink.without_unit(left, left.units[0])
        sizes.append(shrink.param_count(left))
    assert sizes == sorted(sizes, reverse=True)
    assert not left.groups and not left.branches and left.facts["layers"] == 0


def test_operations_are_counted_by_hand():
    """Llama: q and o 64x64, k and v 32x64, three times 96x64 per layer; head 128x64; 64 channels attended."""
    weights = 3 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 96 * 64) + 128 * 64
    assert shrink.flops_per_token(skeleton("llama"), 100) == 2 * weights + 3 * 4 * 100 * 64
    tied = 3 * (64 * 64 * 4 + 2 * 96 * 64) + 128 * 64
    assert shrink.flops_per_token(skeleton("gpt2"), 0) == 2 * tied


def test_tied_tensors_count_once():
    parts = (Part("a", "Embedding", (("weight", (5, 2)),)), Part("b", "Linear", (("weight", (5, 2)),)))
    tied = Skeleton("x", parts, (), tied=(("a.weight", "b.weight"),))
    assert shrink.param_count(tied) == 10
    assert shrink.flops_per_token(tied, 9) == 20, "the output head multiplies, the embedding is looked up"


def test_groups_that_share_a_fused_tensor_move_together():
    """One matrix writes the channels of two groups: the second segment starts earlier afterwards."""
    parts = (
        Part("in", "Linear", (("weight", (10, 4)),)),
        Part("x", "Linear", (("weight", (4, 6)),)),
        Part("y", "Linear", (("weight", (4, 4)),)),
    )
    first = Group("", "channels", 6, (Member("in.weight", 0, ((0, 1),)), Member("x.weight", 1, ((0, 1),))))
    second = Group("", "channels", 4, (Member("in.weight", 0, ((6, 1),)), Member("y.weight", 1, ((0, 1),))))
    after = shrink.with_narrowed_group(Skeleton("x", parts, (), groups=(first, second)), first, 2)
    assert after.groups[1].members[0].segments == ((2, 1),)
    assert after.shapes() == {"in.weight": (6, 4), "x.weight": (4, 2), "y.weight": (4, 4)}


def test_the_shelf_gives_back_what_it_was_given(tmp_path):
    key = skeleton_store.skeleton_key({"hidden_size": 64}, "5.0")
    assert skeleton_store.load_skeleton(tmp_path, key) is None
    skeleton_store.store_skeleton(tmp_path, key, skeleton("llama"))
    assert skeleton_store.load_skeleton(tmp_path, key) == skeleton("llama")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99}', "\x00\xff"])
def test_a_damaged_file_is_no_skeleton(tmp_path, text):
    (tmp_path / "k.json").write_bytes(text.encode("latin-1"))
    assert skeleton_store.load_skeleton(tmp_path, "k") is None


def test_the_key_follows_config_and_library():
    key = skeleton_store.skeleton_key({"a": 1, "b": [2]}, "5.0")
    assert key == skeleton_store.skeleton_key({"b": [2], "a": 1}, "5.0")
    assert key != skeleton_store.skeleton_key({"a": 2, "b": [2]}, "5.0")
    assert key != skeleton_store.skeleton_key({"a": 1, "b": [2]}, "5.1")


def test_forecasts_need_no_torch():
    code = "import sys; from effc.compiler.analysis.planning import drawing, shrink, skeleton_store; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
