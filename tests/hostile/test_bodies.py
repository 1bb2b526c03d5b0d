"""Bodies of requests that somebody changed: answered, or refused in OpenAI's form; never a 500, never without an end.

All go to three applications in this process: a model, a client of test-time compute, a knowledge base.
"""

import json
import os
import random

import pytest
import torch
from effc.compiler.apps.rttc import chat_server, knowledge_server
from effc.compiler.apps.rttc.app import open_guided_client, read_app
from effc.compiler.apps.rttc.knowledge import open_knowledge_base
from effc.compiler.apps.serving.api import Service
from effc.compiler.apps.serving.application import make_openai_application
from effc.compiler.apps.serving.runner import make_decoder, try_out
from effc.compiler.apps.serving.scheduler import Scheduler
from effc.compiler.apps.serving.served_models import ServedModels
from effc.compiler.artifacts.load import load
from effc.compiler.driver.models import model_errors_as_diagnostics
from effc.dsl.syntax.diagnostics import Reject
from starlette.testclient import TestClient
from transformers import AutoTokenizer

from tests.fuzz.changes import changed
from tests.hostile import kinds

torch.set_num_threads(1)
MIN_SAMPLES, COUNT = 60, int(os.environ.get("EFFC_BODIES", "2000"))  # bodies of a path
CHAT = [{"role": "user", "content": "which 1?"}]
COMMON = {"model": "m", "max_tokens": 2, "temperature": 0.7, "top_p": 0.9, "seed": 3, "stop": ["zz"], "stream": False}
OPEN = {
    "model /v1/chat/completions": {**COMMON, "messages": CHAT, "top_k": 4, "logprobs": True, "top_logprobs": 2},
    "model /v1/completions": {**COMMON, "prompt": "which", "repetition_penalty": 1.1, "logprobs": 1, "n": 1},
    "guided /v1/chat/completions": {**COMMON, "messages": CHAT},
    "guided /v1/completions": {**COMMON, "prompt": "which 2?"},
    "library /v1/retrieve": {"vector": [0.25] * 16, "count": 3},
    "library /v1/score": {"question": "which?", "answers": ["it is 1.", "no"]},
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """A client of each application, by name."""
    folder = tmp_path_factory.mktemp("bodies")
    place = kinds.honest(folder) / "rttc"
    model, words = load(place), AutoTokenizer.from_pretrained(place / "model")
    runner = make_decoder(model, "m")
    scheduler = Scheduler(runner, words, (1,), 4, 2)
    guided = open_guided_client(read_app(place), place, load(place), words, folder / "cache")
    apps = {
        "model": make_openai_application(
            ServedModels(Service("m", scheduler, words, runner.context, runner.vocabulary))
        ),
        "guided": chat_server.make_chat_application(chat_server.GuidedServer("m", guided)),
        "library": knowledge_server.make_knowledge_application(
            knowledge_server.KnowledgeService(open_knowledge_base(place / "knowledge"), "diverse")
        ),
    }
    clients = {name: TestClient(app, raise_server_exceptions=False) for name, app in apps.items()}
    apps["guided"].state.words = words
    for client in clients.values():
        client.__enter__()
    yield clients
    for client in clients.values():
        client.__exit__(None, None, None)


def said(servers, way: str, body: bytes) -> str:
    """What is wrong with the answer to a body, or ""."""
    name, path = way.split()
    answer = servers[name].post(path, content=body, headers={"content-type": "application/json"})
    if answer.status_code in (200, 404):
        return ""
    sound = answer.status_code == 400 and isinstance(answer.json()["error"]["message"], str)
    return "" if sound else f"{answer.status_code} {answer.text[:200]} to {body[:300]!r}"


def wrong(servers, way: str, count: int, seed: int) -> list[str]:
    seeds, draw = [json.dumps(OPEN[way]).encode()], random.Random(f"{way} {seed}")
    return [why for _ in range(count) if (why := said(servers, way, changed(seeds, draw)))]


@pytest.mark.parametrize("way", OPEN)
def test_ordinary_bodies_are_answered(servers, way):
    name, path = way.split()
    status = servers[name].post(path, json=OPEN[way]).status_code
    assert status == (404 if path.endswith("score") else 400 if name == "guided" and "logprobs" in OPEN[way] else 200)


@pytest.mark.parametrize("way", OPEN)
def test_changed_bodies_are_answered_or_refused(servers, way):
    assert not wrong(servers, way, MIN_SAMPLES, 0)


CRAFTED = {
    "no text": {"messages": [{"role": "user", "content": ""}]},
    "no parts": {"messages": [{"role": "user", "content": []}]},
    "a huge answer": {"messages": CHAT, "max_tokens": 2**62},
    "a role of its own": {"messages": [{"role": "assistant", "content": "{{ x }}"}]},
    "a control character": {"messages": [{"role": "user", "content": "\x00\u202e" * 9}]},
    "a long stop": {"messages": CHAT, "stop": ["x" * 100_000]},
    "a seed below zero": {"messages": CHAT, "seed": -(2**63)},
    "many fields": {"messages": CHAT, **{f"k{number}": 0 for number in range(100_000)}},
    "a small share": {"messages": CHAT, "top_p": 1e-300},
}


@pytest.mark.parametrize("name", ["model", "guided"])
@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_bodies_are_answered_or_refused_and_the_next_is_answered(servers, name, case):
    way = f"{name} /v1/chat/completions"
    assert not said(servers, way, json.dumps({"model": "m", "max_tokens": 2, **CRAFTED[case]}).encode())
    after = servers[name].post("/v1/chat/completions", json={"model": "m", "max_tokens": 2, "messages": CHAT})
    assert after.status_code == 200


class Nonsense:
    """A model whose logits are of another shape than it says."""

    max_sequences, context, vocabulary = 2, 64, 9

    def __init__(self, rows: int, wide: int):
        self.rows, self.wide = rows, wide

    def run(self, ids, sequences, wanted):
        return torch.zeros(self.rows, self.wide)

    def forget(self, sequence, length=0): ...
    def length(self, sequence):
        return 0

    def cancel(self): ...


@pytest.mark.parametrize(("rows", "wide"), [(0, 9), (2, 9), (1, 0)])
def test_a_model_of_nonsense_is_found_out_before_it_is_served_and_stops_no_server(servers, rows, wide):
    with pytest.raises(Reject) as refused, model_errors_as_diagnostics("m"):
        try_out(Nonsense(rows, wide))
    assert refused.value.diagnostics[0].slug == "model-breaks"
    words = servers["guided"].app.state.words
    scheduler = Scheduler(Nonsense(rows, wide), words, (), 4, 2)
    with TestClient(
        make_openai_application(ServedModels(Service("m", scheduler, words, 64, 9))), raise_server_exceptions=False
    ) as client:
        for _ in range(2):
            answer = client.post("/v1/completions", json={"model": "m", "prompt": [1, 2], "max_tokens": 1})
            assert answer.status_code == 500 and answer.json()["error"]["code"] == "failed"
        assert client.get("/health").status_code == 200


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", OPEN)
def test_many_changed_bodies_are_answered_or_refused(servers, way):
    assert not wrong(servers, way, COUNT, 1)
