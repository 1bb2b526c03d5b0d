"""supernet.elastic: which channels stay in a narrower choice, by weights or by what they do on rows."""

import json

import pytest
import torch
from effc.compiler.inputs.sources.hf import Hf
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.outcome import Model
from effc.dsl.checker.recipe import Invocation
from effc.dsl.checker.values import DataRef, Ratio

from tests import tiny, worlds
from tests.passes.test_heal import rows_of
from tests.passes.test_supernet import ROWS, through

HALVES = [Ratio(1.0), Ratio(0.5)]
TEXTS = [(f"{a}{'x' * n}", "up" if a < "m" else "down") for a in "abcdnopq" for n in (0, 1, 2)]


@pytest.mark.parametrize(("reorder", "same"), [("l1", False), ("wanda", True), ("obs", True)])
def test_channels_that_nothing_reads_go_first_unless_their_own_weights_decide(tmp_path, reorder, same):
    model, ids = tiny.model("llama"), rows_of(3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::2] = 0
            layer.mlp.up_proj.weight[::2] *= 10
        start = model(ids).logits
        net = {"channels": HALVES, "align": 1, "data": ROWS, "steps": 0, "reorder": reorder}
        family = through(tmp_path, model, ("supernet.elastic", net))
        half = family.cut_program_to_choice(family.space.choice("smallest"))
        assert half.model.model.layers[0].mlp.up_proj.out_features == model.config.intermediate_size // 2
        assert torch.allclose(half.model(ids).logits, start, atol=1e-5) == same


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    worlds.classifier(folder / "m")
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": t, "label": c}) for t, c in TEXTS))
    return folder


def orders_of(folder, work, length, **args):
    origin = Hf(name=str(folder / "m")).resolve(worlds.context(folder))
    about = {"path": "train.jsonl", "classes": ("down", "up"), "length": length}
    ctx = worlds.context(folder, origin, {"train": ("labels", about)})
    ctx.workdir = work / str(length)
    ctx.workdir.mkdir()
    net = {"channels": HALVES, "heads": HALVES, "align": 1, "data": DataRef("train"), "steps": 0, **args}
    call = Invocation("supernet.elastic", {**worlds.defaults("pass", "supernet.elastic"), **net})
    return ctx.registry.make("pass", call).result_of(Model(capture(ctx.origin.load())), ctx).orders


@pytest.mark.parametrize("reorder", ["wanda", "obs"])
def test_the_order_of_channels_and_heads_does_not_see_the_padding_of_rows(classifier, tmp_path, reorder):
    short, long = (orders_of(classifier, tmp_path, length, reorder=reorder) for length in (8, 24))
    assert len(short) == 4 and short == long
