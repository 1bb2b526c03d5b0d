"""Completions that begin with their prompt, and the probabilities of its tokens, as harnesses ask for them."""

import effc
import pytest
import torch
from transformers import AutoTokenizer

from tests.compiler.apps.serving.conftest import serving

pytestmark = pytest.mark.slow

PROMPT = "And it came to pass in those days, when there was no king in Israel, that the man went his way. " * 3


@pytest.fixture(scope="module")
def server(artifact):
    with serving(artifact) as served:
        yield served


@pytest.fixture(scope="module")
def tokenizer(artifact):
    return AutoTokenizer.from_pretrained(artifact / "native")


@pytest.fixture(scope="module")
def logprobs(artifact, tokenizer):
    """Of each token of the prompt but the first, by the model itself."""
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    assert ids.shape[1] > 70  # more than one call reads
    return effc.load(artifact, batch_invariant=True, threads=1)(ids).logits[0].log_softmax(-1)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_logprobs_of_an_echo_are_those_of_the_prompts_tokens(server, tokenizer, logprobs, max_tokens):
    ids = tokenizer(PROMPT)["input_ids"]
    server.complete(PROMPT)  # a prompt that is known is scored all the same
    choice = server.complete(ids, echo=True, logprobs=1, max_tokens=max_tokens).choices[0]
    scores = choice.logprobs.token_logprobs
    assert len(scores) == len(choice.logprobs.tokens) == len(ids) + max_tokens and scores[0] is None
    expected = logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    assert scores[1 : len(ids)] == pytest.approx(expected.tolist(), abs=1e-3)
    likeliest = [max(entry.values()) for entry in choice.logprobs.top_logprobs[1 : len(ids)]]
    assert likeliest == pytest.approx(logprobs[:-1].amax(-1).tolist(), abs=1e-3)
    assert choice.finish_reason == "length" and choice.text.startswith(tokenizer.decode(ids, skip_special_tokens=True))


def test_scores_do_not_depend_on_what_else_is_answered(server):
    asked = {"echo": True, "logprobs": 2, "max_tokens": 1}
    alone = [server.complete(text, **asked).choices[0] for text in ("And", PROMPT)]
    together = server.complete(["And", PROMPT], **asked).choices
    assert [c.logprobs.token_logprobs for c in together] == [c.logprobs.token_logprobs for c in alone]


def test_an_echo_is_the_prompt_and_its_answer(server):
    plain = server.complete(PROMPT).choices[0].text
    assert server.complete(PROMPT, echo=True).choices[0].text == PROMPT + plain
    streamed = [chunk.choices[0].text for chunk in server.complete(PROMPT, echo=True, stream=True)]
    assert "".join(streamed) == PROMPT + plain and len(streamed) > 2
    stops = ["no king in Israel", plain[3:6]]  # they end the answer, not its prompt
    assert server.complete(PROMPT, echo=True, stop=stops).choices[0].text == PROMPT + plain[: plain.find(stops[1])]


def test_no_tokens_are_an_answer_with_its_prompt_alone(server):
    before = server.metric("effc_generated_tokens_total")
    answer = server.complete(PROMPT, echo=True, max_tokens=0)
    assert (answer.choices[0].text, answer.usage.completion_tokens) == (PROMPT, 0)
    assert server.metric("effc_generated_tokens_total") == before
    refused = server.post(prompt=PROMPT, max_tokens=0)
    assert refused.status_code == 400 and "`max_tokens` is 0" in refused.json()["error"]["message"]


@pytest.mark.parametrize("echo", [False, True])
def test_offsets_are_where_tokens_begin_in_the_text(server, echo):
    asked = {"echo": echo, "logprobs": 0, "max_tokens": 9}
    choice = server.complete("In the beginning", **asked).choices[0]
    offsets, tokens = choice.logprobs.text_offset, choice.logprobs.tokens
    assert len(offsets) == len(tokens) and offsets[0] == 0
    for offset, token in zip(offsets, tokens, strict=True):
        text = choice.text[offset:].lstrip()
        assert text.startswith(token.strip()) or "\ufffd" in token or token in ("<s>", "</s>"), (offset, token)
    chunks = [chunk.choices[0].logprobs for chunk in server.complete("In the beginning", stream=True, **asked)]
    assert [offset for chunk in chunks for offset in chunk.text_offset] == offsets
