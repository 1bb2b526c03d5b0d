"""A client of a server can't keep others from it by asking much, nor learn what they asked."""

import pytest
from effc.compiler.apps.rttc.chat_server import GuidedServer
from effc.compiler.apps.serving import scheduler as scheduling
from effc.compiler.apps.serving.api import Service
from effc.compiler.apps.serving.application import make_openai_application
from effc.compiler.apps.serving.error_response import ErrorResponse
from effc.compiler.apps.serving.runner import make_decoder
from effc.compiler.apps.serving.scheduler import QueueFull, Scheduler
from effc.compiler.apps.serving.served_models import ServedModels
from effc.compiler.artifacts.load import load
from starlette.testclient import TestClient
from transformers import AutoTokenizer

from tests.compiler.apps.serving.test_scheduler import Seen, ask, folder, model, tokenizer  # noqa: F401
from tests.hostile import kinds

MANY = 390  # tokens of an answer that takes its place for long


@pytest.fixture
def scheduler(model, tokenizer):  # noqa: F811
    scheduler = Scheduler(Seen(model, 4), tokenizer, eos_ids=(), max_waiting=4)
    scheduler.start()
    yield scheduler
    scheduler.stop()
    scheduler.join(10)


def test_who_fills_the_queue_keeps_nobody_else_out(scheduler):
    greedy = [ask(scheduler, [5], MANY, owner="a") for _ in range(4)]
    for answer, _ in greedy:
        answer.get(timeout=30)
    greedy += [ask(scheduler, [5], MANY, owner="a") for _ in range(4)]
    with pytest.raises(QueueFull):
        ask(scheduler, [5], MANY, owner="a")
    other, _ = ask(scheduler, [6], 2, owner="b")
    with pytest.raises(QueueFull):
        ask(scheduler, [6], 2, owner="b")
    scheduler.cancel(greedy[0][1])
    assert other.complete()[1].finish == "length"  # it passed four that waited longer
    again, _ = ask(scheduler, [6], 2, owner="b")
    assert again.complete()[1].finish == "length"  # a place is left to others


def test_who_fills_the_queue_of_a_guided_model_keeps_nobody_else_out():
    server = GuidedServer("m", None, max_waiting=1, max_parallel=1)
    server._buffered["a"] = 2
    with pytest.raises(ErrorResponse, match="as many queries wait as may"):
        server._refuse_repeat_owner_when_full("a")
    server._refuse_repeat_owner_when_full("b")


def test_places_are_left_to_others_only_while_others_ask(scheduler, monkeypatch):
    other, _ = ask(scheduler, [6], 2, owner="b")
    other.complete()
    monkeypatch.setattr(scheduling, "SEEN_SECONDS", 0)  # a while later
    for answer in [ask(scheduler, [5], MANY, owner="a")[0] for _ in range(4)]:
        answer.get(timeout=30)
    assert max(map(len, scheduler._runner.calls)) == 4


def test_the_only_client_has_all_places(scheduler):
    answers = [ask(scheduler, [5], MANY, owner="a")[0] for _ in range(4)]
    for answer in answers:
        answer.get(timeout=30)
    assert max(map(len, scheduler._runner.calls)) == 4


def test_a_prompt_of_another_address_is_not_seen_in_what_was_cached(tmp_path):
    """Without keys too: the count of known tokens, and the time they save, would tell a guess that was right."""
    place = kinds.honest(tmp_path) / "int4"
    model, words = load(place), AutoTokenizer.from_pretrained(place / "native")  # noqa: F811
    scheduler = Scheduler(make_decoder(model, "m"), words, (), 4, 2, prefix_cache_tokens=10_000)
    app = make_openai_application(ServedModels(Service("m", scheduler, words, 64, len(words))))
    body = {"model": "m", "prompt": list(range(3, 33)), "max_tokens": 1}
    known = []
    with TestClient(app, client=("10.0.0.1", 1)) as first:
        for client in (first, first, TestClient(app, client=("10.0.0.2", 1))):
            usage = client.post("/v1/completions", json=body).json()["usage"]
            known.append(usage.get("prompt_tokens_details", {}).get("cached_tokens", 0))
    assert known[0] == known[2] == 0 < known[1]
