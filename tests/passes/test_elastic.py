"""supernet.elastic: widths and depth that may be chosen, how a choice runs, and the smaller model that it is."""

import copy
import itertools
import json

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning import shrink
from effc.compiler.artifacts.stock import stock_config
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.supernet.choices import ChoiceSampler, Space
from effc.compiler.transforms.supernet.elastic_dims import (
    depth_dims,
    items_least_important_first,
    maskable_groups,
    narrowable_groups,
    width_dims,
)
from effc.compiler.transforms.supernet.family import Family
from effc.compiler.transforms.supernet.subnet_masks import removed_items
from effc.dsl.checker.values import Ratio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.passes.test_heal import loss, rows_of
from tests.passes.test_supernet import ROWS, through
from tests.worlds import refused

SHARES = [Ratio(1.0), Ratio(0.75), Ratio(0.5)]
NET = {"channels": SHARES, "heads": [Ratio(1.0), Ratio(0.5)], "data": ROWS, "steps": 20, "batch": 4, "lr": 3e-3}


def family_of(name, per="layer", depth="layers"):
    """What may be chosen of a tiny model, with nothing trained."""
    program, dims, elastic = capture(tiny.model(name)), [], []
    for kind in ("channels", "heads"):
        groups = narrowable_groups(skeleton_of(program), None, kind)
        groups = maskable_groups(program, groups, width_dims(groups, SHARES, per, 1))
        dims += width_dims(groups, SHARES, per, 1)
        elastic += groups
    if depth != "none":
        dims += depth_dims(program, None, depth)
    return Family(program, "", Space(tuple(dims)), orders=items_least_important_first(program, elastic))


SCANS = ("ssm_heads", "ssm_channels", "ssm_state")


def scan_family(name):
    """What may be chosen of the scans of a tiny model."""
    program, dims, elastic = capture(tiny.model(name)), [], []
    for kind in SCANS:
        groups = narrowable_groups(skeleton_of(program), None, kind)
        groups = maskable_groups(program, groups, width_dims(groups, SHARES, "layer", 1))
        dims += width_dims(groups, SHARES, "layer", 1)
        elastic += groups
    return Family(program, "", Space(tuple(dims)), orders=items_least_important_first(program, elastic))


def alone(family, choice):
    """The smaller program that a choice is; the family stays."""
    fresh = capture(copy.deepcopy(family.program.model))
    return Family(fresh, "", family.space, orders=family.orders).cut_program_to_choice(choice)


@pytest.fixture(scope="module")
def families():
    made = {}

    def get(name, depth="layers"):
        if (name, depth) not in made:
            made[name, depth] = family_of(name, depth=depth)
        return made[name, depth]

    return get


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("bamba", {"ssm_heads", "ssm_state"}),
        ("mamba", {"ssm_channels", "ssm_state"}),
        ("jamba", {"ssm_channels", "ssm_state"}),
    ],
)
@pytest.mark.slow
def test_a_choice_of_scans_computes_masked_what_it_does_cut_out(name, kinds):
    family, ids = scan_family(name), rows_of(3)
    model = family.program.model
    assert {dim.kind for dim in family.space.dims} == kinds
    with torch.no_grad():
        for module in model.modules():  # weights of norms that are not all one, and biases that are not all zero
            for tensor in module.parameters(recurse=False):
                if tensor.dim() == 1:
                    tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(tensor))))
        start = model(ids).logits
        for choice in (family.space.draw(1), family.space.choice("smallest")):
            with family.with_switchable_choice() as take:
                take(family.space.choice("largest"))
                assert torch.equal(model(ids).logits, start)
                take(choice)
                masked = model(ids).logits
            assert torch.equal(model(ids).logits, start)
            assert not torch.allclose(masked, start, atol=1e-3)
            cut = alone(family, choice)
            assert torch.allclose(cut.model(ids).logits, masked, atol=2e-4, rtol=1e-4)
            assert family.smaller_skeleton(choice).parts == skeleton_of(cut).parts


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["llama", "gpt2", "bert", "bamba"]),
    depth=st.sampled_from(["layers", "blocks"]),
    seed=st.integers(0, 99),
)
@example(name="bert", depth="blocks", seed=0)  # one branch's site lies in another's
@pytest.mark.slow
def test_a_choice_computes_masked_what_it_does_cut_out(families, name, depth, seed):
    family, ids = families(name, depth), rows_of(3)
    model, choice = family.program.model, family.space.draw(seed)
    with torch.no_grad():
        start = model(ids).logits
        with family.with_switchable_choice() as take:
            take(family.space.choice("largest"))
            assert torch.equal(model(ids).logits, start)
            take(choice)
            masked = model(ids).logits
        assert torch.equal(model(ids).logits, start)
        cut = alone(family, choice)
        assert torch.allclose(cut.model(ids).logits, masked, atol=2e-4, rtol=1e-4)
    assert shrink.param_count(family.smaller_skeleton(choice)) == sum(p.numel() for p in cut.model.parameters())
    assert family.space.decoded(family.space.genome(choice)) == choice


