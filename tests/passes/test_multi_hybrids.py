"""prune.multi and shed.multi on hybrids: every budget, both searches, and what is left computes what it should."""

import copy

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.evaluation.equivalence import max_difference, record_logits_of_sample_calls
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.search.savings import model_total
from effc.dsl.checker.values import DataRef, MetricRef, Ratio, Selector

from tests import mixers
from tests.grids import wide
from tests.mixers import cuts
from tests.recipes_in_memory import SCORE, context_of, recipe_of

torch.set_num_threads(1)
CLOCK = MetricRef("decode.p50", (("prompt", 16), ("steps", 8)))
PRUNE = {
    "score": SCORE,
    "order": ("blocks", "channels", "heads"),
    "split": None,
    "search": "racing",
    "estimate": "none",
    "together": 1,
    "rank": None,
    "reorder": None,
    "repair": None,
    "data": DataRef("rows"),
    "group": 16,
    "heads": 1,
    "width_score": None,
    "clock": CLOCK,
    "machine": None,
    "check": None,
    "on": None,
}
KINDS = ("blocks", "scans", "channels", "heads", "experts", "scan_heads", "scan_channels", "states")
SHED = {
    "score": SCORE,
    "order": KINDS,
    "split": None,
    "search": "racing",
    "estimate": "none",
    "together": 1,
    "rank": None,
    "repair": None,
    "group": 16,
    "heads": 1,
    "experts": 1,
    "states": 4,
    "data": DataRef("rows"),
    "clock": CLOCK,
    "on": None,
}
ARGUMENTS = {"prune.multi": PRUNE, "shed.multi": SHED}


def cut(tmp_path, model, word, **changes):
    recipe = recipe_of([("step", word, {**ARGUMENTS[word], **changes})])
    program = capture(copy.deepcopy(model))
    ctx = context_of(tmp_path, model, recipe)
    ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call).run(program, ctx)
    return program


def assert_runs(program):
    """Bound graphs and the model's own forward agree, and so do decoding with a cache and without, padded."""
    before = record_logits_of_sample_calls(program.model)
    for unit in program.units.values():
        unit.install_graph_forward(program.model)
    assert max_difference(before, record_logits_of_sample_calls(program.model)) == 0.0
    ids, mask = mixers.rows()[:2, :6], torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    one, two = (
        program.model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize("word", ARGUMENTS)
@pytest.mark.parametrize("of", wide(["params", "flops", "bytes"], {"flops"}))
@pytest.mark.slow
def test_a_hybrid_meets_every_budget_of_its_size(tmp_path, word, of):
    model = mixers.model("jamba" if of == "flops" else "bamba")
    program = cut(tmp_path, model, word, remove=Ratio(0.3, of))
    assert model_total(skeleton_of(program), of) <= 0.7001 * model_total(skeleton_of(capture(model)), of)
    assert_runs(program)


@pytest.mark.parametrize("word", ARGUMENTS)
@pytest.mark.slow
def test_a_hybrid_is_cut_by_its_latency(tmp_path, word):
    model = mixers.model("bamba", num_hidden_layers=4, attn_layer_indices=[2])
    program = cut(tmp_path, model, word, remove=Ratio(0.15, "latency"), order=("blocks",))
    (note,) = [n for n in program.notes if "per_branch" in n]
    assert {"ssm", "attention", "mlp"} <= note["per_branch"].keys()
    assert cuts(program)
    assert_runs(program)


@pytest.mark.slow
def test_steps_are_counted_over_all_kinds(tmp_path):
    program = cut(tmp_path, mixers.model("nemotron_h"), "shed.multi", remove=5)
    assert len(cuts(program)) == 5
    assert_runs(program)


@pytest.mark.slow
@pytest.mark.parametrize("word", ARGUMENTS)
def test_selected_blocks_alone_are_cut(tmp_path, word):
    program = cut(
        tmp_path,
        mixers.model("bamba"),
        word,
        remove=Ratio(0.1, "params"),
        overshoot=word == "prune.multi",
        on=Selector((("|", "*.mamba"),)),
    )
    assert all(".mamba" in name for name in cuts(program))
