"""Of rows of prompts and answers, whatever learns a next token learns the answers, and is judged by them."""

import json

import pytest
import torch
from effc.dsl.checker.values import DataRef

from tests.passes.test_heal_recipe import building

RECIPE = """effspec 1
model base = zoo("tiny-llama")
data rows = pairs("a.jsonl", prompt: "q", answer: "a", length: 24)
data dev = pairs("b.jsonl", prompt: "q", answer: "a", length: 24)
pipeline lean(base) {{ fit = {step}(data: rows, held_out: dev, steps: 1, batch: 2, {more}) {then} }}
emit lean {{ hf("lean") }}
"""
STEPS = {
    "tune.heal": ('on: "model.layers.0.*.q_proj"', ""),
    "supernet.lora": ('on: "model.layers.0.*.q_proj", ranks: [4, 2]', "whole = supernet.pick(ranks: largest)"),
    "supernet.elastic": ("channels: [100%, 50%]", "whole = supernet.pick(ranks: largest)"),
}


def built(folder, step):
    for name, words in (("a", "king man house day"), ("b", "son hand land people")):
        lines = (json.dumps({"q": f"And what of {word}?", "a": f"The {word} of the LORD"}) for word in words.split())
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    more, then = STEPS[step]
    (folder / "r.effspec").write_text(RECIPE.format(step=step, more=more, then=then))
    return building(folder / "r.effspec", "cache")


@pytest.mark.parametrize("step", ["tune.heal", "supernet.lora"])
def test_adapters_are_judged_by_the_answers_alone(tmp_path, step):
    build = built(tmp_path, step)
    build.run_step_unless_cached(build.plan.stages[0])
    (note,) = [n for n in build.results.outcome.program.notes if "held_out" in n]
    ids, said = (getattr(build.ctx, part)(DataRef("dev")) for part in ("rows", "loss_mask"))
    assert 0.1 < said.float().mean() < 0.7
    with torch.no_grad():  # what starts is the original
        values = build.ctx.origin.load()(input_ids=ids).logits[:, :-1][said[:, 1:]]
    expected = torch.nn.functional.cross_entropy(values, ids[:, 1:][said[:, 1:]]).item()
    assert note["held_out"][0][1] == pytest.approx(expected, rel=1e-4)


def test_widths_are_learned_from_the_answers_alone(tmp_path):
    build = built(tmp_path, "supernet.elastic")
    step = build.ctx.registry.make("pass", build.plan.stages[0].call)
    model = build.ctx.origin.load()
    lesson = step._make_objective(model, build.ctx)
    ids, said = (getattr(build.ctx, part)(DataRef("rows")) for part in ("rows", "loss_mask"))
    with torch.no_grad():
        values = model(input_ids=ids).logits[:, :-1][said[:, 1:]]
    expected = torch.nn.functional.cross_entropy(values, ids[:, 1:][said[:, 1:]]).item()
    assert lesson.accumulate_gradients(torch.arange(len(ids)), 1.0) == pytest.approx(expected, rel=1e-4)
