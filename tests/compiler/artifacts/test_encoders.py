"""Models without a head: what they say of rows, how alike two of them are, how well they find texts."""

import copy
import json
from functools import partial

import pytest
import torch
from effc.compiler.artifacts.load import load
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.compiler.evaluation import similarity
from effc.compiler.evaluation.metrics.retrieval import ranks_of_matching_columns
from effc.compiler.models.checkpoints.model_folder import origin_of_folder
from effc.compiler.models.rows import inputs
from effc.compiler.models.rows.encoder_states import pooled_hidden_states, resolve_pooling_name
from effc.dsl.checker.values import DataRef, MetricRef
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests import worlds

PAD = 3
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def bert(seed: int = 0) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=worlds.VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=PAD,
        initializer_range=0.2,
    )
    return BertModel(config).eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of sentence-transformers beside questions with answers."""
    folder = tmp_path_factory.mktemp("embedder")
    bert().save_pretrained(folder / "bert")
    made = worlds.tokenizer(folder / "bert")
    padded = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, bos_token="<s>", eos_token="</s>", pad_token='"')
    assert padded.pad_token_id != 0
    padded.save_pretrained(folder / "bert")
    (folder / "bert" / "modules.json").write_text(json.dumps(MODULES))
    (folder / "bert" / "1_Pooling").mkdir()
    told = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "bert" / "1_Pooling" / "config.json").write_text(json.dumps(told))
    records = [{"question": f"What is {n * n} less?", "answer": f"It is {'one ' * (n % 5)}{n}"} for n in range(12)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def context(world, **data):
    return worlds.context(world, origin_of_folder(world / "bert", "x", "auto", Settings(world / "cache")), data)


# -- what rows are to a model --------------------------------------------------------------------------------


def test_filling_behind_a_text_is_masked_and_a_whole_row_is_not():
    model, rows = bert(), torch.tensor([[5, 6, 7, PAD, PAD], [5, PAD, 7, 8, 9]])
    (given,), more = inputs.forward_args_and_kwargs(model, rows)
    assert torch.equal(given, rows)
    assert more["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]  # the one in the middle is a token
    assert "attention_mask" not in inputs.forward_args_and_kwargs(model, rows[1:])[1]


def test_states_of_a_text_do_not_depend_on_how_far_it_is_filled_up():
    model, row = bert(), torch.tensor([[0, 7, 8, 9]])
    filled = torch.tensor([[0, 7, 8, 9, PAD, PAD, PAD]])
    with torch.no_grad():
        for pooling in ("mean", "first", "last", "max"):
            whole, more = pooled_hidden_states(model, row, pooling), pooled_hidden_states(model, filled, pooling)
            assert torch.allclose(whole.pooled, more.pooled, atol=1e-5)
            assert torch.allclose(whole.tokens[0], more.tokens[0, :4], atol=1e-5)


def test_pooling_is_what_sentence_transformers_writes_out():
    model, rows = bert(), torch.tensor([[0, 7, 8, 9, PAD], [0, 4, 5, 6, 7]])
    with torch.no_grad():
        tokens = model(rows, attention_mask=(rows != PAD).long()).last_hidden_state
        assert torch.allclose(pooled_hidden_states(model, rows, "mean").pooled[0], tokens[0, :4].mean(0), atol=1e-6)
        assert torch.equal(pooled_hidden_states(model, rows, "last").pooled[0], tokens[0, 3])
        assert torch.equal(pooled_hidden_states(model, rows, "max").pooled[0], tokens[0, :4].amax(0))


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls"}, "first"),
    ],
)
def test_a_folder_says_how_it_pools(tmp_path, told, found):
    (tmp_path / "modules.json").write_text(json.dumps(MODULES))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(told))
    assert resolve_pooling_name(tmp_path, "auto") == found
    assert resolve_pooling_name(tmp_path, "max") == "max"


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ([*MODULES[:2], {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}], "Dense"),
        (MODULES[:1], "names no pooling"),
        ([*MODULES[:1], {"path": "../1_Pooling", "type": "x.Pooling"}], "outside"),
        ("no list", "names no pooling"),
    ],
)
def test_what_effc_does_not_run_behind_a_transformer_is_refused(tmp_path, modules, said):
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert said in worlds.refused(partial(resolve_pooling_name, tmp_path, "auto")).diagnostics[0].message


# -- data and metrics ----------------------------------------------------------------------------------------


def test_texts_are_rows_of_their_own_and_all_of_a_field_come_first(world):
    asked = {"path": "questions.jsonl", "fields": ("question", "answer"), "length": 24, "samples": 5}
    ctx = context(world, both=("texts", asked), one=("texts", asked | {"fields": ("question",)}))
    rows, ones = ctx.tokenize_rows_once("both"), ctx.tokenize_rows_once("one")
    assert rows.shape == (10, 24) and torch.equal(rows[:5], ones)
    text = ctx.tokenizer.decode(rows[0], skip_special_tokens=True)
    assert text.startswith("What is") and text.endswith("less?")


def metric(ctx, word, model, **args):
    given = worlds.defaults("metric", word) | {"data": DataRef("both")} | args
    return ctx.metric(MetricRef(word, tuple(given.items()))).measure(model, ctx)


@pytest.fixture
def ctx(world):
    asked = {"path": "questions.jsonl", "fields": ("question", "answer"), "length": 24}
    return context(world, both=("texts", asked))


@pytest.mark.parametrize("by", ["cosine", "cka"])
@pytest.mark.parametrize("of", ["pooled", "tokens", "both"])
def test_the_original_is_like_itself_and_a_damaged_one_less(ctx, by, of):
    model = ctx.origin.load()
    assert metric(ctx, "similarity", model, by=by, of=of) == pytest.approx(1.0, abs=1e-6)
    values = []
    for share in (0.3, 1.0):
        damaged = copy.deepcopy(model)
        with torch.no_grad():
            for layer in damaged.encoder.layer:
                layer.output.dense.weight.mul_(1 - share)
        values.append(metric(ctx, "similarity", damaged, by=by, of=of))
    assert 1.0 > values[0] > values[1]


def test_cka_forgives_a_turn_that_cosine_does_not(ctx):
    """Against the definition: the share that centred Gram matrices have in common."""
    model = ctx.origin.load()
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    kept = similarity.load_or_make_states(ctx, DataRef("both"))
    turned = {"t": kept["t"] @ turn.T, "v": kept["v"] @ turn.T}
    rows = ctx.tokenize_rows_once("both")
    assert similarity.linear_cka(model, rows, turned, "mean") == pytest.approx((1.0, 1.0), abs=1e-6)
    assert similarity.mean_cosine(model, rows, turned, "mean")[0] < 0.5
    noise = torch.randn(len(kept["v"]), 48, generator=torch.Generator().manual_seed(1))  # of another width
    with torch.no_grad():
        x, y = (v.double() - v.double().mean(0) for v in (kept["v"], noise))
    expected = (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    found = similarity.linear_cka(model, rows, {"t": kept["t"], "v": noise}, "mean")[0]
    assert found == pytest.approx(float(expected), abs=1e-6)


def test_a_rank_counts_all_that_are_as_near():
    likeness = torch.tensor([[1.0, 0.5, 0.2], [0.9, 0.4, 0.1], [0.3, 0.3, 0.3]])
    assert ranks_of_matching_columns(likeness).tolist() == [1, 2, 3]


def test_retrieval_finds_what_the_vectors_say(ctx):
    model, rows = ctx.origin.load(), ctx.tokenize_rows_once("both")
    with torch.no_grad():
        vectors = normalize(pooled_hidden_states(model, rows, "mean").pooled, dim=-1)
    near = (vectors[:12] @ vectors[12:].T).argsort(1, descending=True)
    places = [near[i].tolist().index(i) + 1 for i in range(12)]
    assert metric(ctx, "retrieval", model) == pytest.approx(sum(p == 1 for p in places) / 12)
    assert metric(ctx, "retrieval", model, score="mrr") == pytest.approx(sum(1 / p for p in places) / 12)


def test_retrieval_refuses_data_without_partners(world):
    ctx = context(world, both=("texts", {"path": "questions.jsonl", "fields": ("question",), "length": 24}))
    assert worlds.slug(lambda: metric(ctx, "retrieval", ctx.origin.load())) == "no-partners"


def test_a_prediction_is_not_asked_of_a_model_without_a_head(ctx):
    refused = worlds.refused(lambda: metric(ctx, "perplexity", ctx.origin.load()))
    assert refused.diagnostics[0].slug == "no-logits" and "`similarity`" in refused.diagnostics[0].help


# -- a compile -----------------------------------------------------------------------------------------------

RECIPE = """effspec 1
model base = hf("./bert")
data calib = texts("questions.jsonl", fields: ["question"], length: 24)
data both = texts("questions.jsonl", fields: ["question", "answer"], length: 24)
pipeline small(base) {
  slim = prune.multi(remove: 10% of params, score: similarity(calib), group: 8)
  fit = tune.heal(data: calib, steps: 4, batch: 4, lr: 1e-3, method: full)
}
expect small {
  params <= 0.91 * base
  similarity(both) >= 0.5
}
emit small { hf("hf") }
"""


@pytest.mark.heavy
def test_an_embedder_is_pruned_healed_written_and_opened_as_what_it_was(world, tmp_path):
    (world / "small.effspec").write_text(RECIPE)
    session = api.open_session(world / "small.effspec", settings=Settings(world / "cache", threads=1))
    (result,) = api.build(session, tmp_path)
    (artifact,) = result.artifacts
    names = set(artifact.manifest.files)
    for form in ("compact", "compat"):
        assert {f"{form}/modules.json", f"{form}/1_Pooling/config.json"} <= names
    rows = context(world, both=("texts", {"path": "questions.jsonl", "length": 24, "fields": ("answer",)}))
    given = rows.tokenize_rows_once("both")
    with torch.no_grad():
        compact, compat = load(tmp_path / "hf" / "compact"), BertModel.from_pretrained(tmp_path / "hf" / "compat")
        one, other = (pooled_hidden_states(m.eval(), given, "mean").pooled for m in (compact, compat))
    assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.heavy
def test_sentence_transformers_opens_what_was_written(world, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    (world / "small.effspec").write_text(RECIPE)
    session = api.open_session(world / "small.effspec", settings=Settings(world / "cache", threads=1))
    api.build(session, tmp_path)
    theirs = library.SentenceTransformer(str(tmp_path / "hf" / "compat"), device="cpu")
    ctx = context(world, both=("texts", {"path": "questions.jsonl", "length": 24, "fields": ("answer",)}))
    records = [json.loads(line) for line in (world / "questions.jsonl").read_text().splitlines()]
    made = torch.tensor(theirs.encode([r["answer"] for r in records]))
    with torch.no_grad():
        ours = pooled_hidden_states(
            load(tmp_path / "hf" / "compact").eval(), ctx.tokenize_rows_once("both"), "mean"
        ).pooled
    assert torch.allclose(normalize(ours, dim=-1), made, atol=1e-4)
