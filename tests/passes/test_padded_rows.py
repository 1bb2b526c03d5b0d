"""Passes that look at what modules are given: what fills up rows of `labels` changes nothing."""

import json

import pytest
import torch
from effc.compiler.inputs.sources.hf import Hf
from effc.compiler.ir.capture.capture import capture
from effc.dsl.checker.recipe import Invocation
from effc.dsl.checker.values import DataRef, MetricRef, Ratio

from tests import worlds

TEXTS = [(f"{a}{'x' * n}", "up" if a < "m" else "down") for a in "abcdnopq" for n in (0, 1, 2)]
TRAIN = DataRef("train")


@pytest.mark.parametrize("reorder", ["wanda", "obs"])
@pytest.mark.slow
def test_pruned_and_repaired_weights_do_not_depend_on_the_length_that_rows_are_filled_up_to(tmp_path, reorder):
    worlds.classifier(tmp_path / "m")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": t, "label": c}) for t, c in TEXTS))
    origin = Hf(name=str(tmp_path / "m")).resolve(worlds.context(tmp_path))
    step = {
        "remove": Ratio(0.2, "params"),
        "order": ("channels",),
        "group": 8,
        "reorder": reorder,
        "score": MetricRef("accuracy", (("data", TRAIN),)),
        "data": TRAIN,
        "search": "exact",
        "repair": True,
    }
    call = Invocation("prune.multi", {**worlds.defaults("pass", "prune.multi"), **step})
    states = []
    for length in (8, 24):
        about = {"path": "train.jsonl", "classes": ("down", "up"), "length": length}
        ctx = worlds.context(tmp_path, origin, {"train": ("labels", about)})
        ctx.workdir = tmp_path / str(length)
        ctx.workdir.mkdir()
        program = capture(ctx.origin.load())
        ctx.registry.make("pass", call).run(program, ctx)
        states.append(program.model.state_dict())
    short, long = states
    assert all(torch.allclose(short[name], long[name], rtol=1e-3, atol=1e-4) for name in short)  # sums in another order
