"""`tune.reft` on rows with classes: the head learns along, the body stays."""

import json

import pytest
import torch
from effc.compiler.inputs.sources.hf import Hf
from effc.compiler.ir.capture.capture import capture
from effc.dsl.checker.recipe import Invocation
from effc.dsl.checker.values import DataRef, MetricRef, Ratio

from tests import worlds

TEXTS = [(f"{a}{b}{'x' * n}", "up" if a < "m" else "down") for a in "abcdnopq" for b in "efgh" for n in (0, 3)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    worlds.classifier(folder / "m")
    for name, part in (("train", TEXTS[::2]), ("dev", TEXTS[1::2])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t, "label": c}) for t, c in part))
    return folder


def context(home, work, **changes):
    origin = Hf(name=str(home / "m")).resolve(worlds.context(home))
    about = {"classes": ("down", "up"), "length": 8, **changes}
    made = worlds.context(home, origin, {n: ("labels", {"path": f"{n}.jsonl", **about}) for n in ("train", "dev")})
    made.workdir = work
    return made


def taught(ctx, **train):
    program = capture(ctx.origin.load())
    args = {"data": DataRef("train"), "steps": 25, "batch": 8, "lr": 2e-2, "warmup": Ratio(0.1), **train}
    for word, given in (("reft.insert", {"positions": "f1+l1", "rank": 2}), ("tune.reft", args)):
        call = Invocation(word, {**worlds.defaults("pass", word), **given})
        ctx.registry.make("pass", call).run(program, ctx)
    return program


def naive_accuracy(model, ctx, part):
    right = 0
    with torch.no_grad():
        for text, label in part:
            ids = torch.tensor([ctx.tokenizer(text)["input_ids"]])
            right += ("down", "up")[int(model(ids).logits.argmax())] == label
    return right / len(part)


@pytest.mark.slow
def test_classes_are_learned_by_edits_and_head_while_the_body_stays(home, tmp_path):
    ctx = context(home, tmp_path)
    program, base = taught(ctx, steps=80), ctx.origin.load()
    metric = ctx.metric(MetricRef("accuracy", (("data", DataRef("dev")),)))
    before, after = metric.measure(base, ctx), metric.measure(program.model, ctx)
    assert after > 0.9 > before
    assert after == naive_accuracy(program.model, ctx, TEXTS[1::2])
    assert before == naive_accuracy(base.eval(), ctx, TEXTS[1::2])
    state = program.model.state_dict()
    moved = {n for n, t in base.state_dict().items() if not torch.equal(t, state[n])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_the_best_look_at_held_out_rows_is_kept(home, tmp_path):
    program = taught(context(home, tmp_path), held_out=DataRef("dev"), every=5)
    note = program.notes[-1]
    assert note["best"] == min(note["held_out"], key=lambda look: look[1])[0] > 0


def test_fewer_samples_keep_their_classes(home, tmp_path):
    some = context(home, tmp_path, samples=6, seed=3)
    rows, labels, lengths = (ask(DataRef("train")) for ask in (some.rows, some.labels, some.prompts))
    for row, label, n in zip(rows, labels, lengths, strict=True):
        text = some.tokenizer.decode(row[1:n])
        assert dict(TEXTS)[text] == ("down", "up")[label]


@pytest.mark.parametrize(
    "changes, slug",
    [
        ({"classes": ("down", "left")}, "unknown-class"),
        ({"length": 2}, "text-too-long"),
        ({"classes": ("down", "left", "up")}, "other-classes"),
    ],
)
def test_rows_that_fit_no_class_or_no_row_are_refused(home, tmp_path, changes, slug):
    assert worlds.slug(lambda: taught(context(home, tmp_path, **changes))) == slug
