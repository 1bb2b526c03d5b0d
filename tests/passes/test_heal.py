"""`tune.heal`: what was pruned gets better, in place, and is refused where it doesn't."""

import copy
import hashlib
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from effc.compiler.core.events import Said
from effc.compiler.driver import api
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name
from effc.compiler.ir.capture.capture import capture
from effc.compiler.models.rows.forward import total_nll
from effc.compiler.plugin.registry import Registry
from effc.dsl.checker.recipe import Invocation
from effc.dsl.checker.values import DataRef, Ratio, Selector
from effc.dsl.syntax.diagnostics import Reject
from safetensors.torch import save_file

from tests import tiny
from tests.grids import wide
from tests.recipes_in_memory import SCORE, context_of, recipe_of
from tests.worlds import defaults

ZOO = zoo_folders_by_name()["tiny-llama"]
LORA, FULL = {"method": "lora", "lr": 1e-2}, {"method": "full", "lr": 3e-3}


def rows_of(seed, count=8, length=12):
    """Rows in which every token but the first follows from the one before: there is something to learn."""
    first = torch.randint(3, 128, (count, 1), generator=torch.Generator().manual_seed(seed))
    return torch.cat([(first - 3) * 5**n % 125 + 3 for n in range(length)], dim=1)


def healed(tmp_path, model, before=(), rows=None, other=None, **args):
    """The program after the passes `before` and tune.heal, and the context."""
    facts = {"data": DataRef("rows"), "steps": 30, "batch": 4, "warmup": Ratio(0.1)}
    args = {**defaults("pass", "tune.heal"), **facts, **args}
    tmp_path.mkdir(exist_ok=True)
    recipe = recipe_of([*(("cut", word, facts) for word, facts in before), ("fit", "tune.heal", args)])
    ctx = context_of(tmp_path, model, recipe, rows_of(1) if rows is None else rows)
    save_file({"rows": rows_of(2) if other is None else other}, tmp_path / "other.safetensors")
    recipe.data["other"] = Invocation("tokens", {**recipe.data["rows"].args, "path": "other.safetensors"})
    program = capture(copy.deepcopy(model))
    for step in recipe.pipelines["lean"].steps:
        ctx.registry.make("pass", step.call).run(program, ctx)
    return program, ctx


@pytest.mark.parametrize(("count", "said"), [(3, ["healing: 3 rows for a batch of 4"]), (4, [])])
def test_fewer_rows_than_a_batch_are_told(tmp_path, count, said):
    args = {**defaults("pass", "tune.heal"), "data": DataRef("rows"), "steps": 1, "batch": 4, "method": "full"}
    recipe, model, heard = recipe_of([("fit", "tune.heal", args)]), tiny.model("llama"), []
    ctx = context_of(tmp_path, model, recipe, rows_of(1, count))
    ctx = replace(ctx, settings=replace(ctx.settings, on_event=heard.append))
    ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call).run(capture(model), ctx)
    assert [e.message.partition(",")[0] for e in heard if isinstance(e, Said) and "for a batch" in e.message] == said


def written(tmp_path, heal, cut="prune.channels(keep: 50% of channels, align: 16)"):
    config = tiny.config("llama").to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    path = tmp_path / "heal.effspec"
    path.write_text(f"""effspec 1
model base = config("tiny.json", seed: 3)
data  rows = synthetic(6, length: 12, seed: 1)

pipeline lean(base) {{
  thin = {cut}
  fit  = {heal}
}}

emit lean {{ hf("lean", form: compact) }}
""")
    return path


def loss(model, rows=None):
    nats, tokens = total_nll(model, rows_of(1) if rows is None else rows)
    return nats / tokens


