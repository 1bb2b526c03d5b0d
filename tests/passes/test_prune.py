"""The pruning passes against oracles that know nothing of effc: hooks, masks and whole-model forwards."""

import copy
import dataclasses

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.core.events import Ticked, listening_with
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.editing.trial import with_units_bound_temporarily
from effc.compiler.transforms.search.branches import Layers
from effc.compiler.transforms.search.importance import l1_importance
from effc.compiler.transforms.search.savings import SavingsTable
from effc.compiler.transforms.search.widths import with_parameters_replaced
from effc.dsl.checker.values import Ratio
from effc.dsl.syntax.diagnostics import Reject

from tests import tiny
from tests.grids import wide
from tests.recipes_in_memory import SCORE, context_of, recipe_of

IDS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(1))


def pruned(tmp_path, model, word, **args):
    """A copy of the model after one pass, and the program's notes."""
    recipe = recipe_of([("step", word, args)])
    ctx = context_of(tmp_path, model, recipe)
    program = capture(copy.deepcopy(model))
    ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call).run(program, ctx)
    return program


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def loss(model):
    values = logits(model)[:, :-1].reshape(-1, 128)
    return torch.nn.functional.cross_entropy(values, IDS[:, 1:].reshape(-1)).item()


def silenced(model, sites):
    """Hooks that make the output of attention or MLP modules zero: a pre-norm model without these branches."""

    def zero(_module, _args, output):
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    return [model.get_submodule(site).register_forward_hook(zero) for site in sites]


def greedy_oracle(model, sites, count):
    """What goes, by trying every removal on the whole model."""
    gone = []
    for _ in range(count):
        losses = {}
        for site in sites:
            if site not in gone:
                hooks = silenced(model, [*gone, site])
                losses[site] = loss(model)
                for hook in hooks:
                    hook.remove()
        gone.append(min(losses, key=losses.get))
    return gone


@pytest.mark.parametrize("seed", range(3))
def test_blocks_go_in_the_order_of_an_exhaustive_oracle(tmp_path, seed):
    model = tiny.model("llama", seed=seed)
    sites = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")]
    program = pruned(tmp_path, model, "prune.blocks", remove=3)
    assert [note["cut"] for note in program.notes if "cut" in note] == greedy_oracle(model, sites, 3)


def test_while_candidates_are_scored_progress_says_which_cut_it_is(tmp_path):
    """The one batch of a candidate said `batches of rows 0/1` over it, for minutes."""
    recipe, heard = recipe_of([("step", "prune.blocks", {"remove": 2})]), []
    ctx = context_of(tmp_path, tiny.model("llama"), recipe)
    ctx.settings = dataclasses.replace(ctx.settings, on_event=heard.append)
    with listening_with(ctx.tick):
        ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call).run(capture(tiny.model("llama")), ctx)
    labels = [event.label for event in heard if isinstance(event, Ticked)]
    first = labels.index("cut 1, % of the budget")
    assert {"cut 1, % of the budget", "cut 2, % of the budget"} <= set(labels)
    assert not [label for label in labels[first : labels.index("cut 2, % of the budget")] if "batches" in label]


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_removing_blocks_equals_silencing_them(tmp_path, name):
    model = tiny.model(name)
    program = pruned(tmp_path, model, "prune.blocks", remove=2)
    hooks = silenced(model, [note["cut"] for note in program.notes if "cut" in note])
    expected = logits(model)
    for hook in hooks:
        hook.remove()
    assert torch.allclose(logits(program.model), expected, atol=1e-5)  # 1e-5: x + 0 against x in float32


def test_layers_go_whole_and_leave_a_stock_config(tmp_path):
    program = pruned(tmp_path, tiny.model("llama"), "prune.blocks", remove=1, unit="layer")
    assert program.model.config.num_hidden_layers == 2
    assert len(program.model.model.layers) == 2
    assert not any(unit.edited for unit in program.units.values())


@pytest.mark.parametrize("name", wide(tiny.NAMES, tiny.STAND))
def test_channels_of_least_magnitude_go_and_the_rest_computes_as_if_they_were_zero(tmp_path, name):
    model = tiny.model(name)
    program = pruned(tmp_path, model, "prune.channels", keep=Ratio(0.5, "channels"), align=16)
    assert {g.count for g in skeleton_of(program).groups if g.kind == "channels"} == {48}
    masked = copy.deepcopy(model)
    skeleton = skeleton_of(capture(masked))
    groups = {g.site: g for g in skeleton.groups if g.kind == "channels"}
    for note in (n for n in program.notes if "removed" in n):
        timeouts(masked, groups[note["site"]], note["removed"])
    assert torch.allclose(logits(program.model), logits(masked), atol=1e-4)  # 1e-4: sums in another order


