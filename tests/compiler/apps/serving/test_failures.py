"""What breaks inside a server: the log says what and where, the client the request's id, nobody any words of it."""

import io
import json
import queue

import pytest
from effc.compiler.apps.serving.access_log import AccessLog
from effc.compiler.apps.serving.api import Service
from effc.compiler.apps.serving.application import make_openai_application
from effc.compiler.apps.serving.guard import Admission, Guard
from effc.compiler.apps.serving.limits import Limits
from effc.compiler.apps.serving.request import Request
from effc.compiler.apps.serving.scheduler import Scheduler
from effc.compiler.apps.serving.served_models import ServedModels
from starlette.testclient import TestClient

from tests.compiler.apps.serving.test_scheduler import CONTEXT, Seen, folder, model, tokenizer  # noqa: F401


def guarded(app) -> tuple[TestClient, io.StringIO, AccessLog]:
    """A client of an application as `effc serve` runs it, and what its log has."""
    lines = io.StringIO()
    log = AccessLog(lines)
    return TestClient(Guard(app, Admission(), Limits(), log, lambda *counted: None)), lines, log


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_model_that_breaks_is_told_by_an_id_whose_line_in_the_log_has_the_place(model, tokenizer, path, stream):  # noqa: F811
    runner = Seen(model, 2)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    client, lines, log = guarded(
        make_openai_application(
            ServedModels(Service("m", Scheduler(runner, tokenizer, ()), tokenizer, CONTEXT, runner.vocabulary))
        )
    )
    with client:
        runner.breaks = True
        prompt = {"messages": [{"role": "user", "content": "ab"}]} if "chat" in path else {"prompt": "ab"}
        body = {"model": "m", "stream": stream, "max_tokens": 2, **prompt}
        answer = client.post(f"/v1/{path}", json=body, headers={"x-request-id": "mine-7"})
    log.close()
    (line,) = map(json.loads, lines.getvalue().splitlines())
    assert answer.status_code == (200 if stream else 500)
    assert "the server failed; its log tells more under mine-7" in answer.text
    assert "no room" not in answer.text and "MemoryError" not in answer.text
    assert line["request"] == "mine-7" and line["fault"].startswith("MemoryError at test_scheduler.py:")
    assert "no room" not in line["fault"]


def asked_behind_a_break(model, tokenizer, **more):  # noqa: F811
    """Answers to a request whose logits are no numbers and to the next one, what was counted, and the log's lines."""
    runner = Seen(model, 2)
    scheduler = Scheduler(runner, tokenizer, ())
    service = Service("m", scheduler, tokenizer, CONTEXT, runner.vocabulary)
    client, lines, log = guarded(make_openai_application(ServedModels(service)))
    with client:
        body = {"model": "m", "prompt": "ab", "max_tokens": 2}
        runner.odd = 0
        odd = client.post("/v1/completions", json={**body, **more})
        runner.odd = None
        following = client.post("/v1/completions", json=body)
        count = scheduler.metrics.server.requests.labels("", "logits_not_finite")._value.get()
    log.close()
    return odd, following, count, [json.loads(line) for line in lines.getvalue().splitlines()]


@pytest.mark.parametrize("more", [{}, {"temperature": 0}, {"echo": True, "logprobs": 1}, {"logprobs": 1}])
@pytest.mark.parametrize("stream", [False, True])
def test_logits_that_are_no_numbers_are_an_error_of_the_server_in_a_sentence_and_others_go_on(
    model,  # noqa: F811
    tokenizer,  # noqa: F811
    stream,
    more,
):
    odd, following, count, lines = asked_behind_a_break(model, tokenizer, stream=stream, **more)
    event = odd.text.strip().split("\n\n")[-1].removeprefix("data: ") if stream else odd.text
    error = json.loads(event)["error"]
    assert error["type"] == "server_error" and error["message"].startswith("the model's logits are NaN or infinite")
    assert odd.status_code == (200 if stream else 500) and error["code"] == "logits_not_finite"
    assert following.status_code == 200 and count == 1
    assert [line.get("fault") for line in lines] == ["logits_not_finite", None]


def test_logits_that_are_numbers_and_forbid_every_token_are_no_fault_of_the_model(model, tokenizer):  # noqa: F811
    runner = Seen(model, 2)
    scheduler, pieces = Scheduler(runner, tokenizer, ()), queue.Queue()
    scheduler.start()
    bias = dict.fromkeys(range(runner.vocabulary), float("-inf"))
    scheduler.submit(Request((5, 6), 2, bias=bias), pieces.put)
    assert pieces.get(timeout=30).finish == "failed"
    scheduler.stop()
