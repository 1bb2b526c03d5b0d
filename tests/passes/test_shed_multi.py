"""shed.multi against a naive oracle, its budgets, resume, and what its results are written as."""

import copy
import dataclasses
from dataclasses import replace

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.artifacts.compat import plan_padding_to_stock
from effc.compiler.artifacts.stock import stock_config
from effc.compiler.core.events import Recorded
from effc.compiler.evaluation.equivalence import max_difference, record_logits_of_sample_calls
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.compiler.transforms.editing.scan_removal import drop_scan
from effc.compiler.transforms.search.savings import model_total
from effc.compiler.transforms.search.widths import slice_group
from effc.dsl.checker.values import DataRef, MetricRef, Ratio, Shares
from effc.dsl.syntax.diagnostics import Reject

from tests import mixers
from tests.architectures import passes, table
from tests.grids import wide
from tests.mixers import cuts, loss
from tests.recipes_in_memory import SCORE, context_of, recipe_of

KINDS = ("blocks", "scans", "channels", "heads", "experts", "scan_heads", "scan_channels", "states")
DEFAULTS = {
    "score": SCORE,
    "order": KINDS,
    "split": None,
    "search": "racing",
    "estimate": "none",
    "together": 1,
    "overshoot": False,
    "rank": None,
    "repair": None,
    "group": 16,
    "heads": 1,
    "experts": 1,
    "states": 4,
    "data": DataRef("rows"),
    "clock": MetricRef("decode.p50"),
    "on": None,
}
IDS = mixers.rows()


def shed(tmp_path, model, tell=lambda event: None, **args):
    recipe = recipe_of([("step", "shed.multi", {**DEFAULTS, **args})])
    ctx = context_of(tmp_path, model, recipe)
    ctx = replace(ctx, settings=replace(ctx.settings, on_event=tell))
    program = capture(copy.deepcopy(model))
    ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call).run(program, ctx)
    return program


def without(model, names):
    """A copy of a stock model in which parts do nothing, or a scan is the identity."""
    trial = copy.deepcopy(model)
    for name in names:
        site, _, scan = name.partition(" ")
        if scan:
            mixers.identity(trial.get_submodule(site))
            continue
        part = trial.get_submodule(site)
        last = next(getattr(part, n) for n in ("out_proj", "o_proj", "down_proj") if hasattr(part, n))
        with torch.no_grad():
            last.weight.zero_()
    return trial


