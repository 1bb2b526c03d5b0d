"""supernet.elastic: how many experts of a layer may be chosen, and that their router follows."""

import copy

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning import shrink
from effc.compiler.artifacts.stock import stock_config
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.search.routing import sum_router_weights
from effc.compiler.transforms.supernet.choices import BLOCKS, Space
from effc.compiler.transforms.supernet.elastic_dims import (
    depth_dims,
    items_least_important_first,
    maskable_groups,
    narrowable_groups,
    width_dims,
)
from effc.compiler.transforms.supernet.family import Family
from effc.compiler.transforms.supernet.form_checks import assert_family_fits_program
from effc.compiler.transforms.supernet.subnet_masks import removed_items
from effc.dsl.checker.values import Ratio
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.architectures import table
from tests.grids import wide
from tests.passes.test_elastic import alone
from tests.passes.test_heal import rows_of
from tests.passes.test_supernet import ROWS, through
from tests.recipes_in_memory import context_of, recipe_of
from tests.worlds import refused

torch.set_num_threads(1)
SHARES = [Ratio(1.0), Ratio(0.75), Ratio(0.5)]
NAMES = ("mixtral", "qwen3_moe", "gpt_oss", "jamba", "deepseek_v3", "lfm2_moe", "phimoe", "granitemoehybrid")


def family_of(name, depth="none"):
    """A tiny model's experts as choices, beside its branches."""
    program = capture(table.model(name))
    groups = narrowable_groups(skeleton_of(program), None, "experts")
    groups = maskable_groups(program, groups, width_dims(groups, SHARES, "layer", 1))
    dims = width_dims(groups, SHARES, "layer", 1)
    if depth != "none":
        dims += depth_dims(program, None, depth)
    return Family(program, "", Space(tuple(dims)), orders=items_least_important_first(program, groups))


@pytest.mark.parametrize("name", wide(NAMES, {"mixtral", "gpt_oss", "deepseek_v3", "lfm2_moe"}))
@pytest.mark.slow
def test_a_choice_of_experts_computes_masked_what_it_does_cut_out(name):
    family, ids = family_of(name, BLOCKS), rows_of(3)
    model, before = family.program.model, {}
    assert {dim.kind for dim in family.space.dims} == {"experts", "blocks"}
    assert_family_fits_program(family)
    experts = {d.name: d.values[-1] for d in family.space.of("experts")}
    choices = [{**family.space.choice("largest"), **experts}, *(family.space.draw(seed) for seed in (1, 2))]
    with torch.no_grad():
        start, before = model(ids).logits, {n: t.clone() for n, t in model.state_dict().items()}
        for choice in choices:
            with family.with_switchable_choice() as take:
                take(family.space.choice("largest"))
                assert torch.equal(model(ids).logits, start)
                take(family.space.choice("smallest"))
                take(choice)
                masked = model(ids).logits
            assert torch.equal(model(ids).logits, start)
            assert not torch.allclose(masked, start, atol=1e-3)
            cut = alone(family, choice)
            assert torch.allclose(cut.model(ids).logits, masked, atol=2e-4, rtol=1e-4)
            assert shrink.param_count(family.smaller_skeleton(choice)) == sum(p.numel() for p in cut.model.parameters())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], t) for name, t in before.items())


def test_a_layer_keeps_the_same_number_of_each_group_that_its_router_compares():
    family = family_of("deepseek_v3")
    group = next(g for g in skeleton_of(family.program).groups if g.kind == "experts")
    assert group.per_block == 4 and {v for d in family.space.dims for v in d.values} == {4, 3, 2}
    gone = [removed_items(family.orders, group, left) for left in (4, 3, 2)]
    assert [len(items) for items in gone] == [0, 2, 4] and gone[1] < gone[2]
    assert all(sum(item // 4 == block for item in gone[2]) == 2 for block in (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("train", ["adapters", "weights"])
def test_experts_go_by_trust_and_one_choice_is_read_by_plain_transformers(tmp_path, train):
    model, ids = tiny.model("mixtral"), rows_of(3)
    bare = capture(copy.deepcopy(model))
    groups = narrowable_groups(skeleton_of(bare), None, "experts")
    trust = sum_router_weights(bare, context_of(tmp_path, bare.model, recipe_of([]), rows_of(1)), ROWS, groups, 64)
    net = {"experts": [Ratio(1.0), Ratio(0.5)], "per": "model", "data": ROWS, "steps": 2, "batch": 2, "lr": 3e-3}
    family = through(
        tmp_path / "net", model, ("supernet.elastic", {**net, "train": train, "gradient_checkpointing": True})
    )
    assert {k: v[0] for k, v in family.orders.items()} == {f"{s}:experts": int(t.argmin()) for s, t in trust.items()}
    with torch.no_grad():
        with family.with_choice_applied(family.space.choice("smallest")):
            masked = family.program.model(ids).logits
        cut = family.cut_program_to_choice(family.space.choice("smallest"))
        assert torch.allclose(cut.model(ids).logits, masked, atol=2e-4, rtol=1e-4)
    config, why = stock_config(cut.model)
    assert not why and config.num_local_experts == 2
    cut.model.config = config
    cut.model.save_pretrained(tmp_path / "stock")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, masked, atol=2e-4, rtol=1e-4)


def test_weights_of_experts_that_are_out_are_not_learned_and_the_others_are(tmp_path):
    model = tiny.model("mixtral")
    net = {"experts": [Ratio(1.0), Ratio(0.5)], "data": ROWS, "steps": 1, "batch": 4, "lr": 1e-2}
    family = through(tmp_path, model, ("supernet.elastic", {**net, "train": "weights"}))
    ((choice, _),) = family.losses
    moved = {
        n: (t - model.get_parameter(n)).flatten(1).abs().amax(1) > 0 for n, t in family.weights.items() if t.dim() > 1
    }
    for group in (g for g in skeleton_of(family.program).groups if g.kind == "experts"):
        gone = removed_items(family.orders, group, choice[f"{group.site}:experts"])
        left = set(range(4)) - gone
        for member in group.members:
            assert not any(moved[member.tensor][sorted(gone)].tolist()), (member.tensor, gone)
            assert any(moved[member.tensor][sorted(left)].tolist()), member.tensor
    assert any(choice[f"{g.site}:experts"] == 2 for g in skeleton_of(family.program).groups if g.kind == "experts")


@pytest.mark.parametrize(
    ("name", "shares", "slug", "said"),
    [
        ("mixtral", (1.0, 0.25), "too-few-experts", "would keep 1 of 4 experts, and 2 are chosen for a token"),
        ("mixtral", (1.0, 0.99), "one-choice", "no group has two widths"),
        ("llama", (1.0, 0.5), "one-choice", "no experts are selected"),
    ],
)
def test_experts_that_can_not_be_chosen_are_refused(tmp_path, name, shares, slug, said):
    net = {"experts": [Ratio(s) for s in shares], "data": ROWS, "steps": 0}
    found = refused(lambda: through(tmp_path, tiny.model(name), ("supernet.elastic", net)))
    assert found.diagnostics[0].slug == slug and said in found.diagnostics[0].message
