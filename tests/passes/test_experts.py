"""Whole experts go with their rows of the router, which then chooses among the others."""

import copy

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.artifacts.stock import stock_config
from effc.compiler.evaluation import equivalence
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.program import Program
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.compiler.transforms.search.widths import slice_groups
from effc.dsl.checker.values import DataRef, Ratio
from effc.dsl.syntax.diagnostics import Reject
from effc.passes.prune.experts import Experts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests import tiny
from tests.architectures import table
from tests.grids import wide
from tests.recipes_in_memory import context_of, recipe_of

torch.set_num_threads(1)
NAMES = ("mixtral", "qwen3_moe", "jamba", "granitemoehybrid")


def experts(program: Program) -> list:
    return [g for g in skeleton_of(program).groups if g.kind == "experts"]


@pytest.mark.slow
@pytest.mark.parametrize("name", wide(NAMES, {"mixtral", "jamba"}))
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_without_an_expert_the_router_chooses_as_if_it_had_the_least_score(name, data):
    model = tiny.model(name)
    program = capture(copy.deepcopy(model))
    cuts = [
        (g, set(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=2, unique=True)))) for g in experts(program)
    ]
    rows = {id(model.get_parameter(g.members[0].tensor)): sorted(dead) for g, dead in cuts}
    linear = F.linear

    def masked(x, weight, bias=None):
        out = linear(x, weight, bias)
        return out.index_fill(-1, torch.tensor(rows[id(weight)]), -1e4) if id(weight) in rows else out

    F.linear = masked
    try:
        expected = equivalence.record_logits_of_sample_calls(model)
    finally:
        F.linear = linear
    with Rewriter(program) as rewrite:
        slice_groups(program, rewrite, cuts)
    largest = max(float(x.abs().max()) for x in expected)
    assert (
        equivalence.max_difference(expected, equivalence.record_logits_of_sample_calls(program.model)) <= 1e-5 * largest
    ), "sums in another order"


@pytest.mark.parametrize("data", [None, DataRef("rows")], ids=["weights", "routing"])
def test_half_of_the_experts_leaves_a_stock_checkpoint(tmp_path, data):
    model = tiny.model("mixtral")
    program = capture(model)
    few = Experts(keep=Ratio(0.5, "experts"), data=data)
    forecast = few.forecast(skeleton_of(program))
    few.run(program, context_of(tmp_path, model, recipe_of([])))
    assert [g.count for g in experts(program)] == [2, 2, 2]
    assert skeleton_of(program).shapes() == forecast.shapes()
    config, why = stock_config(model)
    assert (config.num_local_experts, why) == (2, [])


def test_those_go_that_the_router_trusts_least(tmp_path):
    model = tiny.model("mixtral")
    ctx = context_of(tmp_path, model, recipe_of([]))
    sums = torch.zeros(3, 4)

    def listen(layer):
        def hook(_module, _args, output):
            _, weights, index = output
            for expert in range(4):
                sums[layer, expert] += weights[index == expert].sum()

        return hook

    handles = [layer.mlp.gate.register_forward_hook(listen(i)) for i, layer in enumerate(model.model.layers)]
    with torch.no_grad():
        model(ctx.rows(DataRef("rows")))
    for handle in handles:
        handle.remove()
    program = capture(model)
    Experts(keep=Ratio(0.5, "experts"), data=DataRef("rows")).run(program, ctx)
    assert [note["removed"] for note in program.notes] == [sorted(row.argsort()[:2].tolist()) for row in sums]


def test_fewer_than_are_chosen_for_a_token_are_refused():
    with pytest.raises(Reject, match="would keep 1 of 4 experts, and 2 are chosen for a token"):
        Experts(keep=Ratio(0.25, "experts")).forecast(skeleton_of(capture(tiny.model("mixtral"))))


def test_a_model_without_experts_is_refused():
    with pytest.raises(Reject, match="llama has no experts that could go"):
        Experts(keep=Ratio(0.5, "experts")).forecast(skeleton_of(capture(tiny.model("llama"))))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("dbrx", "their weights are not packed into one tensor each"),  # rows of all experts, one after another
        ("jetmoe", "other modules are chosen by the same router"),  # two matrices of an expert are two modules
    ],
)
def test_experts_that_can_not_go_by_themselves_are_left_with_a_reason(name, why):
    skeleton = skeleton_of(capture(table.model(name)))
    assert not [g for g in skeleton.groups if g.kind == "experts"]
    with pytest.raises(Reject, match=why):
        Experts(keep=Ratio(0.5, "experts")).forecast(skeleton)