@pytest.mark.parametrize("name", wide(tiny.NAMES, tiny.STAND))
@pytest.mark.parametrize("base", ["heads", "kv_heads"])
def test_heads_go_and_the_rest_computes_as_if_they_were_zero(tmp_path, name, base):
    model = tiny.model(name)
    program = pruned(tmp_path, model, "prune.heads", keep=Ratio(0.5, base))
    masked = copy.deepcopy(model)
    groups = {(g.site, g.kind): g for g in skeleton_of(capture(masked)).groups}
    for note in (n for n in program.notes if "removed" in n):
        timeouts(masked, groups[note["site"], note["kind"]], note["removed"])
    assert program.notes
    assert torch.allclose(logits(program.model), logits(masked), atol=1e-4)  # 1e-4: sums in another order


def timeouts(model, group, items):
    """Zero what the group's readers read of the items."""
    for member in group.members[-group.readers :]:
        weight = model.get_parameter(member.tensor)
        dead = [i for item in items for i in member.indices(item)]
        with torch.no_grad():
            weight.index_fill_(member.axis, torch.tensor(dead), 0.0)


def greedy_width_oracle(model, cuts, step):
    """Widths left after `cuts` cuts, by masking down_proj columns of the least gate and up rows and trying all."""
    layers = model.model.layers
    magnitude = [
        x.mlp.gate_proj.weight.abs().sum(1).double() + x.mlp.up_proj.weight.abs().sum(1).double() for x in layers
    ]
    order = [torch.sort(m, stable=True).indices for m in magnitude]
    gone = [0] * len(layers)
    for _ in range(cuts):
        losses = []
        for i, layer in enumerate(layers):
            if 96 - gone[i] <= step:
                losses.append(float("inf"))
                continue
            before = layer.mlp.down_proj.weight.clone()
            with torch.no_grad():
                layer.mlp.down_proj.weight[:, order[i][: gone[i] + step]] = 0
                losses.append(loss(model))
                layer.mlp.down_proj.weight.copy_(before)
        best = losses.index(min(losses))
        gone[best] += step
        with torch.no_grad():
            layers[best].mlp.down_proj.weight[:, order[best][: gone[best]]] = 0
    return [96 - n for n in gone]


@pytest.mark.parametrize("seed", range(2))
def test_with_a_score_widths_are_those_of_an_exhaustive_oracle(tmp_path, seed):
    model = tiny.model("llama", seed=seed)
    program = pruned(tmp_path, model, "prune.channels", keep=Ratio(2 / 3, "channels"), align=16, score=SCORE)
    counts = [g.count for g in skeleton_of(program).groups if g.kind == "channels"]
    assert counts == greedy_width_oracle(model, cuts=6, step=16)


def test_a_pruned_model_generates_with_cache_as_without(tmp_path):
    model = tiny.model("llama")
    program = pruned(tmp_path, model, "prune.blocks", remove=2)
    made = [
        program.model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)
    ]
    assert torch.equal(*made)


def test_weights_come_back_where_swapping_them_fails_half_way():
    program = capture(tiny.model("llama"))
    before = {name: p.data for name, p in program.model.named_parameters()}
    first, second = "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"
    values = {first: torch.zeros(64, 96), second: torch.zeros(64, 96, device="meta")}
    with pytest.raises(RuntimeError), with_parameters_replaced(program, values):
        raise AssertionError("a meta tensor took the place of weights")
    assert all(p.data.is_set_to(before[name]) for name, p in program.model.named_parameters())


def test_layers_run_their_own_forwards_again_where_binding_fails_half_way():
    program = capture(tiny.model("llama"))
    units = [*program.units.values()]
    with (
        pytest.raises(AttributeError),
        with_units_bound_temporarily(program, [*units[:2], dataclasses.replace(units[2], path="nowhere")]),
    ):
        raise AssertionError("a layer that is nowhere was bound")
    assert not any("forward" in vars(layer) for layer in program.model.model.layers)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers", "gone"), [("jamba", 5, ["4", "3"]), ("bamba", 3, ["0", "2"])])
