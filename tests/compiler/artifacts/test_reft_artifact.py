"""The target `reft`: interventions without their model, which go onto it again and onto no other."""

import copy
import json
from pathlib import Path

import pytest
import torch
from effc.compiler.artifacts import reft
from effc.compiler.artifacts.load import load
from effc.compiler.driver import api
from effc.compiler.driver.models import is_artifact
from effc.compiler.inputs.sources.hf import Hf
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.layers.reft import interventions
from effc.compiler.targets.hf import write_compact_checkpoint
from effc.compiler.targets.reft import Reft
from effc.dsl.checker.recipe import Invocation
from effc.dsl.checker.values import Ratio
from effc.dsl.syntax.render import render

from tests import worlds

RECIPE = Path(__file__).parents[3] / "recipes" / "llm" / "reft.effspec"
NARROW = ("prune.channels", {"keep": Ratio(0.5, "channels"), "align": 8})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reft")
    worlds.tokenizer(worlds.llama(folder / "m"))
    return folder


@pytest.fixture
def ctx(home):
    return worlds.context(home, Hf(name=str(home / "m")).resolve(worlds.context(home)))


def edited(ctx, *before):
    """The program after steps and an insertion, with numbers as training might leave them."""
    program = capture(ctx.origin.load())
    for word, args in (*before, ("reft.insert", {"positions": "f2+l2", "rank": 3, "tied": False})):
        ctx.registry.make("pass", Invocation(word, {**worlds.defaults("pass", word), **args})).run(program, ctx)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, module in interventions(program.model):
            for p in module.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
            for function in module.functions.values():
                function.store_orthonormal_rows()
    return program


def written(program, ctx, tmp_path, base="auto"):
    into = tmp_path / "out"
    into.mkdir()
    Reft(path="out", base=base).emit(program, into, ctx)
    return into / reft.FOLDER


