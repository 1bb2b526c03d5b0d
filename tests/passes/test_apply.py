"""prune.apply and the published form: what a search wrote rebuilds its model; another model's file is refused."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning.layer_profile import draw_layer_bars, layer_group_counts
from effc.compiler.artifacts.pruning_config import layers_by_number, to_published_config
from effc.compiler.ir.capture.capture import capture
from effc.dsl.checker.recipe import Invocation
from effc.dsl.checker.values import Ratio, Selector
from effc.dsl.syntax.diagnostics import Reject

from tests import tiny
from tests.passes.test_multi import PUBLISHED, pruned
from tests.recipes_in_memory import context_of, recipe_of


def applied(tmp_path, model, config, reorder="l1"):
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "pruning_config.json").write_text(text)
    recipe = recipe_of([("step", "prune.apply", {"path": "pruning_config.json", "reorder": reorder})])
    program = capture(copy.deepcopy(model))
    ctx = context_of(tmp_path, model, recipe)
    ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call).run(program, ctx)
    return program


def after_steps(tmp_path, model, *steps):
    """The program after passes in memory, (word, arguments) each, and the config that its target writes."""
    recipe = recipe_of([(f"step{i}", word, args) for i, (word, args) in enumerate(steps)])
    program, ctx = capture(copy.deepcopy(model)), context_of(tmp_path, model, recipe)
    for number, step in enumerate(recipe.pipelines["lean"].steps):
        ctx.workdir = tmp_path / f"work{number}"
        ctx.workdir.mkdir()
        ctx.registry.make("pass", step.call).run(program, ctx)
    into = tmp_path / "config"
    into.mkdir()
    ctx.registry.make("target", Invocation("pruning_config", {"path": "config"})).emit(program, into, ctx)
    return program, json.loads((into / "pruning_config.json").read_text())


def drop(site):
    """A step that removes one branch, or one layer: its number as it is by then."""
    unit = "layer" if site.rpartition(".")[2].isdigit() else "branch"
    return "prune.blocks", {"remove": 1, "unit": unit, "on": Selector((("|", f"model.layers.{site}"),))}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", *(pytest.param(n, marks=pytest.mark.heavy) for n in tiny.NAMES if n not in ("llama", "gpt2"))],
)
def test_a_written_config_rebuilds_the_pruned_model_weight_by_weight(tmp_path, name):
    model = tiny.model(name)
    searched = pruned(tmp_path, model, remove=Ratio(0.25, "params"), search="exact", split=PUBLISHED, group=8)
    removed = [note["cut"] for note in searched.notes if "cut" in note]
    config = to_published_config(skeleton_of(capture(model)), skeleton_of(searched), removed, searched.edits.layers)
    ours, theirs = applied(tmp_path, model, config).model.state_dict(), searched.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_form_is_the_published_one(tmp_path):
    model = tiny.model("llama")
    widths = {"0": 64, "1": 32, "2": 64}
    config = {
        "pruned_attn_idx": [2],
        "pruned_mlp_idx": [0],
        "pruned_attn_width": widths,
        "pruned_mlp_width": {"0": 96, "1": 48, "2": 96},
    }
    program = applied(tmp_path, model, config)
    assert to_published_config(skeleton_of(capture(model)), skeleton_of(program), [], {}) == config


FULL = {"attn": {str(i): 64 for i in range(4)}, "mlp": {str(i): 96 for i in range(4)}}


def test_a_dropped_layer_counts_as_both_its_branches_under_its_first_number(tmp_path):
    model = tiny.model("llama", num_hidden_layers=4)
    program, config = after_steps(
        tmp_path,
        model,
        drop("1"),
        drop("1.self_attn"),
        (
            "prune.channels",
            {"keep": Ratio(0.5, "channels"), "align": 1, "on": Selector((("|", "model.layers.2.mlp"),))},
        ),
    )
    assert config == {
        "pruned_attn_idx": [1, 2],
        "pruned_mlp_idx": [1],
        "pruned_attn_width": FULL["attn"],
        "pruned_mlp_width": {**FULL["mlp"], "3": 48},
    }
    ids = torch.arange(3, 15)[None]
    ours, theirs = program.model(ids).logits, applied(tmp_path, model, config).model(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)  # float32: the same sums in another order


@pytest.mark.parametrize(
    ("steps", "attention"),
    [
        (["2", "0"], [2, 0]),  # the second is named before the first has moved it
        (["2.self_attn", "1", "0.self_attn"], [2, 1, 0]),
        (["0", "1"], [0, 2]),  # 1 was 2
        (["0", "0"], [0, 1]),
    ],
)
def test_the_order_of_removal_survives_where_paths_still_say_which_layer_it_was(tmp_path, steps, attention):
    _, config = after_steps(tmp_path, tiny.model("llama", num_hidden_layers=4), *map(drop, steps))
    assert config["pruned_attn_idx"] == attention


@pytest.mark.parametrize("heads", [4, 8])
def test_fewer_query_heads_per_kv_head_are_not_written_as_a_full_width(tmp_path, heads):
    model = tiny.model("llama", num_attention_heads=heads)
    with pytest.raises(Reject) as refused:
        after_steps(tmp_path, model, ("prune.heads", {"keep": Ratio(0.5, "heads")}))
    (found,) = refused.value.diagnostics
    assert found.fault.slug == "no-published-form"
    assert f"layer 0 keeps {heads // 2} of {heads} query heads and 2 of 2 KV heads" in found.message
    assert "of kv_heads" in found.help


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt"])
def test_whole_kv_heads_and_channels_are_written_and_rebuild_every_shape(tmp_path, name):
    model = tiny.model(name)
    program, config = after_steps(
        tmp_path,
        model,
        ("prune.heads", {"keep": Ratio(0.5, "kv_heads")}),
        ("prune.channels", {"keep": Ratio(0.5, "channels"), "align": 1}),
    )
    assert config["pruned_attn_width"] == {"0": 32, "1": 32, "2": 32}
    assert config["pruned_mlp_width"] == {"0": 48, "1": 48, "2": 48}
    ours, theirs = program.model.state_dict(), applied(tmp_path, model, config).model.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_a_lost_state_space_branch_is_not_written_as_nothing(tmp_path):
    model = tiny.model("bamba")
    with pytest.raises(Reject, match="layer 0 has lost its ssm") as refused:
        after_steps(tmp_path, model, drop("0.mamba"))
    assert refused.value.diagnostics[0].fault.slug == "no-published-form"


def test_a_width_that_the_form_has_no_field_for_is_refused(tmp_path):
    before = replace(skeleton_of(capture(tiny.model("qwen3_next"))), groups=())
    narrow = next(p for p in before.parts if p.path == "model.layers.0.linear_attn.out_proj")
    ((name, shape),) = narrow.tensors
    parts = [replace(p, tensors=((name, (shape[0], 16)),)) if p is narrow else p for p in before.parts]
    with pytest.raises(Reject, match=r"model\.layers\.0\.linear_attn\.out_proj\.weight is 64 x 16"):
        to_published_config(before, replace(before, parts=tuple(parts)), [], {})


def test_without_reorder_the_first_items_stay(tmp_path):
    model = tiny.model("llama")
    config = {"pruned_mlp_width": {"1": 40}, "pruned_attn_width": {"0": 32}}
    program = applied(tmp_path, model, config, reorder="none")
    layers, before = program.model.model.layers, model.model.layers
    assert torch.equal(layers[1].mlp.up_proj.weight, before[1].mlp.up_proj.weight[:40])
    assert torch.equal(layers[0].self_attn.k_proj.weight, before[0].self_attn.k_proj.weight[:16])


@pytest.mark.parametrize(
    ("config", "fact"),
    [
        ("{", "can't be read: it breaks at line 1"),
        ("[]", "holds no object"),
        ({"other": 1}, "has none of pruned_attn_idx"),
        ({"pruned_attn_idx": 3}, "is no list"),
        ({"pruned_attn_idx": [7]}, "removes attn 7, the model has 3 layers"),
        ({"pruned_mlp_idx": [True]}, "removes mlp True"),
        ({"pruned_mlp_idx": [1, 1]}, "removes a layer's mlp twice"),
        ({"pruned_mlp_width": {"31": 40}}, "gives a width for layer 31, the model has 3"),
        ({"pruned_mlp_width": {"x": 40}}, "gives a width for layer x"),
        ({"pruned_mlp_width": {"00": 40}}, "gives a width for layer 00"),
        ({"pruned_mlp_width": {"²": 40}}, "gives a width for layer ²"),
        ({"pruned_mlp_width": {"١": 40}}, "gives a width for layer ١"),
        ({"pruned_mlp_width": {"1" * 5000: 40}}, "gives a width for layer 1111"),
        ({"pruned_attn_idx": [0, 1, 2], "pruned_mlp_idx": [2, 1, 0]}, "removes every attention and MLP"),
        ({"pruned_mlp_width": {"0": 14336}}, "keeps 14336 of 96 mlp channels"),
        ({"pruned_mlp_width": {"0": 0}}, "keeps 0 of 96"),
        ({"pruned_mlp_width": {"0": 1.5}}, "keeps 1.5 of 96"),
        ({"pruned_attn_width": {"0": 40}}, "a KV head has 32 of them"),
    ],
)
def test_a_file_that_is_no_config_of_this_model_is_refused(tmp_path, config, fact):
    with pytest.raises(Reject) as refused:
        applied(tmp_path, tiny.model("llama"), config)
    (found,) = refused.value.diagnostics
    assert found.fault.slug == "bad-pruning-config"
    assert fact in found.message


def test_the_last_branch_may_be_any_and_stays(tmp_path):
    config = {"pruned_attn_idx": [0, 1, 2], "pruned_mlp_idx": [2, 0]}
    program = applied(tmp_path, tiny.model("llama"), config)
    assert [b.site for b in skeleton_of(program).branches] == ["model.layers.1.mlp"]


def test_a_layer_with_two_mlps_is_refused(tmp_path):
    with pytest.raises(Reject) as refused:
        applied(tmp_path, tiny.model("gemma4_text"), {"pruned_mlp_idx": [1]})
    (found,) = refused.value.diagnostics
    assert found.fault.slug == "no-published-form"
    assert found.message == "layer 0 has two MLPs, the form knows one"


def test_a_layer_with_two_groups_of_mlp_channels_is_refused():
    skeleton = skeleton_of(capture(tiny.model("llama")))
    group = next(g for g in skeleton.groups if g.site == "model.layers.1.mlp")
    with pytest.raises(Reject, match="layer 1 has two groups of MLP channels, the form knows one"):
        layers_by_number(replace(skeleton, groups=(*skeleton.groups, group)))


def test_heads_that_cannot_be_cut_have_no_width(tmp_path):
    with pytest.raises(Reject, match="layer 0, whose attention can't be narrowed"):
        applied(tmp_path, tiny.model("olmo2"), {"pruned_attn_width": {"0": 32}})


def test_a_missing_file_is_refused(tmp_path):
    recipe = recipe_of([("step", "prune.apply", {"path": "none.json", "reorder": "l1"})])
    model = tiny.model("llama")
    ctx = context_of(tmp_path, model, recipe)
    with pytest.raises(Reject, match=r"none\.json can't be read"):
        ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call).run(capture(model), ctx)


def test_a_profile_draws_what_is_gone_and_what_is_left(tmp_path):
    model = tiny.model("llama")
    config = {"pruned_attn_idx": [2], "pruned_mlp_width": {"0": 48}, "pruned_attn_width": {"1": 32}}
    after = applied(tmp_path, model, config)
    summary = draw_layer_bars(
        layer_group_counts(skeleton_of(capture(model))), layer_group_counts(skeleton_of(after), after.edits.layers)
    )
    assert (
        summary
        == """\
