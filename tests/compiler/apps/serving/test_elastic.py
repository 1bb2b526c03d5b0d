"""`effc serve --elastic LARGE:SMALL`: a smaller model answers while the larger has no free slot."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
from effc.compiler.apps.serving.elastic import Elastic, parse_elastic_options, text_fingerprint
from effc.compiler.apps.serving.metrics import Metrics
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import given
from hypothesis import strategies as st

from tests.compiler.apps.serving.conftest import serving

pytestmark = pytest.mark.slow


def model(name: str, n_slots: int = 4, **more) -> SimpleNamespace:
    counts = {"n_requests": 0, "n_slots": n_slots, "capacity": n_slots + 4}
    return SimpleNamespace(**{"name": name, **counts, "text_fingerprint": "a", "context": 64, **more})


def load(service, n: int) -> None:
    service.n_requests = n


def test_new_requests_go_down_when_no_slot_is_free_and_up_when_half_of_them_are():
    large, small = model("large"), model("small")
    elastic = Elastic(large, small, Metrics())
    steps = []
    for n_large, n_small in [(0, 0), (3, 0), (4, 0), (3, 1), (2, 1), (0, 3), (1, 1), (3, 0), (4, 0)]:
        load(large, n_large), load(small, n_small)
        steps.append(elastic.choose(large, small).name)
    assert steps == ["large", "large", "small", "small", "small", "small", "large", "large", "small"]


@given(counts=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=30))
def test_the_smaller_model_answers_all_that_it_holds_until_both_are_nearly_idle_and_nothing_without_need(counts):
    large, small = model("large"), model("small")
    elastic, is_down = Elastic(large, small, Metrics()), False
    for n_large, n_small in counts:
        load(large, n_large), load(small, n_small)
        is_down = n_large >= 4 or (is_down and n_large + n_small > 2)
        assert elastic.choose(large, small) is (small if is_down and n_small < small.capacity else large)


def test_after_a_reload_to_another_vocabulary_the_larger_model_answers_alone():
    large, small = model("large", n_slots=1), model("small")
    elastic = Elastic(large, small, Metrics())
    load(large, 1)
    assert elastic.choose(large, small) is small
    small.text_fingerprint = "b"
    assert elastic.choose(large, small) is large


def test_after_a_reload_to_an_encoder_the_larger_model_answers_alone():
    large = model("large", n_slots=1)
    elastic = Elastic(large, model("small"), Metrics())
    load(large, 5)
    assert elastic.choose(large, None) is large


@pytest.mark.parametrize(
    ("unlike", "reason"),
    [({"text_fingerprint": "b"}, "another vocabulary or chat template"), ({"context": 63}, "has a shorter context")],
)
def test_a_model_that_takes_other_requests_stands_in_for_none(unlike, reason):
    with pytest.raises(Reject, match=reason):
        Elastic(model("large"), model("small", **unlike), Metrics())


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["a"], "names no two models of `a`, `b`, `c`"),
        (["a:a"], "names no two models"),
        (["a:d"], "names no two models"),
        (["a:b", "a:c"], "has two smaller models"),
        (["a:b", "b:c"], "`b` is the smaller model of one, and has one itself"),
        (["a:b", "b:a"], "has one itself"),
    ],
)
def test_options_that_lead_to_no_single_smaller_model_are_refused(texts, reason):
    with pytest.raises(Reject, match=reason):
        parse_elastic_options(texts, ["a", "b", "c"])


def test_names_may_have_colons_themselves():
    assert parse_elastic_options(["a:b:c"], ["a:b", "c"]) == {"a:b": "c"}


def test_a_fingerprint_is_of_the_vocabulary_and_the_template():
    def tokenizer(vocabulary, template):
        return SimpleNamespace(get_vocab=lambda: vocabulary, chat_template=template)

    known = text_fingerprint(tokenizer({"a": 0, "b": 1}, None))
    assert known == text_fingerprint(tokenizer({"b": 1, "a": 0}, None))
    assert known != text_fingerprint(tokenizer({"a": 1, "b": 0}, None))
    assert known != text_fingerprint(tokenizer({"a": 0, "b": 1}, "{{ messages }}"))


def test_a_busy_server_answers_by_the_smaller_model_and_says_so(artifact, chatty):
    with serving(f"large={artifact}", f"small={chatty}", "--elastic", "large:small", "--parallel", "1") as server:
        body = {"model": "large", "prompt": "And", "max_tokens": 5}

        def ask() -> tuple[str, str]:
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            return answer.json()["model"], answer.headers["x-effc-model"]

        assert ask() == ("large", "large") and server.metric("effc_elastic_active", model="large") == 0
        small_answers, active = 0, 0.0
        for _ in range(30):  # 400 tokens may be written before a question comes, where other work holds the processor
            stream = server.client.completions.create(model="large", prompt="And", max_tokens=400, stream=True)
            assert next(iter(stream)).model == "large"
            small_answers += ask() == ("small", "small")
            active = server.metric("effc_elastic_active", model="large")
            if small_answers and active:
                break
            stream.close()
        assert small_answers and active == 1
        direct = httpx.post(f"{server.url}/v1/completions", json={**body, "model": "small"}, timeout=60)
        assert direct.json()["model"] == "small" and "x-effc-model" not in direct.headers
        assert sum(1 for _ in stream) > 100
        stream.close()
        assert ask() == ("large", "large")
        assert server.metric("effc_elastic_requests_total", model="large", answered_by="small") == small_answers


def test_of_requests_that_come_at_once_all_but_the_first_are_the_smaller_models(artifact, chatty):
    with serving(f"large={artifact}", f"small={chatty}", "--elastic", "large:small", "--parallel", "1") as server:
        body = {"model": "large", "prompt": "And it came to pass " * 9, "max_tokens": 200}
        with ThreadPoolExecutor(8) as clients:
            answers = list(
                clients.map(lambda _: httpx.post(f"{server.url}/v1/completions", json=body, timeout=120), range(8))
            )
        n_small = [answer.json()["model"] for answer in answers].count("small")
        assert n_small == 7