def refused(tmp_path, model, **args):
    with pytest.raises(Reject) as caught:
        healed(tmp_path, model, **args)
    (diagnostic,) = caught.value.diagnostics
    return diagnostic


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("facts", [LORA, pytest.param(FULL, marks=pytest.mark.heavy)], ids=["lora", "full"])
def test_a_healed_model_predicts_better_and_is_the_same_tree(tmp_path, name, facts):
    model = tiny.model(name)
    program, _ = healed(tmp_path, model, **facts)
    assert loss(program.model) < 0.8 * loss(model)
    tree = [(path, type(module), module.training) for path, module in model.named_modules()]
    assert [(path, type(module), module.training) for path, module in program.model.named_modules()] == tree
    flags = [(n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()]
    assert [(n, p.shape, p.dtype, p.requires_grad) for n, p in program.model.named_parameters()] == flags
    assert all(p.grad is None for p in program.model.parameters())
    (note,) = program.notes
    assert note["steps"] == note["best"] == 30 and note["loss"][-1][1] < note["loss"][0][1]
    assert json.loads(json.dumps(note))["trained"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("facts", [LORA, FULL], ids=["lora", "full"])
def test_layers_that_lost_a_branch_run_their_edited_graphs_while_they_heal(tmp_path, facts):
    model = tiny.model("llama")
    cut = ("prune.blocks", {"remove": 2, "score": SCORE})
    program, _ = healed(tmp_path, model, before=[cut], **facts)
    pruned, _ = healed(tmp_path, model, before=[cut], steps=1, lr=1e-12)
    assert any(unit.edited for unit in program.units.values())
    assert loss(program.model) < 0.8 * loss(pruned.model)
    assert set(program.model.state_dict()) == set(pruned.model.state_dict())


@pytest.mark.parametrize("facts", [LORA, FULL], ids=["lora", "full"])
def test_a_bfloat16_model_heals_and_stays_one(tmp_path, facts):
    model = tiny.model("llama").bfloat16()
    program, _ = healed(tmp_path, model, **facts)
    assert {p.dtype for p in program.model.parameters()} == {torch.bfloat16}
    assert loss(program.model) < 0.8 * loss(model)


def test_only_what_is_selected_is_trained(tmp_path):
    on = Selector((("|", "layers.1.mlp.{up,down}_proj"),))
    model = tiny.model("llama")
    for facts in (LORA, FULL):
        program, _ = healed(tmp_path / facts["method"], model, on=on, **facts)
        start = model.state_dict()
        moved = {n for n, t in program.model.state_dict().items() if not torch.equal(t, start[n])}
        assert moved == {"model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"}


@pytest.mark.parametrize("facts", [LORA, FULL], ids=["lora", "full"])
def test_tied_embeddings_stay_tied(tmp_path, facts):
    program, _ = healed(tmp_path, tiny.model("llama", tie_word_embeddings=True), **facts)
    assert program.model.lm_head.weight is program.model.model.embed_tokens.weight


@pytest.mark.slow
def test_the_seed_decides_the_result_bit_for_bit(tmp_path):
    first, again, other = (
        healed(tmp_path / name, tiny.model("llama"), batch=batch, **LORA)[0].model.state_dict()
        for name, batch in (("a", 4), ("b", 4), ("c", 3))
    )
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize("name, before", [("llama", [("prune.blocks", {"remove": 1, "score": SCORE})]), ("gpt2", [])])
def test_gradient_checkpointing_gives_the_same_weights(tmp_path, name, before):
    model, seen = tiny.model(name), []
    for turn, again in enumerate((False, True)):
        program, _ = healed(tmp_path / str(turn), model, before, steps=4, gradient_checkpointing=again, **LORA)
        layer = next(iter(program.units.values())).module(program.model)
        assert not layer.gradient_checkpointing and "_gradient_checkpointing_func" not in vars(layer)
        seen.append(program.model.state_dict())
    assert all(torch.allclose(seen[0][n], seen[1][n], atol=1e-6) for n in seen[0])


@pytest.mark.slow
def test_distilled_alone_a_model_comes_closer_to_the_original(tmp_path):
    model, cut = tiny.model("llama"), ("prune.channels", {"keep": Ratio(0.5, "channels"), "align": 16})

    def apart(program):
        with torch.no_grad():
            ours, theirs = (m(rows_of(1)).logits.log_softmax(-1) for m in (program.model, model))
        return torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True).item()

    pruned, _ = healed(tmp_path / "a", model, before=[cut], steps=1, lr=1e-12)
    told, _ = healed(tmp_path / "b", model, before=[cut], **FULL)
    taught, _ = healed(tmp_path / "c", model, before=[cut], distill=Ratio(1.0), temperature=2.0, **FULL)
    assert apart(taught) < 0.5 * apart(pruned) < apart(told)


def test_the_best_weights_by_held_out_data_are_the_ones_that_stay(tmp_path):
    program, _ = healed(
        tmp_path, tiny.model("llama"), held_out=DataRef("other"), every=3, patience=2, steps=90, method="full", lr=1e-2
    )
    (note,) = program.notes
    looks = dict(note["held_out"])
    assert 0 < note["best"] < note["steps"] < 90
    assert min(looks, key=looks.get) == note["best"]
    assert loss(program.model, rows_of(2)) == looks[note["best"]]


def test_merged_adapters_are_judged_once_more(tmp_path):
    program, _ = healed(tmp_path, tiny.model("llama"), held_out=DataRef("other"), every=5, **LORA)
    (note,) = program.notes
    assert note["merged"] == loss(program.model, rows_of(2))
    assert note["merged"] == pytest.approx(dict(note["held_out"])[note["best"]], abs=1e-4)


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("facts", [LORA, FULL], ids=["lora", "full"])
def test_training_that_helps_nothing_is_refused_and_says_how_it_went(tmp_path, facts):
    backwards = rows_of(1).flip(1)  # what is learned forwards is wrong backwards
    start = tiny.model("llama")
    learned, _ = healed(tmp_path / "a", start, rows=backwards, steps=60, **FULL)
    said = refused(
        tmp_path / "b", learned.model, other=backwards, held_out=DataRef("other"), every=5, patience=2, **facts
    )
    assert said.slug == "not-healed" and said.exit == 1
    assert "healing did not help" in said.note and "after 10" in said.note and "lower `lr`" in said.help


def test_a_rate_at_which_nothing_moves_is_to_be_raised(tmp_path):
    said = refused(tmp_path, tiny.model("llama"), lr=1e-15, held_out=DataRef("other"), every=5, patience=2)
    assert said.slug == "not-healed" and "raise `lr`" in said.help


def test_a_rate_that_makes_the_loss_nan_is_named(tmp_path):
    said = refused(tmp_path, tiny.model("llama"), lr=1e20, method="full")
    assert (said.slug, said.exit) == ("diverged", 1) and "lower `lr`" in said.help


def test_a_model_that_is_broken_before_it_is_trained_is_not_blamed_on_the_rate(tmp_path):
    model = tiny.model("llama")
    model.model.norm.weight.data.fill_(math.inf)
    said = refused(tmp_path, model)
    assert said.slug == "diverged" and "before it is trained" in said.help


def test_rows_of_one_token_teach_nothing(tmp_path):
    assert refused(tmp_path, tiny.model("llama"), rows=rows_of(1, length=1)).slug == "bad-rows"


def test_data_does_not_judge_what_it_taught(tmp_path):
    said = refused(tmp_path, tiny.model("llama"), other=rows_of(1), held_out=DataRef("rows"))
    assert said.slug == "held-out-learned"


def test_a_tied_output_layer_gets_no_adapter(tmp_path):
    model = tiny.model("llama", tie_word_embeddings=True)
    assert refused(tmp_path, model, on=Selector((("|", "lm_head"),))).slug == "tied-adapter"


def test_a_disk_without_room_for_checkpoints_is_told_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    said = refused(tmp_path, tiny.model("llama"), lr=1e20, method="full")  # this rate would be told next
    assert (said.slug, said.exit) == ("no-room", 6)


def test_the_example_of_the_page_is_a_legal_step(tmp_path):
    doc = Registry().vocabulary.word("pass", "tune.heal").doc
    (step,) = (line.partition("fit = ")[2] for line in doc.splitlines() if line.startswith("Example: "))
    path = written(tmp_path, step)
    more = "data  calib = synthetic(8)\ndata  dev = synthetic(2)\n"
    path.write_text(path.read_text().replace("data  rows", f"{more}data  rows"))
    assert [d.slug for d in api.check(path).diagnostics if d.severity == "error"] == []


@pytest.mark.parametrize("wrong", ["steps: 0", "lr: 0", "batch: 0", "distill: 120%", "rank: 0", "temperature: 0"])
def test_senseless_numbers_are_refused_by_check(tmp_path, wrong):
    given = "" if wrong.startswith("steps") else "steps: 5, "
    path = written(tmp_path, f"tune.heal(data: rows, {given}{wrong})")
    assert "out-of-range" in {d.slug for d in api.check(path).diagnostics}


# -- a model that has learned something ----------------------------------------------------------------------


@pytest.mark.parametrize("method, lr", wide([("lora", "5e-3"), ("full", "2e-3")], {("full", "2e-3")}))
@pytest.mark.slow
def test_the_zoo_model_gets_back_most_of_what_pruning_took(tmp_path, method, lr):
    path = tmp_path / "heal.effspec"
    path.write_text(f"""effspec 1
model base    = zoo("tiny-llama")
data  calib   = text("{ZOO}/calib.txt", length: 64)
data  heldout = text("{ZOO}/heldout.txt", samples: 32, length: 64, seed: 7)
pipeline lean(base) {{
  thin = prune.channels(keep: 60% of channels, align: 32)
  fit  = tune.heal(data: calib, method: {method}, steps: 24, lr: {lr}, batch: 8)
}}
emit lean {{ hf("lean") }}
""")
    weights = hashlib.sha256((ZOO / "model.safetensors").read_bytes()).hexdigest()
    session = api.open_session(path, cache_dir=tmp_path / "cache", threads=1)
    (plan,) = api.plan_all_pipelines(session)
    ctx = session.context(plan.recipe, plan.pipeline)
    ctx.workdir = tmp_path / "work"
    program = capture(ctx.origin.load())
    rows, lost = ctx.rows(DataRef("heldout")), []
    lost.append(loss(program.model, rows))
    for stage in plan.stages:
        ctx.registry.make("pass", stage.call).run(program, ctx)
        lost.append(loss(program.model, rows))
    original, pruned, healed_ = lost
    assert pruned > original + 1.0
    assert pruned - healed_ > 0.5 * (pruned - original)
    assert hashlib.sha256((ZOO / "model.safetensors").read_bytes()).hexdigest() == weights  # trained a private copy