layer  self_attn (KV heads)         mlp (channels)
    0  ████████████████████ 2       ██████████░░░░░░░░░░ 48 -50%
    1  ██████████░░░░░░░░░░ 1 -50%  ████████████████████ 96
    2  ···················· gone    ████████████████████ 96"""
    )


@pytest.mark.parametrize(
    ("heads", "keep", "row"),
    [
        (4, Ratio(0.5, "heads"), "██████████░░░░░░░░░░ 2 heads -50%"),  # one per KV head: discovered as plain heads
        (8, Ratio(0.5, "heads"), "██████████░░░░░░░░░░ 4 heads -50%"),
        (8, Ratio(0.5, "kv_heads"), "██████████░░░░░░░░░░ 1 -50%"),
        (8, Ratio(1.0, "heads"), "████████████████████ 2"),
    ],
)
def test_a_profile_draws_query_heads_where_they_went_without_their_kv_head(tmp_path, heads, keep, row):
    model = tiny.model("llama", num_attention_heads=heads)
    program = capture(copy.deepcopy(model))
    recipe = recipe_of([("step", "prune.heads", {"keep": keep})])
    ctx = context_of(tmp_path, model, recipe)
    ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call).run(program, ctx)
    line = draw_layer_bars(
        layer_group_counts(skeleton_of(capture(model))), layer_group_counts(skeleton_of(program))
    ).splitlines()[1]
    assert line.strip().split("  ")[1] == row


def test_a_profile_draws_the_smaller_share_where_both_kinds_of_heads_went():
    before = {"layers.0": {"attn": {"role": "attention", "heads": 16, "kv_heads": 4}}}
    after = {"layers.0": {"attn": {"role": "attention", "heads": 4, "kv_heads": 2}}}
    assert draw_layer_bars(before, after).endswith("█████░░░░░░░░░░░░░░░ 4 heads -75%")


RECIPE = """effspec 1
use std.text
model base = zoo("tiny-llama")
pipeline lean(base) {
  slim = prune.apply("published.json")
}
expect lean { params <= 0.95 * base }
emit lean {
  hf("lean")
  pruning_config("config")
}
"""


@pytest.mark.slow
def test_an_artifact_that_holds_no_model_is_written_and_says_so(tmp_path, monkeypatch):
    from effc.compiler.cli.main import main

    widths = {str(i): 320 for i in range(8)}
    (tmp_path / "published.json").write_text(json.dumps({"pruned_mlp_width": widths}))
    (tmp_path / "lean.effspec").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    cache = ["--cache-dir", "cache", "--threads", "1"]
    assert main(["compile", "lean.effspec", *cache]) == 0
    written = json.loads((tmp_path / "out/config/pruning_config.json").read_text())
    assert written["pruned_mlp_width"] == widths
    assert main(["test", "out/config", *cache]) == 2
    assert main(["test", "lean.effspec", *cache]) == 0


def test_another_content_of_the_file_is_another_result(tmp_path):
    from effc.compiler.driver import api

    (tmp_path / "lean.effspec").write_text(RECIPE)
    keys = []
    for width in (320, 256):
        (tmp_path / "published.json").write_text(json.dumps({"pruned_mlp_width": {"0": width}}))
        (plan,) = api.plan(tmp_path / "lean.effspec", cache_dir=tmp_path / "cache")
        keys.append(plan.stages[0].key)
    assert keys[0] != keys[1]


def test_a_profile_draws_layers_in_their_order_though_a_manifest_sorts_them_as_text():
    whole = {f"model.layers.{i}": {"mlp": {"role": "mlp", "channels": 8}} for i in range(12)}
    stored = json.loads(json.dumps(whole, sort_keys=True))
    assert [line.split()[0] for line in draw_layer_bars(stored, stored).splitlines()[1:]] == [str(i) for i in range(12)]
