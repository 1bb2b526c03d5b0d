"""What breaks inside a server: the log says what and where, the client the request's id, nobody any words of it."""

import io
import json

import pytest
from effc.compiler.apps.serving.access_log import AccessLog
from effc.compiler.apps.serving.api import Service
from effc.compiler.apps.serving.application import make_openai_application
from effc.compiler.apps.serving.guard import Admission, Guard
from effc.compiler.apps.serving.limits import Limits
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
