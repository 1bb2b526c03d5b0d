"""`effc serve` over the native engine, asked by the `openai` package."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import effc
import httpx
import openai
import pytest
import torch
from transformers import AutoTokenizer

from tests.compiler.apps.serving.conftest import serving

PROMPTS = [
    f"And the {word} of the"
    for word in (
        "king",
        "house",
        "children",
        "LORD",
        "city",
        "people",
        "priests",
        "word",
        "sons",
        "land",
        "day",
        "wilderness",
        "tribe",
        "voice",
        "sea",
        "men",
    )
]
HI = [{"role": "user", "content": "And it came to pass"}]


@pytest.fixture(scope="module")
def server(artifact):
    with serving(artifact) as served:
        yield served


def quiet(server) -> bool:
    """Whether all places become free, soon."""
    for _ in range(100):
        if server.metric("effc_requests_running") == server.metric("effc_requests_waiting") == 0:
            return True
        time.sleep(0.05)
    return False


def test_a_completion_is_what_the_artifact_generates(server, artifact):
    model, tokenizer = effc.load(artifact, batch_invariant=True), AutoTokenizer.from_pretrained(artifact / "native")
    ids = tokenizer("And it came to pass", return_tensors="pt")["input_ids"]
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    found = server.complete()
    assert found.choices[0].text == tokenizer.decode(wanted) and found.choices[0].finish_reason == "length"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (ids.shape[1], 12)
    assert server.complete(prompt=ids[0].tolist()).choices[0].text == found.choices[0].text


@pytest.mark.slow
def test_a_stream_has_the_text_of_the_whole_answer_and_its_usage_at_the_end(server):
    chat = server.client.chat.completions
    asked = {"model": server.name, "messages": HI, "max_completion_tokens": 10, "temperature": 0}
    whole = chat.create(**asked)
    chunks = list(chat.create(**asked, stream=True, stream_options={"include_usage": True}))
    told = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert told == whole.choices[0].message.content != ""
    assert chunks[0].choices[0].delta.role == whole.choices[0].message.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["length"]
    usage, wanted = chunks[-1].usage, whole.usage
    assert usage.total_tokens == wanted.total_tokens and usage.completion_tokens == wanted.completion_tokens == 10
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1  # it was asked before
    plain = [c.choices[0].text for c in server.complete(stream=True)]
    assert "".join(plain) == server.complete().choices[0].text and len(plain) > 3


def test_sixteen_at_once_get_what_each_gets_alone(server):
    alone = [server.complete(prompt).choices[0].text for prompt in PROMPTS]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda prompt: server.complete(prompt).choices[0].text, PROMPTS))
    assert together == alone and len(set(alone)) > 8


def test_a_seed_gives_the_same_text_whatever_else_is_answered(server):
    def draw(seed, prompt=PROMPTS[0]):
        return server.complete(prompt, temperature=1.2, top_p=0.95, top_k=50, seed=seed).choices[0].text

    alone = draw(3)
    with ThreadPoolExecutor(8) as pool:
        others = pool.map(lambda i: draw(100 + i, PROMPTS[i]), range(7))
        assert draw(3) == alone != draw(4)
        assert len(set(others)) == 7


@pytest.mark.slow
def test_a_conversation_that_goes_on_is_not_read_again_and_is_answered_as_if_it_were(server, artifact):
    def turn(messages, url=server.url, **headers):
        body = {"model": server.name, "messages": messages, "max_tokens": 8, "temperature": 0}
        told = httpx.post(f"{url}{CHAT}", json=body, headers=headers, timeout=60).json()
        return told["choices"][0]["message"]["content"], told["usage"]

    messages = [{"role": "user", "content": "Thou shalt say what the sons of Belial did that day in Gibeah."}]
    for _ in range(3):
        said, usage = turn(messages)
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
    held = usage["prompt_tokens_details"]["cached_tokens"]
    assert usage["prompt_tokens"] / 2 < held < usage["prompt_tokens"]
    assert server.metric("effc_held_tokens_total") >= held
    keys = ["a" * 16, "b" * 16]
    with serving(artifact, *[flag for key in keys for flag in ("--api-key", key)]) as other:
        counts = []
        for key in (keys[0], keys[1], keys[0]):  # the first has it new, and what one said is none of another's
            fresh, told = turn(messages[:-2], other.url, authorization=f"Bearer {key}")
            assert fresh == said
            counts.append(told["prompt_tokens_details"]["cached_tokens"])
    assert counts[:2] == [0, 0] and counts[2] == usage["prompt_tokens"] - 1


def test_a_stop_string_ends_the_answer_and_is_never_sent(server):
    plain = server.complete(max_tokens=24).choices[0].text
    stop = plain[10:16]  # across tokens
    for stream in (False, True):
        found = server.complete(max_tokens=24, stop=[stop, "never said"], stream=stream)
        choices = [c.choices[0] for c in found] if stream else [found.choices[0]]
        assert "".join(c.text for c in choices) == plain[: plain.find(stop)]
        assert choices[-1].finish_reason == "stop"


@pytest.mark.slow
def test_answers_with_speculation_are_those_without(server, artifact):
    prompt = " ".join(["And it came to pass in those days, that the king said unto the people,"] * 3)
    asked = [{"max_tokens": 100}, {"max_tokens": 100, "temperature": 0.8, "seed": 5, "logprobs": 2}]
    with serving(artifact, "--speculation") as fast:
        for more in asked:
            own, other = (s.complete(prompt, **more).choices[0] for s in (server, fast))
            assert own.text == other.text and own.logprobs == other.logprobs
        assert fast.metric("effc_draft_tokens_total") > 0
    assert server.metric("effc_draft_tokens_total") == 0


def test_a_reader_that_leaves_frees_its_place(server):
    def cancelled():
        return server.metric("effc_requests_total", outcome="cancelled")

    before = cancelled()
    stream = server.complete(max_tokens=480, stream=True)
    next(iter(stream))
    assert server.metric("effc_requests_running") == 1
    stream.close()
    assert quiet(server)
    for _ in range(20):  # a reader may leave before the request is known, or after its last word
        with suppress(httpx.TimeoutException):
            httpx.post(
                f"{server.url}/v1/completions",
                timeout=0.05,
                json={"model": server.name, "prompt": "In", "max_tokens": 500, "temperature": 0},
            )
        assert quiet(server)
        if cancelled() >= before + 2:
            break
    assert cancelled() >= before + 2


def test_probabilities_are_those_of_the_model(server, artifact):
    model = effc.load(artifact, threads=1)
    found = server.complete(prompt=[0, 74, 130], max_tokens=1, logprobs=3).choices[0].logprobs
    wanted = model(torch.tensor([[0, 74, 130]])).logits[0, -1].log_softmax(-1).topk(3).values
    assert list(found.top_logprobs[0].values()) == pytest.approx(wanted.tolist(), abs=1e-4)
    assert found.token_logprobs == pytest.approx(wanted[:1].tolist(), abs=1e-4)
    chat = server.client.chat.completions.create(
        model=server.name, messages=HI, max_tokens=3, logprobs=True, top_logprobs=2, temperature=0
    )
    told = chat.choices[0].logprobs.content
    assert len(told) == 3 and all(t.top_logprobs[0].token == t.token and t.logprob <= 0 for t in told)


def test_models_health_and_metrics_are_told(server):
    (model,) = server.client.models.list().data
    assert model.id == server.name == "served" and server.client.models.retrieve("served").id == "served"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    tokens = server.metric("effc_generated_tokens_total")
    server.complete(max_tokens=5)
    assert server.metric("effc_generated_tokens_total") == tokens + 5


CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        ("/v1/completions", {"prompt": "a", "n": 9}, "n", "less than or equal to 8"),
        ("/v1/completions", {"prompt": "a", "n": True}, "n", "`n` is true, and a number is needed"),
        (CHAT, {"messages": HI, "temperature": False}, "temperature", "`temperature` is false"),
        ("/v1/completions", {"prompt": "a", "best_of": True}, "best_of", "only 1 is supported here"),
        ("/v1/completions", {"prompt": "a", "best_of": 2}, "best_of", "`best_of` is 2, and only 1 is supported here"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, "temperature", "greater than or equal to 0"),
        ("/v1/completions", {"prompt": "a", "top_p": 0}, "top_p", "greater than 0"),
        ("/v1/completions", {"prompt": "a", "stop": ["a"] * 5}, "stop", "at most 4"),
        ("/v1/completions", {"prompt": "a", "stop": ""}, None, "at least 1"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, None, "`max_tokens` is 0"),
        ("/v1/completions", {"prompt": "a", "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        (CHAT, {"messages": HI, "echo": True}, "echo", "`echo` is True, and only False is supported here"),
        ("/v1/completions", {"prompt": "a", "colour": 1}, "colour", "`colour` is not known here"),
        ("/v1/completions", {"prompt": ["a"] * 33}, "prompt", "at most 32"),
        ("/v1/completions", {"prompt": ["a", [5]]}, "prompt", "nor a list of them"),
        ("/v1/completions", {"prompt": [1.5]}, "prompt", "neither a text nor a list of tokens"),
        ("/v1/completions", {"prompt": []}, "prompt", "the prompt has no token"),
        ("/v1/completions", {"prompt": [5000]}, "prompt", "outside of the model's 2048"),
        ("/v1/completions", {}, "prompt", "required"),
        ("/v1/completions", {"prompt": "a b " * 400}, "prompt", "the model's context is 512 tokens"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 512}, "prompt", "and 512 of the answer are more"),
        ("/v1/completions", {"prompt": "and " * 50_000}, "prompt", "and 200000 characters are more"),
        (CHAT, {"messages": []}, "messages", "at least 1"),
        (CHAT, {"messages": [{"role": "assistant", "content": "a"}]}, "messages", "messages: answered already"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "should be 'text'"),
        (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, "tools.0.function", "field required"),
        (CHAT, {"messages": HI, "response_format": {"type": "json"}}, "response_format.type", "'json_schema'"),
        (CHAT, {"messages": HI, "functions": [{"name": "f"}]}, "functions", "`functions` is not supported here"),
    ],
)
def test_what_is_wrong_or_not_done_is_refused_in_openais_form(server, path, body, param, said):
    answer = server.post(path, **body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert said in error["message"], error
    assert param is None or error["param"] == param


def test_what_is_no_request_at_all_is_refused(server):
    kind = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=b"{", headers=kind)
    assert answer.status_code == 400 and "is not JSON" in answer.json()["error"]["message"]
    answer = httpx.post(f"{server.url}/v1/completions", json=[1])
    assert answer.status_code == 400 and answer.json()["error"]["message"] == "the body is no JSON object"
    answer = httpx.get(f"{server.url}/v1/nothing")
    assert answer.json()["error"]["message"] == "there is no GET /v1/nothing here"
    with pytest.raises(openai.NotFoundError, match="`other` does not exist, `served` does"):
        server.client.completions.create(model="other", prompt="a")


def test_settings_that_ask_for_what_is_done_anyway_are_taken(server):
    found = server.client.chat.completions.create(
        model=server.name,
        messages=[{"role": "developer", "content": "Speak"}, *HI],
        max_tokens=2,
        n=1,
        user="me",
        frequency_penalty=0,
        presence_penalty=0,
        logit_bias={},
        response_format={"type": "text"},
        temperature=0,
    )
    assert found.usage.completion_tokens == 2