@pytest.mark.slow
def test_discovery_gives_dials_of_every_kind(families):
    for name in ("llama", "gpt2", "bert", "bamba"):
        kinds = {dim.kind for dim in families(name).space.dims}
        assert kinds >= {"channels", "layers"} and kinds & {"heads", "kv_heads"}, name


@settings(max_examples=20)
@given(seed=st.integers(0, 999))
def test_narrower_choices_are_parts_of_wider_ones(families, seed):
    family = families("llama")
    group = next(g for g in skeleton_of(family.program).groups if g.kind == "channels")
    left = [removed_items(family.orders, group, n) for n in sorted({1 + seed % 95, 1 + seed // 11, 96}, reverse=True)]
    assert left[0] == set() and all(a <= b for a, b in itertools.pairwise(left))


@settings(max_examples=10)
@given(each=st.integers(1, 3), sandwich=st.booleans(), opening=st.integers(0, 30), seed=st.integers(0, 99))
def test_every_choice_is_drawn_and_larger_ones_come_in_first(families, each, sandwich, opening, seed):
    space = families("llama").space
    drawn, seen = ChoiceSampler(space, seed, each, sandwich, opening), {d.name: set() for d in space.dims}
    for step in range(1, 150):
        drawn.draw_and_activate_first(step)
        first = [dict(c) for c in drawn.choices]
        drawn.draw_and_activate_first(step)
        assert drawn.choices == first and len(first) == each + 2 * sandwich
        if sandwich:
            assert first[0] == space.choice("largest") and first[-1] == space.choice("smallest")
        if step == 1 and opening and not sandwich:
            assert all(c[d.name] in d.values[:2] for c in first for d in space.dims)
        for name, value in ((name, value) for c in first for name, value in c.items()):
            seen[name].add(value)
    assert all(seen[d.name] == set(d.values) for d in space.dims)


@pytest.mark.slow
def test_one_width_for_all_layers_is_read_by_plain_transformers(tmp_path):
    family, ids = family_of("llama", per="model"), rows_of(3)
    choice = family.space.choice("smallest")
    cut = alone(family, choice)
    config, why = stock_config(cut.model)
    assert not why, why
    cut.model.config = config
    cut.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, cut.model(ids).logits, atol=1e-5)
    assert shrink.param_count(family.smaller_skeleton(choice)) == sum(p.numel() for p in again.parameters())


@pytest.mark.slow
def test_scans_are_trained_as_choices_of_which_plain_transformers_reads_one(tmp_path):
    model, ids = tiny.model("bamba"), rows_of(3)
    net = {"states": [Ratio(1.0), Ratio(0.5)], "per": "model", "data": ROWS, "steps": 2, "batch": 2, "lr": 3e-3}
    family = through(tmp_path, model, ("supernet.elastic", net))
    choice = family.space.choice("smallest")
    with torch.no_grad():
        with family.with_switchable_choice() as take:
            take(choice)
            masked = family.program.model(ids).logits
        cut = family.cut_program_to_choice(choice)
        assert torch.allclose(cut.model(ids).logits, masked, atol=5e-4, rtol=1e-3)
    config, why = stock_config(cut.model)
    assert not why and config.mamba_d_state == 8


@pytest.mark.slow
@pytest.mark.parametrize("train", ["adapters", "weights"])
def test_training_a_family_makes_small_choices_better(tmp_path, train):
    model = tiny.model("llama")
    args = {**NET, "train": train, "depth": "blocks", "ranks": [8, 4], "sandwich": True, "distill": Ratio(0.5)}
    args = {**args, "ranks": [8]} if train == "weights" else args
    net = through(tmp_path, model, ("supernet.elastic", args))
    bare = through(tmp_path / "bare", model, ("supernet.elastic", {**NET, "depth": "blocks", "steps": 0}))
    choice = net.space.choice("smallest")
    again = Family.from_json_assigning_weights(
        json.loads(json.dumps(net.to_json())), capture(copy.deepcopy(model)), {**net.tensors, **net.weights}
    )
    with net.with_choice_applied(choice):
        small = loss(net.program.model)
    assert len(net.losses) == 60 and all(value > 0 for _, value in net.losses)
    assert small < 0.9 * loss(bare.cut_program_to_choice(bare.space.choice("smallest")).model)
    assert abs(loss(again.cut_program_to_choice(choice).model) - small) < 1e-3 * small


def test_shares_that_can_not_be_are_refused(tmp_path):
    args = {**NET, "channels": [Ratio(1.0), Ratio(0.9999)], "heads": []}
    found = refused(lambda: through(tmp_path, tiny.model("llama"), ("supernet.elastic", args)))
    assert found.diagnostics[0].slug == "one-choice" and "further apart" in found.diagnostics[0].help


@pytest.mark.slow
def test_training_leaves_the_program_as_it_was_and_no_adapters_apart(tmp_path):
    model, ids = tiny.model("llama"), rows_of(3)
    steps = ("supernet.elastic", {**NET, "depth": "blocks", "steps": 2, "ranks": [4]})
    net = through(tmp_path, model, steps)
    with torch.no_grad():
        assert torch.equal(net.program.model(ids).logits, model(ids).logits)
    found = refused(lambda: through(tmp_path / "apart", model, steps, ("supernet.pick", {"merge": False})))
    assert found.diagnostics[0].slug == "smaller-apart"