@pytest.mark.parametrize("search", wide(["exact", "racing"], {"racing"}))
def test_layers_that_the_model_needs_are_no_candidates(tmp_path, name, layers, gone, search):
    model = tiny.model(name, num_hidden_layers=layers)
    program = pruned(tmp_path, model, "prune.blocks", remove=2, unit="layer", search=search)
    cuts = [note["cut"].rpartition(".")[2] for note in program.notes if "cut" in note]
    assert cuts == gone or sorted(cuts) == gone  # jamba's can only go from the end
    assert len(program.model.model.layers) == layers - 2
    assert logits(program.model).isfinite().all()


@pytest.mark.parametrize("keep", [0.9, 0.75, 0.6])
def test_channels_that_go_evenly_leave_the_share_of_params_that_is_asked_for(tmp_path, keep):
    model = tiny.model("llama")
    program = pruned(tmp_path, model, "prune.channels", keep=Ratio(keep, "params"), align=2)
    widths = {m.up_proj.out_features for m in program.model.modules() if hasattr(m, "up_proj")}
    left, step = program.model.num_parameters() / model.num_parameters(), 3 * 3 * 64 * 2 / model.num_parameters()
    assert len(widths) == 1 and keep - step <= left <= keep


def test_params_that_no_width_leaves_are_refused(tmp_path):
    with pytest.raises(Reject, match="the narrowest widths keep"):
        pruned(tmp_path, tiny.model("llama"), "prune.channels", keep=Ratio(0.05, "params"), align=2)


@pytest.mark.parametrize(
    ("name", "changes", "reach"), [("jamba", {}, "33.3%"), ("gemma4_text", {"num_kv_shared_layers": 1}, "0%")]
)
def test_more_layers_than_the_model_can_do_without_are_out_of_reach(tmp_path, name, changes, reach):
    with pytest.raises(Reject) as refused:
        pruned(tmp_path, tiny.model(name, **changes), "prune.blocks", remove=2, unit="layer")
    (found,) = refused.value.diagnostics
    assert found.fault.slug == "out-of-reach" and f"at most {reach}" in found.message


@pytest.mark.slow
def test_a_layer_that_only_others_free_is_counted_when_it_can_go():
    program = capture(tiny.model("jamba", num_hidden_layers=5))
    pool = Layers(program, skeleton_of(program).units, SavingsTable(skeleton_of(program)))
    assert [c.name for c in pool.candidates()] == ["model.layers.4"]
    assert pool.reachable("blocks") == 3
    pool.candidates()[0].cut()
    assert [c.name for c in pool.candidates()] == ["model.layers.3"]
    assert pool.reachable("blocks") == 2


def test_the_last_layer_stays():
    program = capture(tiny.model("llama", num_hidden_layers=2))
    pool = Layers(program, skeleton_of(program).units, SavingsTable(skeleton_of(program)))
    pool.candidates()[0].cut()
    for last in (pool, Layers(program, skeleton_of(program).units, SavingsTable(skeleton_of(program)))):
        assert not last.candidates() and last.reachable("blocks") == 0


def test_rows_of_k_and_v_count_for_every_query_head_that_they_serve():
    program = capture(tiny.model("llama", num_attention_heads=8, num_key_value_heads=2))
    attention = program.model.model.layers[1].self_attn
    (group,) = [g for g in skeleton_of(program).groups if g.kind == "kv_heads" and ".1." in g.site]
    q, k, v = (
        p.weight.abs().double().sum(1).reshape(2, -1).sum(1)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    assert torch.allclose(l1_importance(program, group), q + 4 * k + 4 * v)
    (group,) = [g for g in skeleton_of(program).groups if g.kind == "heads" and ".1." in g.site]
    assert torch.allclose(l1_importance(program, group).reshape(2, 4).sum(1), q)


def test_fused_rows_of_k_and_v_count_as_often():
    """Phi-3 makes q, k and v by one matrix."""
    program = capture(tiny.model("phi3"))
    rows = program.model.model.layers[0].self_attn.qkv_proj.weight.abs().double().sum(1)
    q, k, v = (part.reshape(2, -1).sum(1) for part in rows.split([64, 32, 32]))
    (group,) = [g for g in skeleton_of(program).groups if g.kind == "kv_heads" and ".0." in g.site]
    assert torch.allclose(l1_importance(program, group), q + 2 * k + 2 * v)
