"""Calls of tools: the tokens that a grammar of them allows, and the calls in a text."""

import asyncio
import json

import pytest
from effc.compiler.apps.serving.answers import ChatAnswer
from effc.compiler.apps.serving.error_response import ErrorResponse
from effc.compiler.apps.serving.grammar import GrammarCompiler, Matcher
from effc.compiler.apps.serving.protocol import ChatRequest
from effc.compiler.apps.serving.request import AnswerChunk
from effc.compiler.apps.serving.stream import HEARTBEAT, sse_events
from effc.compiler.apps.serving.text import TextDecoder, hidden_token_texts_by_id
from effc.compiler.apps.serving.tools import END, START, CallParser, CallPolicy, Function
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import worlds

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Function(name="weather", parameters=CITY)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ur"}}\n</tool_call>'
KINDS = {"text": [], "added": [False], "special": [True]}  # what models have for `<tool_call>`


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    tokenizer = worlds.tokenizer(tmp_path_factory.mktemp("calls"), start=False)
    marks = [AddedToken(mark, special=special) for special in KINDS[request.param] for mark in (START, END)]
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>"), *marks])
    return tokenizer


def compiler_of(tokenizer, rows=None, eos_ids=(1,)) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, rows or len(tokenizer) + 3, eos_ids)


def matcher_of(tokenizer, *functions, **policy) -> Matcher:
    policy = CallPolicy(functions or (WEATHER,), **{"forced": False, **policy})
    return policy.grammar(compiler_of(tokenizer))


def is_allowed(tokenizer, matcher, text, in_pieces=False) -> bool:
    """Whether the model may write a text, in the tokens that its tokenizer cuts it into, and end there.

    in_pieces   character by character, so that no mark is a token
    """
    matcher = matcher.copy()
    for token in (
        t for part in (text if in_pieces else [text]) for t in tokenizer(part, add_special_tokens=False)["input_ids"]
    ):
        if token not in matcher.allowed():
            return False
        if matcher.push(token):
            return text.endswith("}")
    return 1 in matcher.allowed()


def test_a_model_begins_a_call_by_the_token_that_it_has_for_it(tokenizer):
    matcher = matcher_of(tokenizer)
    for text in ("no call", CALL, f"first {CALL}", f"{CALL} and {CALL}", f"<think>hm</think>{CALL} so be it"):
        assert is_allowed(tokenizer, matcher, text), text


def test_arguments_keep_to_the_schema_and_are_spaced_as_templates_write_them(tokenizer):
    matcher = matcher_of(tokenizer, Function(name="weather", parameters={**CITY, "additionalProperties": False}))
    wrong = ('{"city": 5}', "{}", '{"city":"Ur"}', '{"city":  "Ur"}', '{ "city": "Ur"}', '{"city": "Ur", "a": 1}')
    for arguments in wrong:
        assert not is_allowed(tokenizer, matcher, CALL.replace('{"city": "Ur"}', arguments)), arguments
    assert not is_allowed(tokenizer, matcher, CALL.replace("weather", "whether"))


def test_a_call_that_is_spelled_in_pieces_breaks_no_rule(tokenizer):
    matcher = matcher_of(tokenizer, parallel=False)
    assert is_allowed(tokenizer, matcher, "a < b, <tool, and no call", in_pieces=True)
    for text in (CALL.replace('"Ur"', "5"), f"{CALL}{CALL}"):
        assert not is_allowed(tokenizer, matcher, text, in_pieces=True)


def test_at_most_one_call_is_allowed_where_calls_are_not_parallel(tokenizer):
    matcher = matcher_of(tokenizer, parallel=False)
    assert is_allowed(tokenizer, matcher, f"first {CALL} and that is it")
    assert not is_allowed(tokenizer, matcher, f"{CALL}{CALL}")


def test_the_text_of_a_call_has_its_marks_whatever_tokens_they_are(tokenizer):
    decoder = TextDecoder(tokenizer, (), hidden_token_texts_by_id(tokenizer, (START, END)))
    parser = CallParser(CallPolicy((WEATHER,), forced=False))
    ids = tokenizer(f"Behold {CALL} so", add_special_tokens=False)["input_ids"]
    shown = "".join(parser.push(decoder.push(token)) for token in ids) + parser.push(decoder.end()) + parser.end()
    (call,) = parser.calls
    assert shown == "Behold  so" and json.loads(call["function"]["arguments"]) == {"city": "Ur"}


NESTED = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/A"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"A": {"enum": ["x"]}},
}
TREE = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    ("parameters", "right", "wrong"),
    [
        (NESTED, '{"a": "x"}', '{"a": "y"}'),
        (TREE, '{"next": {"next": {}}}', '{"next": {"name": "f", "arguments": {}}}'),
        ({"properties": {"a": {"type": "integer"}}}, '{"a": 1}', "5"),
    ],
)
def test_references_are_those_of_the_tools_own_schema_and_arguments_are_an_object(
    tokenizer, parameters, right, wrong, forced
):
    matcher = matcher_of(tokenizer, Function(name="f", parameters=parameters), WEATHER, forced=forced)
    for arguments, allowed in ((right, True), (wrong, False)):
        call = f'{{"name": "f", "arguments": {arguments}}}'
        text = call if forced else f"{START}\n{call}\n{END}"
        assert is_allowed(tokenizer, matcher, text) == allowed, text


