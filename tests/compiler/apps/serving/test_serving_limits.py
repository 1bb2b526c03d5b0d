"""`effc serve` at its limits: full queues, signals, ports in use, what can't be served. Torch computes."""

import json
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager

import httpx
import openai
import pytest
from effc.compiler.cli.verbs import serve
from effc.compiler.core import environment

from tests import tiny
from tests.compiler.apps.serving.conftest import EFFC, serving
from tests.compiler.apps.serving.test_entrance import raw
from tests.compiler.cli.verbs.conftest import effc, own_cache, process  # noqa: F401

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    with serving("zoo:tiny-llama", "--parallel", "1", "--queue", "1", "--name", "tiny") as served:
        yield served


@contextmanager
def standing(server):
    """The server stands still, and what is asked meanwhile it finds all at once."""
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


def test_a_request_more_than_may_wait_is_told_when_to_come_back(server):
    first = server.complete(max_tokens=400, stream=True)
    next(iter(first))
    with ThreadPoolExecutor(2) as pool:
        with standing(server):
            others = [pool.submit(server.complete, max_tokens=1) for _ in range(2)]
            wait(others, timeout=1)  # long enough for both to have asked
        errors = [other.exception() for other in others]
    first.close()
    (full,) = [error for error in errors if error is not None]
    assert isinstance(full, openai.RateLimitError) and "as many requests wait as may" in str(full)
    assert 1 <= int(full.response.headers["retry-after"]) <= 60
    assert sum(other.result().usage.completion_tokens for other in others if other.exception() is None) == 1
    assert server.metric("effc_requests_total", outcome="refused") == 1


def test_one_who_waits_and_leaves_frees_the_place_in_the_queue(server):
    def left():
        return server.metric("effc_requests_total", outcome="cancelled")

    before = left()
    first = server.complete(max_tokens=400, stream=True)
    next(iter(first))
    with standing(server), pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "a"}, timeout=0.5)
    deadline = time.monotonic() + 30
    while left() == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left() > before and server.metric("effc_requests_waiting") == 0
    first.close()


def test_a_tokenizer_without_a_chat_template_answers_texts_alone(server):
    answer = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "a"}])
    assert answer.status_code == 400 and "has no chat template" in answer.json()["error"]["message"]
    assert server.complete("And it came", max_tokens=3).choices[0].text == " to pass,"


def ends_with_running_answers(served, number):
    stream = served.complete(max_tokens=400, stream=True)
    next(iter(stream))
    code, said = served.stop(number)
    with pytest.raises(openai.APIError, match="the server stops"):
        list(stream)
    assert code == 130 and "the server has stopped" in said and "Traceback" not in said


def test_sigterm_ends_running_answers_and_the_server():
    with serving("zoo:tiny-llama") as served:
        ends_with_running_answers(served, signal.SIGTERM)


def test_ctrl_c_does_so_too(server):  # the last that asks this server
    ends_with_running_answers(server, signal.SIGINT)


def test_a_port_in_use_is_a_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [*EFFC, "serve", "zoo:tiny-llama", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 5 and "--port" in done.stderr
    assert f"port {port} of 127.0.0.1 is in use" in done.stderr


def test_a_missing_package_is_named_with_its_group(effc, monkeypatch):  # noqa: F811
    known = environment.check_modules

    def absent(modules, *rest):
        known([f"{name}_absent" if name == "uvicorn" else name for name in modules], *rest)

    monkeypatch.setattr(serve, "check_modules", absent)
    run = effc("serve", "zoo:tiny-llama", "--format", "json")
    (found,) = json.loads(run.out)["diagnostics"]
    assert run.code == 5 and found["help"] == 'pip install "effc[serve]"'
    assert found["message"] == "`effc serve` needs uvicorn_absent, not installed here"


def test_what_answers_no_prompt_is_not_served(effc, tmp_path):  # noqa: F811
    from transformers import BertConfig, BertForSequenceClassification

    from tests.worlds import tokenizer

    config = BertConfig(
        vocab_size=261, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    tokenizer(tmp_path / "judge")
    run = effc("serve", "judge", "--port", "0")
    assert run.code == 2 and "is no causal language model" in run.err
    assert effc("serve", "nowhere", "--port", "0").code == 2


def test_a_model_that_would_misread_pieces_of_a_prompt_is_not_served():
    from effc.compiler.apps.serving.runner import make_decoder
    from effc.dsl.syntax.diagnostics import Reject

    for name in ("mamba", "rwkv"):
        with pytest.raises(Reject, match=f"{name} keeps a state"):
            make_decoder(tiny.model(name), name)


def test_a_server_ends_as_ever_while_refused_requests_wait_for_their_turn():
    lines = b"".join(b"a%d: b\r\n" % n for n in range(300))
    with serving("zoo:tiny-llama") as served, ExitStack() as stack:
        for _ in range(50):  # one every 20 ms is answered
            stack.enter_context(raw(served, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\n"))
        code, errors = served.stop()
    assert code == 130 and "internal" not in errors, errors
