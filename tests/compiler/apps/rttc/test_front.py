"""The client's server where something inside breaks."""

import json

import torch
from effc.compiler.apps.rttc.chat_server import GuidedServer, make_chat_application
from effc.compiler.apps.rttc.policy import Policy
from effc.compiler.apps.rttc.retrieval import Local

from tests.compiler.apps.rttc.conftest import QUESTIONS, Config
from tests.compiler.apps.serving.test_failures import guarded


class Broken(Local):
    def retrieve(self, *asked):
        raise ValueError(f"words of {QUESTIONS[0]}")


def test_an_exceptions_words_reach_neither_the_client_nor_the_log(world):
    guided = world.client(Config(), Policy("rag", count=2, shown=2), retriever=Broken(world.base))
    client, lines, log = guarded(make_chat_application(GuidedServer("m", guided)))
    with client:
        body = {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": QUESTIONS[0]}]}
        answer = client.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine-7"})
    log.close()
    (line,) = map(json.loads, lines.getvalue().splitlines())
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "failed"
    assert answer.json()["error"]["message"] == "the server failed; its log tells more under mine-7"
    assert line["request"] == "mine-7" and line["fault"].startswith("ValueError at test_front.py:")
    assert QUESTIONS[0] not in lines.getvalue()


def test_logits_that_are_no_numbers_are_an_error_of_the_server_in_a_sentence(world):
    guided = world.client(Config(), Policy("direct"))
    client, _, log = guarded(make_chat_application(GuidedServer("m", guided)))
    hook = world.model.get_output_embeddings().register_forward_hook(lambda *call: call[-1] * torch.nan)
    with client:
        body = {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": QUESTIONS[0]}]}
        answer = client.post("/v1/chat/completions", json=body)
        hook.remove()
        following = client.post("/v1/chat/completions", json=body)
    log.close()
    error = answer.json()["error"]
    assert answer.status_code == 500 and error["code"] == "logits_not_finite"
    assert error["message"].startswith("the model's logits are NaN or infinite") and following.status_code == 200
