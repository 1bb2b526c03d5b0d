"""Metrics: naive twins, fixed points, bad numbers, and the original's kept outputs."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from effc.compiler.evaluation import reference
from effc.compiler.inputs.sources.config import Config
from effc.compiler.inputs.sources.hf import Hf
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name
from effc.compiler.models.rows import forward as evaluate
from effc.dsl.checker.values import DataRef
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny, worlds

NOISE = DataRef("noise")
torch.set_num_threads(1)  # tests run side by side: threads that wait for each other take 100 times longer


@pytest.fixture
def ctx(tmp_path):
    worlds.tokenizer(worlds.llama(tmp_path / "m"))
    origin = Hf(name="./m").resolve(worlds.context(tmp_path))
    return worlds.context(tmp_path, origin, {"noise": ("synthetic", {"count": 5, "length": 12, "seed": 3})})


@pytest.fixture
def model(ctx):
    return ctx.origin.load()


def measure(ctx, name: str, model, **args) -> float:
    return ctx.registry.import_plugin_class("metric", name)(**args).measure(model, ctx)


def disturbed(ctx, by: float = 0.3):
    """The original with noise on one layer, a copy of its own."""
    model, generator = ctx.origin.load(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        w = model.model.layers[1].mlp.down_proj.weight
        w.copy_(w + by * w.std() * torch.randn(w.shape, generator=generator))
    return model


def naive_log_probs(model, rows) -> torch.Tensor:
    """[n, t, vocab] float64, one prefix at a time."""
    with torch.no_grad():
        return torch.stack(
            [
                torch.stack([model(row[None, : k + 1]).logits[0, -1].double().log_softmax(-1) for k in range(len(row))])
                for row in rows
            ]
        )


# -- perplexity ----------------------------------------------------------------------------------------------


def test_perplexity_equals_a_loop_over_tokens(ctx, model):
    rows = ctx.rows(NOISE)
    said = naive_log_probs(model, rows)
    nats = [-said[r, k, rows[r, k + 1]].item() for r in range(5) for k in range(11)]
    assert measure(ctx, "perplexity", model, data=NOISE) == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)


def test_perplexity_of_pairs_is_of_answers_and_their_end_alone(tmp_path, model):
    pairs = [("ask", "yes"), ("a longer one", "no")]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": asked, "answer": said}) + "\n" for asked, said in pairs))
    origin = Hf(name="./m").resolve(worlds.context(tmp_path))
    ctx = worlds.context(tmp_path, origin, {"qa": ("pairs", {"path": str(file), "length": 24, "join": " "})})
    nats = []
    for row, (asked, said) in zip(ctx.rows(DataRef("qa")), pairs, strict=True):
        first = 1 + len(asked)  # a token a byte, <s> before them
        for k in range(first, first + len(f" {said}") + 1):  # and </s> behind
            with torch.no_grad():
                nats.append(-model(row[None, :k]).logits[0, -1].double().log_softmax(-1)[row[k]].item())
    assert len(nats) == 5 + 4
    assert measure(ctx, "perplexity", model, data=DataRef("qa")) == pytest.approx(math.exp(sum(nats) / 9), rel=1e-5)


@given(batch=st.integers(1, 7), chunk=st.integers(1, 40))
@settings(deadline=None, max_examples=20)
def test_neither_batches_nor_chunks_change_a_loss(batch, chunk):
    model = tiny.model("llama")
    rows = torch.randint(128, (7, 9), generator=torch.Generator().manual_seed(0))
    whole = evaluate.total_nll(model, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "BATCH_BYTES", batch * 9 * 128 * 4)
        patch.setattr(evaluate, "CHUNK_BYTES", chunk * 128 * 4)
        parts = evaluate.total_nll(model, rows)
    assert parts[1] == whole[1] == 7 * 8
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)  # float32 rounding of other batch sizes


def test_a_uniform_model_is_as_surprised_as_it_has_words(ctx, model):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert measure(ctx, "perplexity", model, data=NOISE) == pytest.approx(worlds.VOCABULARY, rel=1e-6)


def test_the_loss_is_float32_whatever_the_model_computes_in():
    values = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = evaluate.token_losses(values, torch.tensor([1, 2, 3]))
    exact = torch.nn.functional.cross_entropy(values.double(), torch.tensor([1, 2, 3]), reduction="none")
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), exact, rtol=1e-6)


def test_measuring_leaves_the_model_as_it_was(ctx, model):
    model.train()
    model.model.layers[0].eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    measure(ctx, "perplexity", model, data=NOISE)
    assert model.training and not model.model.layers[0].training
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["perplexity", "divergence", "agreement"])
def test_a_model_that_says_nan_is_refused_with_metric_and_data(ctx, model, name):
    reference.write_reference_once(ctx, model, NOISE)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    (found,) = worlds.refused(lambda: measure(ctx, name, model, data=NOISE)).diagnostics
    assert found.slug == "not-a-number" and name in found.message and "`noise`" in found.message


# -- against the original ------------------------------------------------------------------------------------


def test_a_model_agrees_with_itself(ctx, model):
    reference.write_reference_once(ctx, model, NOISE)
    assert measure(ctx, "divergence", model, data=NOISE) < 1e-6  # float32 rounding of log-softmax sums
    assert measure(ctx, "agreement", model, data=NOISE) == 1.0


def test_divergence_and_agreement_equal_a_loop_over_tokens(ctx, model):
    rows, other = ctx.rows(NOISE), disturbed(ctx)
    reference.write_reference_once(ctx, model, NOISE)
    p, q = naive_log_probs(model, rows), naive_log_probs(other, rows)
    exact = (p.exp() * (p - q)).sum(-1).mean().item()
    assert exact > 1e-4
    assert measure(ctx, "divergence", other, data=NOISE) == pytest.approx(exact, rel=1e-3)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert measure(ctx, "agreement", other, data=NOISE) == pytest.approx(same)


@pytest.mark.parametrize("name", [*tiny.NAMES])
def test_the_kept_outputs_give_the_logits_of_every_architecture(tmp_path, name):
    changes = {"final_logit_softcapping": 5.0} if name == "gemma2" else {}
    model = tiny.model(name, **changes)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict() | {"dtype": "float32"}))
    origin = Config(path="config.json").resolve(worlds.context(tmp_path))
    ctx = worlds.context(tmp_path, origin, {"noise": ("synthetic", {"count": 3, "length": 9})})
    reference.write_reference_once(ctx, model, NOISE)
    kept = reference.load_or_make_reference(ctx, NOISE)
    assert kept.head is not None, "hidden states, not log-probabilities"
    with torch.no_grad():
        exact = model(ctx.rows(NOISE)).logits.flatten(0, 1)
    assert torch.allclose(kept.logits(slice(0, 3), slice(0, 27)), exact, atol=1e-5)


def test_a_tail_that_is_not_known_is_kept_as_log_probabilities(ctx, model):
    model.forward = _doubled(model.forward)
    reference.write_reference_once(ctx, model, NOISE)
    kept = reference.load_or_make_reference(ctx, NOISE)
    assert kept.head is None and kept.outputs.dtype == torch.float16
    # float16 keeps 11 bits of each log-probability; on SmolLM2 that is 3e-7 nats.
    assert measure(ctx, "divergence", model, data=NOISE) < 1e-5
    assert measure(ctx, "agreement", model, data=NOISE) == 1.0


def _doubled(forward):
    def run(input_ids, use_cache=False):
        output = forward(input_ids, use_cache=use_cache)
        output["logits"] = output["logits"] * 2
        return output

    return run


def test_what_is_kept_is_kept_once_and_known_by_model_and_data(ctx, model, monkeypatch):
    reference.write_reference_once(ctx, model, NOISE)
    (place,) = (ctx.settings.cache_dir / "references").glob("*.safetensors")
    before = place.stat().st_mtime_ns
    reference.write_reference_once(ctx, model, NOISE)
    assert place.stat().st_mtime_ns == before
    more = worlds.context(ctx.folder, ctx.origin, {"noise": ("synthetic", {"count": 6, "length": 12, "seed": 3})})
    reference.write_reference_once(more, model, NOISE)
    assert len(list(place.parent.glob("*.safetensors"))) == 2
    assert len(list(place.parent.glob("heads-*/*.safetensors"))) == 1, "the output embedding is kept once per model"


def test_what_is_kept_and_was_edited_is_compared_with_nothing(ctx, model):
    reference.write_reference_once(ctx, model, NOISE)
    (place,) = (ctx.settings.cache_dir / "references").glob("*.safetensors")
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 1
    place.write_bytes(data)
    found = worlds.refused(lambda: reference.load_or_make_reference(ctx, NOISE)).diagnostics[0]
    assert found.slug == "cache-damaged" and str(place) in found.message


def test_the_original_is_asked_when_nothing_was_prepared(ctx, model):
    other = disturbed(ctx)
    found = measure(ctx, "divergence", other, data=NOISE)
    ctx._references.clear()
    reference.write_reference_once(ctx, model, NOISE)
    assert measure(ctx, "divergence", other, data=NOISE) == found > 0


def test_a_killed_preparation_leaves_nothing_behind(ctx, model):
    calls = []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    forward, model.forward = model.forward, dies
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "BATCH_BYTES", 1)
        reference.write_reference_once(ctx, model, NOISE)
    assert not [f for f in (ctx.settings.cache_dir / "references").iterdir() if f.is_file()]


def test_a_full_disk_is_named_before_anything_is_written(ctx, model, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(reference.shutil, "disk_usage", lambda _: usage)
    reject = worlds.refused(lambda: reference.write_reference_once(ctx, model, NOISE))
    assert reject.diagnostics[0].slug == "no-room" and reject.exit == 6


def test_another_vocabulary_is_not_compared(ctx, model):
    reference.write_reference_once(ctx, model, NOISE)
    other = tiny.model("llama", vocab_size=300)
    assert worlds.slug(lambda: measure(ctx, "divergence", other, data=NOISE)) == "other-vocabulary"


def test_bfloat16_agrees_with_itself(tmp_path):
    origin = Hf(name=str(worlds.llama(tmp_path / "m", dtype="bfloat16"))).resolve(worlds.context(tmp_path))
    ctx = worlds.context(tmp_path, origin, {"noise": ("synthetic", {"count": 3, "length": 9})})
    model = origin.load()
    reference.write_reference_once(ctx, model, NOISE)
    assert measure(ctx, "divergence", model, data=NOISE) < 1e-6  # same bfloat16 products on both sides
    assert measure(ctx, "agreement", model, data=NOISE) == 1.0


# -- rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["perplexity", "divergence", "agreement"])
def test_scores_of_rows_give_the_value_and_some_rows_score_as_among_all(ctx, model, name):
    reference.write_reference_once(ctx, model, NOISE)
    metric, other = ctx.registry.import_plugin_class("metric", name)(data=NOISE), disturbed(ctx, 1.0)
    scores, some = metric.score_rows(other, ctx), metric.score_rows(other, ctx, [3, 0])
    assert metric.rowwise and scores.value == metric.measure(other, ctx) and len(scores.sums) == 5
    assert some.sums == pytest.approx(
        [scores.sums[3], scores.sums[0]], rel=1e-4
    )  # float32 rounding of other batch sizes
    assert list(some.counts) == [scores.counts[3], scores.counts[0]]


def test_questions_score_one_by_one(quiz, model):
    metric = quiz.registry.import_plugin_class("metric", "choice")(data=DataRef("quiz"))
    scores = metric.score_rows(model, quiz)
    assert scores.value == metric.measure(model, quiz) and set(scores.sums) <= {0.0, 1.0} and len(scores.sums) == 9
    assert metric.score_rows(model, quiz, [4, 8]).sums == [scores.sums[4], scores.sums[8]]


def test_classes_are_judged_row_by_row(tmp_path):
    worlds.classifier(tmp_path / "m")
    lines = [json.dumps({"text": f"row {i}", "label": "no" if i % 3 else "yes"}) for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    origin = Hf(name="./m").resolve(worlds.context(tmp_path))
    rows = ("labels", {"path": "rows.jsonl", "classes": ("no", "yes"), "length": 16})
    ctx = worlds.context(tmp_path, origin, {"rows": rows})
    metric, model = ctx.registry.import_plugin_class("metric", "accuracy")(data=DataRef("rows")), origin.load()
    scores = metric.score_rows(model, ctx)
    assert scores.value == metric.measure(model, ctx) and metric.row_count(ctx) == len(scores.sums) == 9
    assert metric.score_rows(model, ctx, [8, 1]).sums == [scores.sums[8], scores.sums[1]]


# -- choice --------------------------------------------------------------------------------------------------


@pytest.fixture
def quiz(ctx):
    options = ["no", "yes it is", "who knows"]
    records = [{"question": f"Is {i} even", "options": options, "answer": i % 3} for i in range(9)]
    (ctx.folder / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return worlds.context(
        ctx.folder, ctx.origin, {"quiz": ("choices", {"path": "q.jsonl"}), "noise": ("synthetic", {})}
    )


@pytest.mark.slow
@pytest.mark.parametrize("normalised", [False, True])
def test_choice_equals_a_loop_over_options(quiz, model, normalised):
    right = 0
    items = quiz.data(DataRef("quiz")).tokenize_questions(quiz.tokenizer, quiz)
    for item in items:
        scores = []
        for row, begin, length in zip(item.rows, item.starts, item.lengths, strict=True):
            said = naive_log_probs(model, torch.tensor([row]))[0]
            total = sum(said[k - 1, row[k]].item() for k in range(begin, len(row)))
            scores.append(total / length if normalised else total)
        right += scores.index(max(scores)) == item.answer
    assert measure(quiz, "choice", model, data=DataRef("quiz"), normalised=normalised) == right / len(items)


def test_choice_needs_questions(quiz, model):
    assert worlds.slug(lambda: measure(quiz, "choice", model, data=NOISE)) == "no-choices"


# -- counts --------------------------------------------------------------------------------------------------


def test_shared_weights_count_once(ctx, model):
    assert model.lm_head.weight is model.model.embed_tokens.weight
    numbers = measure(ctx, "params", model)
    assert numbers == sum(p.numel() for p in model.parameters())
    assert measure(ctx, "bytes", model) == 4 * numbers
    assert measure(ctx, "bytes", model.bfloat16()) == 2 * numbers


def test_counts_need_no_weights(ctx):
    with torch.device("meta"):
        empty = ctx.origin.build()
    assert measure(ctx, "params", empty) == measure(ctx, "params", ctx.origin.load())
    assert measure(ctx, "bytes", empty) == measure(ctx, "bytes", ctx.origin.load())


def test_flops_are_two_per_multiplied_weight_and_grow_with_context(ctx, model):
    multiplied = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert measure(ctx, "flops", model, context=0) == 2 * multiplied
    per_position = 2 * 2 * 32 * 2  # two products, two per multiplication, 32 wide, two layers
    assert measure(ctx, "flops", model, context=10) - 2 * multiplied == 10 * per_position


# -- the harness ---------------------------------------------------------------------------------------------


def test_a_harness_that_is_not_installed_is_named(ctx, model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (found,) = worlds.refused(lambda: measure(ctx, "lm_eval", model, task="arc_easy")).diagnostics
    assert found.slug == "package-missing" and "effc[eval]" in found.help


@pytest.mark.heavy
def test_the_harness_scores_like_choice(tmp_path):
    pytest.importorskip("lm_eval")
    from effc.compiler.inputs.sources.zoo import Zoo

    records = [{"q": "And the LORD said unto", "o": ["Moses", "qqqq"], "a": 0}] * 6
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "mine.yaml").write_text(
        f"task: effc_mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'd.jsonl'}}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{o}}"\n'
        "doc_to_target: a\nmetric_list: [{metric: acc}]\n"
    )
    origin = Zoo(name="tiny-llama").resolve(worlds.context(tmp_path))
    quiz = {"path": "d.jsonl", "question": "q", "options": "o", "answer": "a", "layout": "plain"}
    ctx = worlds.context(tmp_path, origin, {"quiz": ("choices", quiz)}, trust_remote_code=True)
    model = origin.load()
    assert measure(ctx, "lm_eval", model, task="effc_mine", tasks=".") == measure(
        ctx, "choice", model, data=DataRef("quiz")
    )


# -- the zoo -------------------------------------------------------------------------------------------------


def test_the_zoo_model_predicts_its_held_out_text(tmp_path):
    if (
        "tiny-llama" not in zoo_folders_by_name()
        or not (zoo_folders_by_name()["tiny-llama"] / "model.safetensors").is_file()
    ):
        pytest.skip("tiny-llama is not there")
    from effc.compiler.inputs.sources.zoo import Zoo

    origin = Zoo(name="tiny-llama").resolve(worlds.context(tmp_path))
    text = {"path": os.fspath(Path(zoo_folders_by_name()["tiny-llama"]) / "heldout.txt"), "length": 128, "samples": 8}
    ctx = worlds.context(tmp_path, origin, {"held": ("text", text)})
    assert measure(ctx, "perplexity", origin.load(), data=DataRef("held")) < 100  # of 2048 words
