"""Tokens that metrics count: those behind a cache, and none of the padding of rows."""

import json

import pytest
import torch
from effc.compiler.apps.federation.rows import rows_of
from effc.compiler.inputs.sources.hf import Hf
from effc.dsl.checker.values import DataRef
from effc.dsl.syntax.diagnostics import Reject

from tests import tiny, worlds

NOISE = DataRef("noise")
torch.set_num_threads(1)


def context_of(folder, kind: str):
    tiny.model(kind).save_pretrained(folder / "m")
    worlds.tokenizer(folder / "m")
    origin = Hf(name="./m").resolve(worlds.context(folder))
    return worlds.context(folder, origin, {"noise": ("synthetic", {"count": 5, "length": 12, "seed": 3})})


def measure(ctx, model, data: DataRef, decoded: int) -> float:
    return ctx.registry.import_plugin_class("metric", "perplexity")(data=data, decoded=decoded).measure(model, ctx)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba2"])
def test_perplexity_while_decoding_is_that_of_the_last_tokens(tmp_path, kind):
    ctx = context_of(tmp_path, kind)
    model, rows = ctx.origin.load(), ctx.rows(NOISE)
    with torch.no_grad():
        said = model(rows, use_cache=False).logits.double().log_softmax(-1)
    for decoded in (1, 4, 11):
        nats = -said[:, -decoded - 1 : -1].gather(-1, rows[:, -decoded:, None])
        assert measure(ctx, model, NOISE, decoded) == pytest.approx(nats.mean().exp().item(), rel=1e-4)


def test_perplexity_while_decoding_needs_a_prompt_and_text(tmp_path):
    ctx = context_of(tmp_path, "llama")
    model = ctx.origin.load()
    with pytest.raises(Reject, match="`decoded: 12` leaves no prompt: rows of `noise` have 12 tokens"):
        measure(ctx, model, NOISE, 12)
    worlds.tokenizer(worlds.llama(tmp_path / "bytes"))
    origin = Hf(name="./bytes").resolve(worlds.context(tmp_path))
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "ask", "answer": "yes"}))
    pairs = worlds.context(tmp_path, origin, {"qa": ("pairs", {"path": str(file), "length": 24, "join": " "})})
    with pytest.raises(Reject, match="rows of `qa` are of another kind, or padded"):
        measure(pairs, origin.load(), DataRef("qa"), 2)


def test_perplexity_of_padded_texts_is_that_of_each_text_alone(tmp_path):
    worlds.tokenizer(worlds.llama(tmp_path / "bytes"))
    origin = Hf(name="./bytes").resolve(worlds.context(tmp_path))
    (tmp_path / "t.txt").write_text("short\na longer line than that\nmid line\n")
    (tmp_path / "l.jsonl").write_text('{"text": "short", "label": 0}\n{"text": "a longer line", "label": 1}\n')
    data = {
        "lines": ("texts", {"path": str(tmp_path / "t.txt"), "length": 40}),
        "classes": ("labels", {"path": str(tmp_path / "l.jsonl"), "classes": ("0", "1"), "length": 24}),
    }
    ctx, model = worlds.context(tmp_path, origin, data), origin.load()
    for name in data:
        rows, lengths = ctx.rows(DataRef(name)), ctx.prompts(DataRef(name)).tolist()
        assert min(lengths) < rows.shape[1]
        assert rows_of(name, ctx).speech.sum(1).tolist() == lengths, "clients of a federation learn no padding"
        with torch.no_grad():
            texts = [row[None, :n] for row, n in zip(rows, lengths, strict=True)]
            losses = [model(text, labels=text).loss * (text.shape[1] - 1) for text in texts]
        alone = (sum(losses) / (sum(lengths) - len(lengths))).exp().item()
        metric = ctx.registry.import_plugin_class("metric", "perplexity")(data=DataRef(name))
        assert metric.measure(model, ctx) == pytest.approx(alone, rel=1e-4)
        with pytest.raises(Reject, match=f"rows of `{name}` are of another kind, or padded"):
            measure(ctx, model, DataRef(name), 2)


def test_predictions_behind_a_text_are_not_compared_with_the_originals(tmp_path):
    worlds.tokenizer(worlds.llama(tmp_path / "bytes"))
    origin = Hf(name="./bytes").resolve(worlds.context(tmp_path))
    (tmp_path / "t.txt").write_text("short\na longer line than that\n")
    ctx = worlds.context(tmp_path, origin, {"lines": ("texts", {"path": str(tmp_path / "t.txt"), "length": 40})})
    original, model, data = origin.load(), origin.load(), DataRef("lines")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3 * p.std())
    rows, lengths = ctx.rows(data), ctx.prompts(data).tolist()
    nats, same = [], []
    with torch.no_grad():
        for row, length in zip(rows, lengths, strict=True):
            p, q = (m(row[None, :length]).logits[0].double().log_softmax(-1) for m in (original, model))
            nats += (p.exp() * (p - q)).sum(-1).tolist()
            same += (p.argmax(-1) == q.argmax(-1)).tolist()
    divergence, agreement = (
        ctx.registry.import_plugin_class("metric", name)(data=data).measure(model, ctx)
        for name in ("divergence", "agreement")
    )
    assert divergence == pytest.approx(sum(nats) / len(nats), rel=1e-3)
    assert agreement == pytest.approx(sum(same) / len(same)) and 0 < agreement < 1


def test_perplexity_while_decoding_is_refused_without_a_cache(tmp_path):
    ctx = context_of(tmp_path, "rwkv")
    assert worlds.slug(lambda: measure(ctx, ctx.origin.load(), NOISE, 4)) == "no-cache"