def oracle(model, count):
    """Blocks of attention, MLPs and mixers in the order of discovery's roles, then scans, by whole forwards."""
    layers = list(enumerate(model.model.layers))
    mambas = [f"model.layers.{i}.mamba" for i, layer in layers if hasattr(layer, "mamba")]
    mlps = [f"model.layers.{i}.feed_forward" for i, _ in layers]
    attentions = [f"model.layers.{i}.self_attn" for i, layer in layers if hasattr(layer, "self_attn")]
    gone = []
    for _ in range(count):
        left = [n for n in (*mambas, *mlps, *attentions) if n not in gone]
        scans = [f"{n} scan" for n in mambas if n not in gone and f"{n} scan" not in gone]
        left += scans if len(scans) > 1 else []
        losses = {name: loss(without(model, [*gone, name])) for name in left}
        gone.append(min(losses, key=losses.get))
    return gone


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
def test_an_exact_search_over_blocks_and_scans_decides_as_a_naive_oracle(tmp_path, seed):
    model = mixers.model("bamba", seed, num_hidden_layers=3, attn_layer_indices=[1])
    program = shed(tmp_path, model, remove=4, search="exact", order=("blocks", "scans"))
    assert cuts(program) == oracle(model, 4)
    assert (
        max_difference(
            record_logits_of_sample_calls(without(model, cuts(program))), record_logits_of_sample_calls(program.model)
        )
        < 2e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "of"),
    wide(
        [
            ("bamba", "params"),
            ("jamba", "flops"),
            ("nemotron_h", "bytes"),
            ("mamba2", "params"),
            ("mamba", "flops"),
            ("granitemoehybrid", "params"),
        ],
        {("nemotron_h", "bytes"), ("jamba", "flops")},
    ),
)
def test_a_budget_of_the_model_is_met_by_parts_of_every_kind(tmp_path, name, of):
    model = mixers.model(name)
    program = shed(tmp_path, model, remove=Ratio(0.25, of))
    assert model_total(skeleton_of(program), of) <= 0.7501 * model_total(skeleton_of(capture(model)), of)
    ids, mask = IDS[:2, :6], torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    one, two = (
        program.model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("data", [None, DataRef("rows")], ids=["by weights", "by routing"])
def test_whole_experts_compete_as_far_as_their_router_goes(tmp_path, data):
    model = mixers.model("granitemoehybrid")
    program = shed(tmp_path, model, remove=4, search="exact", order=("experts", "scans"), data=data)
    left = {g.site: g.count for g in skeleton_of(program).groups if g.kind == "experts"}
    assert sum(left.values()) + sum(" experts" in cut for cut in cuts(program)) == 3 * 4
    assert min(left.values()) >= 2, "two are chosen for a token"
    assert any(" experts" in cut for cut in cuts(program))
    with pytest.raises(Reject) as caught:
        shed(tmp_path, model, remove=Ratio(0.5, "params"), order=("experts",))
    assert caught.value.diagnostics[0].slug == "out-of-reach"


@pytest.mark.slow
def test_every_kind_of_part_is_cut_in_one_loop_and_counted_once(tmp_path):
    """Blocks, scans, channels, heads, experts, heads of scans and states of one hybrid, until half of it is gone."""
    model = mixers.model("granitemoehybrid")
    program = shed(tmp_path, model, remove=Ratio(0.5, "params"), rank="loss", states=8)
    kinds = {note["kind"] for note in program.notes if "cut" in note}
    assert len(kinds) >= 4, kinds
    saved = max(note["share"] for note in program.notes if "share" in note)
    size = sum(p.numel() for p in program.model.parameters()) / sum(p.numel() for p in model.parameters())
    assert size <= 0.5 and saved >= 0.5
    assert abs((1 - size) - saved) < 0.02, "a norm that two branches share is counted with neither"


@pytest.mark.parametrize("word", ["prune.multi", "shed.multi"])
@pytest.mark.slow
def test_a_net_without_residual_branches_is_narrowed(tmp_path, word):
    model = table.model("mobilenet_v1")
    before = sum(p.numel() for p in model.parameters())
    program, _ = passes.pruned("mobilenet_v1", word, tmp_path)
    after = sum(p.numel() for p in program.model.parameters())
    assert after <= 0.9 * before and not skeleton_of(program).branches
    share = max(note["share"] for note in program.notes if "share" in note)
    assert share == pytest.approx(1 - after / before, abs=1e-6), "what neighbours share is counted once"


def test_kinds_take_turns_as_split_says(tmp_path):
    program = shed(
        tmp_path,
        mixers.model("bamba"),
        remove=4,
        search="exact",
        order=("blocks", "scans"),
        split=Shares((("blocks", 75.0), ("scans", 25.0))),
    )
    assert ["scan" in cut for cut in cuts(program)] == [False, False, False, True]


@pytest.mark.slow
def test_latency_is_saved_where_it_is_measured(tmp_path):
    model = mixers.model("bamba", num_hidden_layers=4, attn_layer_indices=[2])
    program = shed(
        tmp_path,
        model,
        remove=Ratio(0.2, "latency"),
        order=("blocks", "scans"),
        clock=MetricRef("decode.p50", (("prompt", 16), ("steps", 8))),
    )
    (note,) = [n for n in program.notes if "per_branch" in n]
    assert {"ssm", "scan", "mlp", "attention"} <= note["per_branch"].keys() and note["per_branch"]["ssm"] > 0
    assert cuts(program)


@pytest.mark.slow
def test_a_killed_search_goes_on_with_the_scores_that_it_had(tmp_path):
    model, seen = mixers.model("bamba"), []
    expected = cuts(shed(tmp_path, model, remove=3, search="exact", order=("blocks", "scans", "states")))

    def count(event):
        if isinstance(event, Recorded) and event.name == "layer forwards":
            seen.append(event.value)

    assert cuts(shed(tmp_path, model, count, remove=3, search="exact", order=("blocks", "scans", "states"))) == expected
    assert seen[-1] == 0


def test_kinds_that_the_model_lacks_are_refused_alone_and_passed_over_together(tmp_path):
    model = mixers.model("mamba2")
    with pytest.raises(Reject) as caught:
        shed(tmp_path, model, remove=Ratio(0.1, "params"), order=("channels", "scan_channels"))
    assert caught.value.diagnostics[0].slug == "nothing-to-shed"


# -- what it is written as -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    wide(
        [
            ("mamba2", "ssm_heads"),
            ("bamba", "ssm_heads"),
            ("nemotron_h", "ssm_heads"),
            ("zamba2", "ssm_heads"),
            ("mamba", "ssm_channels"),
            ("jamba", "ssm_channels"),
            ("mamba2", "ssm_state"),
            ("zamba2", "ssm_state"),
        ],
        {("bamba", "ssm_heads"), ("mamba", "ssm_channels"), ("mamba2", "ssm_state")},
    ),
)
def test_halves_that_a_config_can_say_make_a_stock_checkpoint(name, kind):
    program = capture(mixers.model(name))
    with Rewriter(program) as rewrite:
        for group in [g for g in skeleton_of(program).groups if g.kind == kind]:
            size = group.per_block or group.count
            slice_group(program, rewrite, group, {i for i in range(group.count) if i % size < size // 2})
    config, why = stock_config(program.model)
    assert not why
    stock = type(program.model)(type(config).from_dict(config.to_dict())).eval()
    stock.load_state_dict(program.model.state_dict())
    assert max_difference(record_logits_of_sample_calls(stock), record_logits_of_sample_calls(program.model)) < 1e-5


@pytest.mark.parametrize(
    "name", wide(["mamba", "falcon_mamba", "mamba2", "bamba", "jamba", "nemotron_h"], {"mamba", "bamba"})
)
def test_a_lost_scan_is_an_identity_in_stock_shapes(name):
    model = mixers.model(name)
    program = capture(copy.deepcopy(model))
    with Rewriter(program) as rewrite:
        drop_scan(program, rewrite, skeleton_of(program).scans[0])
    filled = plan_padding_to_stock(program)
    assert not filled.reasons
    stock = copy.deepcopy(model)
    state = {piece.name: piece.make() for piece in filled.padded_tensor_pieces(program)}
    missing, odd = stock.load_state_dict(state, strict=False)
    assert not odd and all("lm_head" in name for name in missing)
    assert max_difference(record_logits_of_sample_calls(stock), record_logits_of_sample_calls(program.model)) < 2e-5


def test_every_parameter_of_the_pass_has_a_value_here():
    from effc.passes.shed.multi import Multi

    assert {f.name for f in dataclasses.fields(Multi)} == {*DEFAULTS, "remove"}
