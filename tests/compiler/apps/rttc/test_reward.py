"""Rewards: verifiers, a judge in a folder, and a scorer that is trained and says how good it is."""

import json

import pytest
import torch
from effc.compiler.apps.rttc import knowledge_server
from effc.compiler.apps.rttc.embedder import open_folder_embedder
from effc.compiler.apps.rttc.reward import Judge, Verifier, last_number, require_finite_scores
from effc.compiler.apps.rttc.scorer import LabelledAnswer, auc, open_scorer, train_logistic_scorer
from effc.compiler.apps.rttc.tuned_scorer import open_tuned_scorer, train_fine_tuned_scorer
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from tests.compiler.apps.rttc.conftest import QUESTIONS, Config
from tests.worlds import tokenizer


@given(scores=st.lists(st.tuples(st.integers(-5, 5), st.booleans()), max_size=30))
def test_the_auc_counts_pairs(scores):
    pairs = [(a > b) + 0.5 * (a == b) for a, right in scores if right for b, wrong in scores if not wrong]
    wanted = sum(pairs) / len(pairs) if pairs else 0.5
    assert auc([s for s, _ in scores], [r for _, r in scores]) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("kind", "truth", "right", "wrong"),
    [
        ("exact", "The  king", "the king", "a king"),
        ("number", "#### 1,234", "so it is 1234.", "1234 of 5"),
        ("number", "-3.5", "it is -3.50", "3.5"),
        ("choice", "b", "(B) is it", "A or b"),
        ("pattern", r"\bsea\b", "the sea", "the seat"),
    ],
)
def test_verifiers_know_right_from_wrong(kind, truth, right, wrong):
    reward = Verifier(kind, {"q": truth}, options=("a", "b"))
    assert reward.score("q", [right, wrong]) == [1.0, 0.0] and reward.score("unknown", [right]) == [0.0]


@given(text=st.text(max_size=60))
def test_the_last_number_of_any_text_is_a_number_or_none(text):
    assert last_number(text) is None or isinstance(last_number(text), float)


def graded():
    return [
        LabelledAnswer(question, answer, right)
        for question in QUESTIONS
        for right, answer in ((True, f"It is surely the sea, {question[-9:]}"), (False, "7 7 7 no idea 7 7"))
    ]


def test_a_scorer_learns_to_tell_right_answers_and_is_the_same_after_saving(world, tmp_path):
    scorer = train_logistic_scorer(graded(), world.embedder)
    good, bad = scorer.score("Which colour has the moon?", ["It is surely the sea, the moon?", "7 7 7 no idea 7 7"])
    assert scorer.auc > 0.9 and good > bad
    scorer.save(tmp_path / "scorer")
    assert open_scorer(tmp_path / "scorer", world.embedder).score("a", ["b"]) == pytest.approx(scorer.score("a", ["b"]))


def test_a_scorer_that_can_not_tell_is_refused_unless_insisted_on(world):
    same = [LabelledAnswer(question, "sea", right) for question in QUESTIONS for right in (True, False)]
    with pytest.raises(Reject, match=r"AUC is 0\.500 on 12 answers to 6 questions"):
        train_logistic_scorer(same, world.embedder)
    assert train_logistic_scorer(same, world.embedder, force=True).auc == 0.5


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    tokenizer(folder)
    torch.manual_seed(0)
    facts = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=261, max_position_embeddings=128, **facts)).save_pretrained(folder)
    return lambda: open_folder_embedder(folder, folder / "cache")


@pytest.mark.parametrize("kind", ["lora", "reft"])
def test_a_scorer_tuned_through_its_encoder_tells_is_the_same_after_saving_and_leaves_the_vectors(
    encoder, kind, tmp_path
):
    embedder = encoder()
    before = embedder.embed(QUESTIONS[:3])
    scorer = train_fine_tuned_scorer(graded(), embedder, kind, rank=4, epochs=2, lr=5e-3)
    assert scorer.auc > 0.9 and torch.equal(embedder.embed(QUESTIONS[:3]), before)
    scorer.save(tmp_path)
    again = open_tuned_scorer(tmp_path, encoder())
    assert again.score("a", ["b", "c"]) == pytest.approx(scorer.score("a", ["b", "c"]), abs=1e-5)
    assert again.auc == scorer.auc and again.score("a", ["b"]) != again.score("a", ["sea"])
    weights = (tmp_path / "scorer.safetensors").read_bytes()
    (tmp_path / "scorer.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(Reject, match="holds no scorer"):
        open_tuned_scorer(tmp_path, encoder())


def test_a_tuned_scorer_that_can_not_tell_is_refused_unless_insisted_on(encoder):
    same = [LabelledAnswer(question, "sea", right) for question in QUESTIONS for right in (True, False)]
    with pytest.raises(Reject, match=r"AUC is 0\.500 on 12 answers to 6 questions"):
        train_fine_tuned_scorer(same, encoder(), "lora", epochs=1)
    assert train_fine_tuned_scorer(same, encoder(), "lora", epochs=1, force=True).auc == 0.5


def test_a_judge_is_a_classifier_with_one_logit(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    def saved(name, labels):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=261,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=labels,
        )
        BertForSequenceClassification(config).save_pretrained(tmp_path / name)
        tokenizer(tmp_path / name)
        return tmp_path / name

    first, second = Judge(saved("one", 1)).score("a", ["b", "a longer one"])
    assert first != second
    with pytest.raises(Reject, match="has 3 outputs"):
        Judge(saved("three", 3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_attn_implementation": "org/kernel", "attn_implementation": "org/kernel"}, ""),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, ""),
        ({"hidden_size": 10**9}, "hidden_size"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers"),
        ({"hidden_act": "evil"}, "config"),
        (None, "adapter"),
    ],
    ids=["kernel", "quantised", "wide", "deep", "act", "adapter"],
)
@pytest.mark.parametrize("kind", ["embedder", "judge"])
def test_a_small_model_beside_a_model_says_no_more_than_its_weights_have_room_for(tmp_path, kind, change, words):
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    facts = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=261, num_labels=1, **facts)
    (BertModel if kind == "embedder" else BertForSequenceClassification)(config).save_pretrained(tmp_path)
    tokenizer(tmp_path)

    def opened():
        return open_folder_embedder(tmp_path, tmp_path / "cache") if kind == "embedder" else Judge(tmp_path)

    opened()
    if change is None:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/other"}))
    else:
        body = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(body | change))
    if words:
        with pytest.raises(Reject, match=words):
            opened()
    else:
        opened()


def test_a_server_whose_reward_gives_no_number_says_so(world):
    class Broken(Config):
        def score(self, question, answers):
            return require_finite_scores([float("nan")], "broken")

    app = knowledge_server.make_knowledge_application(
        knowledge_server.KnowledgeService(world.base, "diverse", Broken())
    )
    answer = TestClient(app).post("/v1/score", json={"question": "a", "answers": ["b"]})
    assert answer.status_code == 500 and answer.json()["error"]["message"] == "the reward `broken` gave nan"
    assert answer.json()["error"]["code"] == "reward_no_number"