def ids():
    return torch.randint(3, 261, (2, 9), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


def test_interventions_alone_go_onto_their_base_again(ctx, tmp_path):
    program = edited(ctx)
    folder = written(program, ctx, tmp_path)
    assert sorted(f.name for f in folder.parent.rglob("*") if f.is_file()) == [
        "model.safetensors",
        "notes.json",
        "reft.json",
    ]
    assert (folder / "model.safetensors").stat().st_size < 8000
    again = load(folder)
    assert torch.equal(logits(again), logits(program.model)) and not again.training
    assert is_artifact(folder.parent / "reft") or (folder.parent / "manifest.json").is_file() is False


def test_layers_that_are_alike_share_a_stored_graph(ctx, tmp_path):
    body = json.loads((written(edited(ctx), ctx, tmp_path) / "reft.json").read_text())
    assert len(body["graphs"]) == 1 and set(body["edits"]["graphs"].values()) == {0}


def test_a_changed_base_travels_inside(ctx, tmp_path):
    program = edited(ctx, NARROW)
    before = logits(program.model)
    folder = written(program, ctx, tmp_path)
    assert torch.equal(logits(program.model), before)  # they are in again
    assert torch.equal(logits(load(folder)), before)
    plain = load(folder.parent / "base" / "compact")
    assert not list(interventions(plain)) and not torch.equal(logits(plain), before)


def test_the_base_can_be_given_as_a_model_or_a_folder(ctx, home, tmp_path):
    program = edited(ctx)
    folder = written(program, ctx, tmp_path)
    body = json.loads((folder / "reft.json").read_text())
    body["base"]["place"] = str(tmp_path / "gone")
    (folder / "reft.json").write_text(json.dumps(body))
    assert worlds.slug(lambda: load(folder)) == "no-base"
    assert worlds.slug(lambda: load(folder, base=tmp_path)) == "no-artifact"
    for base in (home / "m", ctx.origin.load()):
        assert torch.equal(logits(load(folder, base=base)), logits(program.model))


def test_another_base_is_refused(ctx, home, tmp_path):
    folder = written(edited(ctx), ctx, tmp_path)
    other = ctx.origin.load()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    assert worlds.slug(lambda: load(folder, base=other)) == "other-base"
    narrow = edited(ctx, NARROW)
    assert worlds.slug(lambda: load(folder, base=narrow.model)) == "other-base"  # and has some already


@pytest.mark.parametrize("before", [(), (NARROW,)], ids=["own base", "changed base"])
def test_a_loaded_model_saves_itself_with_its_interventions(ctx, tmp_path, before):
    program = edited(ctx, *before)
    model = load(written(program, ctx, tmp_path))
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.allclose(logits(again), logits(program.model), atol=1e-5)  # mapped weights lie elsewhere
    again.train()
    again(ids(), labels=ids()).loss.backward()
    torch.optim.AdamW([p for _, m in interventions(again) for p in m.parameters()], lr=0.1).step()
    for _, module in interventions(again):
        for function in module.functions.values():
            assert torch.allclose(function.projection_rows() @ function.projection_rows().T, torch.eye(3), atol=1e-5)


@pytest.mark.parametrize(
    "change, slug",
    [
        (lambda b: b.update(format=9), "no-interventions"),
        (lambda b: b.update(graphs=[]), "no-interventions"),
        (lambda b: b["base"].pop("sha256"), "no-interventions"),
        (lambda b: b["edits"]["attributes"].update({"config.vocab_size": 3}), "no-interventions"),
        (
            lambda b: b["edits"]["swapped"].update({"model.norm": {"class": "KernelLinear", "spec": {}}}),
            "no-interventions",
        ),
        (lambda b: b["edits"]["swapped"].popitem(), "no-interventions"),
        (
            lambda b: b["edits"]["swapped"].update({"model.layers.0.reft": {"class": "os:system", "spec": {}}}),
            "refused-edits",
        ),
        (lambda b: next(iter(b["edits"]["swapped"].values()))["spec"].update(rank=0), "refused-edits"),
        (lambda b: next(iter(b["edits"]["swapped"].values()))["spec"].update(rank=2), "no-interventions"),
    ],
)
def test_a_damaged_or_hostile_folder_is_refused_by_name(ctx, tmp_path, change, slug):
    folder = written(edited(ctx), ctx, tmp_path)
    body = json.loads((folder / "reft.json").read_text())
    change(body)
    (folder / "reft.json").write_text(json.dumps(body))
    assert worlds.slug(lambda: load(folder)) == slug


def test_a_model_without_interventions_is_none_to_write(ctx, tmp_path):
    program = capture(ctx.origin.load())
    assert worlds.slug(lambda: written(program, ctx, tmp_path)) == "nothing-to-write"


def test_other_artifacts_go_onto_no_base(ctx, tmp_path):
    write_compact_checkpoint(edited(ctx), tmp_path, ctx, 1 << 40)
    assert worlds.slug(lambda: load(tmp_path / "compact", base=ctx.origin.load())) == "other-kind"


def test_a_copy_of_a_model_asks_its_own_prompts(ctx):
    one = edited(ctx).model
    two = copy.deepcopy(one)
    long = torch.randint(3, 261, (1, 20))
    with torch.no_grad():
        one(long)  # what one reads is no business of the other
        assert torch.equal(logits(two), logits(one))
    mine = {id(module.prompts) for model in (one, two) for _, module in interventions(model)}
    assert len(mine) == 2


# -- in recipes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, held",
    [
        ("hf", True),
        ("reft", True),
        ("native", False),
        ("pt2", False),
        ("pruning_config", False),
        ('hf("x", form: stock)', False),
    ],
)
def test_targets_that_can_not_hold_interventions_say_so_before_anything_runs(tmp_path, target, held):
    call = target if "(" in target else f'{target}("x")'
    path = tmp_path / "r.effspec"
    path.write_text(
        f'effspec 1\nmodel base = zoo("tiny-llama")\npipeline p(base) {{\n'
        f"  edits = reft.insert(rank: 2)\n}}\nemit p {{ {call} }}\n"
    )
    found = api.open_session(path, cache_dir=tmp_path).check().diagnostics
    assert {d.slug for d in found} == (set() if held else {"cannot-hold"}), render(found)


def test_training_comes_after_inserting(tmp_path):
    path = tmp_path / "r.effspec"
    path.write_text(
        'effspec 1\nmodel base = zoo("tiny-llama")\ndata d = pairs("d.jsonl", length: 8)\n'
        "pipeline p(base) {\n  fit = tune.reft(data: d)\n  edits = reft.insert(rank: 2)\n}\n"
        'emit p { hf("x") }\n'
    )
    assert "wrong-order" in {d.slug for d in api.open_session(path, cache_dir=tmp_path).check().diagnostics}


@pytest.mark.heavy
def test_the_shipped_recipe_teaches_the_zoo_to_tell_speech_from_deeds(tmp_path):
    (result,) = api.compile(RECIPE, tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
    assert not result.missed
    folder = result.artifacts[0].path
    again = load(folder)
    assert len(list(interventions(again))) == 8
    text = (folder / "README.md").read_text()
    assert "`reft/`" in text and "zoo:tiny-llama" in text
