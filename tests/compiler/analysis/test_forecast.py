"""What `plan` says of a search: a size that meets the recipe's budget, and all that it costs."""

import pytest
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.ir.capture.capture import capture
from effc.compiler.plugin.registry import Registry
from effc.compiler.transforms.search.savings import SavingsTable, model_total
from effc.dsl.checker.recipe import Invocation
from effc.dsl.checker.values import DataRef, Ratio

from tests import mixers, tiny
from tests.architectures.passes import PASSES
from tests.recipes_in_memory import SCORE, context_of, recipe_of


def a_pass(word, **args):
    known = PASSES[word]
    return Registry().make(
        "pass", Invocation(word, {**known, **({"score": SCORE} if "score" in known else {}), **args})
    )


@pytest.mark.parametrize("share", [0.03, 0.065, 0.15, 0.33])
@pytest.mark.parametrize("of", ["params", "flops", "bytes"])
@pytest.mark.parametrize(
    ("word", "model"),
    [("prune.multi", "llama"), ("prune.multi", "gpt2"), ("shed.multi", "mamba2"), ("shed.multi", "bamba")],
)
def test_what_is_foreseen_meets_the_budget_by_less_than_one_cut(word, model, of, share):
    made = mixers.model(model) if word == "shed.multi" else tiny.model(model)
    before = skeleton_of(capture(made))
    step = a_pass(word, remove=Ratio(share, of), group=8)
    after = step.forecast(before)
    gone = 1 - model_total(after, of) / model_total(before, of)
    largest = max(SavingsTable(before).branch_savings(b.site, of) for b in before.branches) / model_total(before, of)
    assert share <= gone + 1e-9 and gone < share + largest
    again = a_pass(word, remove=Ratio(gone - 1e-6, of), group=8).forecast(before)
    assert model_total(again, of) == model_total(after, of), "no more than what the budget takes"


@pytest.mark.parametrize("search", ["racing", "exact"])
def test_scores_are_foreseen_within_a_factor_of_two(tmp_path, search):
    from effc.compiler.transforms.search.loop import Search

    model = tiny.model("llama")
    recipe = recipe_of([("step", "prune.blocks", {"remove": 2, "unit": "branch", "search": search})])
    ctx, program = context_of(tmp_path, model, recipe), capture(model)
    step = ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call)
    foreseen, scored = step.forwards(skeleton_of(program)), []
    measure = Search._timed_score
    Search._timed_score = lambda self, *args: scored.append(1) or measure(self, *args)
    try:
        step.run(program, ctx)
    finally:
        Search._timed_score = measure
    assert foreseen / 2 <= len(scored) <= 2 * foreseen


def test_estimates_and_cuts_that_are_made_together_are_foreseen_to_cost_less():
    skeleton = skeleton_of(capture(tiny.model("llama", num_hidden_layers=12)))

    def foreseen(**args):
        return a_pass("prune.multi", remove=Ratio(0.2, "params"), group=8, **args).forwards(skeleton)

    assert foreseen(estimate="taylor", together=4) < foreseen(estimate="taylor") < foreseen()


@pytest.mark.parametrize(
    ("word", "model", "args"),
    [
        ("prune.multi", "llama", {"search": "racing"}),
        ("prune.channels", "llama", {"score": SCORE, "reorder": None}),
        ("prune.heads", "llama", {"score": SCORE, "reorder": None}),
        ("prune.experts", "granitemoehybrid", {"data": DataRef("rows")}),
        ("shed.multi", "bamba", {}),
        ("shed.heads", "mamba2", {"score": SCORE, "keep": Ratio(0.9, "params")}),
        ("shed.channels", "mamba", {"score": SCORE, "keep": Ratio(0.9, "params")}),
    ],
)
def test_ranking_on_rows_takes_tokens_that_a_plan_counts(tmp_path, word, model, args):
    made = tiny.model(model) if model == "llama" else mixers.model(model)
    ctx = context_of(tmp_path, made, recipe_of([]))
    skeleton = skeleton_of(capture(made))
    effort = a_pass(word, **args, data=DataRef("rows")) if "data" not in args else a_pass(word, **args)
    effort = effort.effort(skeleton, ctx)
    assert effort.tokens == ctx.rows(DataRef("rows")).numel()
    if word != "prune.experts":
        assert effort.bytes > 0


def test_weights_alone_take_no_rows(tmp_path):
    made = tiny.model("llama")
    ctx = context_of(tmp_path, made, recipe_of([]))
    for args in ({"score": None}, {"score": SCORE, "reorder": "l1", "repair": False}):
        effort = a_pass("prune.channels", **args, data=DataRef("rows")).effort(skeleton_of(capture(made)), ctx)
        assert effort.tokens == 0