def parsed(text, sizes=(1,)) -> tuple[str, list[dict]]:
    """Text and calls of an answer that comes in pieces of so many characters."""
    parser, shown, at = CallParser(CallPolicy((WEATHER,), forced=False)), "", 0
    while at < len(text):
        size = sizes[at % len(sizes)]
        shown, at = shown + parser.push(text[at : at + size]), at + size
    return shown + parser.end(), [json.loads(call["function"]["arguments"]) for call in parser.calls]


PARTS = st.sampled_from(['"', "\\", "a", "</tool_call>", "<tool_call>", "{"])


@given(st.lists(PARTS, max_size=8).map("".join), st.lists(st.integers(1, 9), min_size=1))
def test_a_string_of_a_call_may_hold_what_ends_a_call(city, sizes):
    call = f'{START}\n{{"name": "weather", "arguments": {json.dumps({"city": city})}}}\n{END}'
    assert parsed(f"so {call} it is", sizes) == ("so  it is", [{"city": city}])


@pytest.mark.parametrize(
    "body",
    ['{"name": "weather", "arguments": {"a": 1, "a": 2}}', '{"name": "other", "arguments": {}}', "no JSON", "{}"],
)
def test_a_call_that_can_not_be_read_is_text(body):
    assert parsed(f"so {START}{body}{END} it {CALL}") == (f"so {START}{body}{END} it ", [{"city": "Ur"}])


def test_an_answer_that_keeps_to_a_schema_has_no_calls_in_its_strings():
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": CITY}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}},
    }
    answer = ChatAnswer("m", 1, None, policy=ChatRequest.model_validate(body).answer_policy)
    text = json.dumps({"city": CALL})
    answer.add(AnswerChunk(text, 9, "stop"))
    message = answer.response_body(False)["choices"][0]["message"]
    assert message["content"] == text and "tool_calls" not in message


def test_a_stream_of_a_call_sends_comments_while_its_text_is_not_complete(monkeypatch):
    monkeypatch.setattr("effc.compiler.apps.serving.stream.SILENCE_S", 0)
    answer = ChatAnswer("m", 1, None, policy=CallPolicy((WEATHER,), forced=True))
    call = CALL.removeprefix(START).removesuffix(END)  # a forced one has no marks

    async def pieces():
        for text in call[:-1]:
            yield AnswerChunk(text, 1)
        yield AnswerChunk(call[-1], 1, "stop")

    async def sent():
        return [line async for line in sse_events(answer, pieces(), with_usage=False)]

    _, *events, last, done = asyncio.run(sent())
    assert (
        set(events) == {HEARTBEAT}
        and len(events) == len(call) - 1
        and '"weather"' in last
        and done.endswith("[DONE]\n\n")
    )


def test_a_stream_sends_comments_while_its_prompt_is_read(monkeypatch):
    monkeypatch.setattr("effc.compiler.apps.serving.stream.SILENCE_S", 0.01)

    async def pieces():
        await asyncio.sleep(0.1)
        yield AnswerChunk("a", 1)
        yield AnswerChunk("b", 1, "stop")

    async def sent():
        return [line async for line in sse_events(ChatAnswer("m", 1, None), pieces(), with_usage=False)]

    events = asyncio.run(sent())[1:-1]
    assert events[0] == HEARTBEAT and [e for e in events if e != HEARTBEAT] == events[-2:]


def test_a_reader_who_leaves_before_the_first_piece_ends_the_wait():
    closed = []

    async def pieces():
        try:
            await asyncio.sleep(60)
            yield AnswerChunk("a", 1)
        finally:
            closed.append(True)

    async def left():
        events = sse_events(ChatAnswer("m", 1, None), pieces(), with_usage=False)
        await anext(events)
        reading = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.05)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(left(), 10))
    assert closed == [True]


# -- tokenizers that are no use for a schema ------------------------------------------------------------------


def test_a_tokenizer_that_the_library_can_not_read_is_a_refusal_of_the_schema():
    library = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    compiler = compiler_of(PreTrainedTokenizerFast(tokenizer_object=library, unk_token="a"), rows=2)
    for _ in range(2):  # read once, refused each time
        with pytest.raises(ErrorResponse, match=r"tokenizer can't be used for a schema: .*decoder") as refusal:
            compiler.of_schema({"type": "object"}, "response_format")
        assert refusal.value.status == 400


def test_a_model_without_an_end_has_no_schemas(tokenizer):
    for eos_ids in ((), (len(tokenizer) + 1,)):
        with pytest.raises(ErrorResponse, match="no token that ends a text"):
            compiler_of(tokenizer, eos_ids=eos_ids).of_schema({"type": "integer"}, "response_format")


def test_a_tokenizer_may_have_more_tokens_than_the_model_has_rows():
    import torch

    library = Tokenizer(models.BPE({c: i for i, c in enumerate(["</s>", *"0123456789"])}, []))
    library.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, eos_token="</s>")
    tokenizer.add_tokens([AddedToken("9\u00e9"), AddedToken("<pad>")])
    matcher = compiler_of(tokenizer, rows=11, eos_ids=(0,)).of_schema({"type": "integer"}, "response_format")
    masked = matcher.mask(torch.zeros(11))
    assert masked.shape == (11,) and masked.isfinite().sum() == 10  # a digit, and no end


def test_numbers_beyond_64_bits_are_refused_however_large(tokenizer):
    for number in (2**63, -(10**400), 10**5000, 1e300):
        with pytest.raises(ErrorResponse, match="numbers have 64 bits here"):
            compiler_of(tokenizer).of_schema({"type": "integer", "maximum": number}, "response_format")
