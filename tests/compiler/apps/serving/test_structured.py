"""Answers that keep to a schema, calls of tools, several choices and changed logits, asked by the `openai` package."""

import json
from contextlib import suppress

import pytest
import torch
from effc.compiler.apps.serving.logit_edits import LogitEdits
from effc.compiler.apps.serving.tools import CallParser, CallPolicy, Function
from hypothesis import given
from hypothesis import strategies as st

from tests.compiler.apps.serving.conftest import serving

pytestmark = pytest.mark.slow

HI = [{"role": "user", "content": "And it came to pass"}]
CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["king", "priest"]},
    },
    "required": ["name", "count", "kind"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "count", "description": "Count", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "rest"}},
]


@pytest.fixture(scope="module")
def server(artifact):
    with serving(artifact) as served:
        yield served


def keeps_to_schema(value) -> bool:
    return (
        sorted(value) == ["count", "kind", "name"]
        and len(value["name"]) <= 6
        and 0 <= value["count"] <= 99
        and value["kind"] in ("king", "priest")
    )


def ask(server, **more):
    return server.client.chat.completions.create(
        **{"model": server.name, "messages": HI, "max_tokens": 150, "temperature": 1, **more}
    )


def test_an_answer_keeps_to_a_json_schema_whatever_is_drawn(server):
    response_format = {"type": "json_schema", "json_schema": {"name": "one", "schema": SCHEMA, "strict": True}}
    for choice in ask(server, response_format=response_format, n=4, seed=1).choices:
        assert choice.finish_reason == "stop" and keeps_to_schema(json.loads(choice.message.content))


def test_a_completion_keeps_to_a_schema_as_well_and_ends_where_nothing_may_follow(server):
    extra = {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["And", "But"]}}}}
    answer = server.client.completions.create(
        model=server.name, prompt="a", max_tokens=50, temperature=1, seed=3, extra_body=extra
    )
    assert json.loads(answer.choices[0].text) in ("And", "But") and answer.choices[0].finish_reason == "stop"


def test_a_json_object_that_is_cut_off_says_so(server):
    (choice,) = ask(server, response_format={"type": "json_object"}, max_tokens=2, seed=0).choices
    assert choice.finish_reason == "length" and choice.message.content.startswith("{")


def test_choices_are_the_answers_of_seeds_one_after_the_other(server):
    together = [c.message.content for c in ask(server, n=3, seed=5, max_tokens=12).choices]
    alone = [ask(server, seed=5 + i, max_tokens=12).choices[0].message.content for i in range(3)]
    assert together == alone and len(set(together)) > 1


def test_choices_of_a_stream_come_with_their_number_and_all_end(server):
    texts, ends = {0: "", 1: ""}, {}
    for chunk in ask(server, n=2, seed=5, max_tokens=12, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert list(texts.values()) == [c.message.content for c in ask(server, n=2, seed=5, max_tokens=12).choices]
    assert set(ends) == {0, 1}


def test_several_prompts_are_answered_as_each_alone(server):
    prompts = ["And it came to pass", "In the beginning", "And"]
    together = server.complete(prompt=prompts, n=2, temperature=1, seed=4)
    assert [choice.index for choice in together.choices] == list(range(6))
    for number, prompt in enumerate(prompts):
        alone = server.complete(prompt=prompt, n=2, temperature=1, seed=4)
        assert [c.text for c in together.choices[2 * number : 2 * number + 2]] == [c.text for c in alone.choices]


def test_usage_counts_the_tokens_of_all_choices(server):
    usage = ask(server, n=3, max_tokens=4, seed=2).usage
    assert usage.completion_tokens <= 12 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_bias_of_a_hundred_forces_a_token_and_of_minus_a_hundred_bans_it(server):
    plain = server.complete(prompt=[5, 6], max_tokens=3)
    forced = server.complete(prompt=[5, 6], max_tokens=3, logit_bias={"70": 100}, logprobs=0)
    (token,) = set(forced.choices[0].logprobs.tokens)
    banned = server.complete(prompt=[5, 6], max_tokens=3, logit_bias={"70": -100})
    assert token not in banned.choices[0].text or plain.choices[0].text == banned.choices[0].text


@given(
    st.lists(st.integers(0, 9), max_size=20), st.floats(-2, 2, width=32), st.floats(-2, 2, width=32), st.integers(0, 99)
)
def test_penalties_are_those_of_openais_formula(written, frequency, presence, seed):
    logits = torch.randn(10, generator=torch.Generator().manual_seed(seed))
    edits = LogitEdits({3: 1.5}, frequency, presence, None)
    for token in written:
        edits.push(token)
    expected = torch.tensor(
        [
            logit + (1.5 if i == 3 else 0) - written.count(i) * frequency - (written.count(i) > 0) * presence
            for i, logit in enumerate(logits.tolist())
        ]
    )
    assert torch.allclose(edits.apply(logits), expected, atol=1e-4)


def test_logits_that_no_setting_changes_are_not_copied():
    logits = torch.randn(10)
    assert LogitEdits({}, 0, 0, None).apply(logits) is logits


def test_a_required_call_names_a_tool_and_its_arguments_keep_to_the_schema(server):
    for choice in ask(server, tools=TOOLS, tool_choice="required", n=4, seed=1).choices:
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "rest" or (call.function.name == "count" and keeps_to_schema(arguments))


def test_a_named_tool_is_the_one_that_is_called_in_a_stream_too(server):
    choice = {"type": "function", "function": {"name": "count"}}
    chunks = [c.choices[0] for c in ask(server, tools=TOOLS, tool_choice=choice, seed=1, stream=True) if c.choices]
    (call,) = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert call.function.name == "count" and keeps_to_schema(json.loads(call.function.arguments))
    assert chunks[-1].finish_reason == "tool_calls" and not any(chunk.delta.content for chunk in chunks)


def test_a_stream_has_no_empty_chunks_before_its_call(server):
    chunks = list(ask(server, tools=TOOLS, tool_choice="required", seed=1, stream=True))
    assert len(chunks) == 2 and chunks[1].choices[0].delta.tool_calls  # the role, and all of the call


def test_a_model_that_may_call_and_does_not_answers_text(server):
    (choice,) = ask(server, tools=TOOLS, max_tokens=8, seed=1).choices
    assert choice.message.tool_calls is None and choice.message.content and choice.finish_reason == "length"


def test_the_template_reads_the_tools_unless_none_may_be_called(server):
    tokens = {
        choice: ask(server, tools=TOOLS, tool_choice=choice, max_tokens=1).usage.prompt_tokens
        for choice in ("auto", "none")
    }
    assert tokens["none"] == ask(server, max_tokens=1).usage.prompt_tokens < tokens["auto"]


def test_a_conversation_goes_on_behind_a_call_and_its_result(server):
    call = {"id": "call_1", "type": "function", "function": {"name": "rest", "arguments": "{}"}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rested"},
    ]
    assert ask(server, messages=messages, max_tokens=2).choices[0].message.content


@given(st.data())
def test_calls_in_a_text_are_the_same_however_it_comes_in_pieces(data):
    parts = [
        "Behold, ",
        '<tool_call>\n{"name": "rest", "arguments": {"a": "<b>"}}\n</tool_call>',
        " a < b ",
        '<tool_call>{"name": "count", "arguments": {}}</tool_call>',
        "<tool",
    ]
    policy = CallPolicy((Function(name="rest"), Function(name="count")), forced=False)
    text, parser, shown = "".join(parts), CallParser(policy), ""
    while text:
        size = data.draw(st.integers(1, 9))
        shown, text = shown + parser.push(text[:size]), text[size:]
    shown += parser.end()
    assert shown == "Behold,  a < b <tool"
    assert [call["function"]["name"] for call in parser.calls] == ["rest", "count"]
    assert json.loads(parser.calls[0]["function"]["arguments"]) == {"a": "<b>"}


def test_a_call_that_is_cut_off_is_text():
    parser = CallParser(CallPolicy((Function(name="rest"),), forced=False))
    assert parser.push('so <tool_call>{"name": "re') == "so " and not parser.calls
    assert parser.end() == '<tool_call>{"name": "re'


def tool(parameters) -> dict:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def schema(value) -> dict:
    return {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


SELF = {"type": "object", "properties": {"self": {"$ref": "#"}}, "required": ["self"]}
MANY = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(1000)}}
CHOICES = {"anyOf": [{"type": "object", "properties": {f"p{i}": {}}, "required": [f"p{i}"]} for i in range(2100)]}
DEEP = {"type": "object"}
for _ in range(60):
    DEEP = {"type": "object", "properties": {"a": DEEP}, "required": ["a"]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (schema({"type": "nothing"}), "the schema can't be used"),
        (schema({"type": "string", "pattern": "("}), "the schema can't be used"),
        (schema({"type": "integer", "minimum": 5, "maximum": 4}), "the schema can't be used"),
        (schema({"$ref": "#/$defs/nowhere"}), "the schema can't be used"),
        (schema({"$ref": "#"}), "no text keeps to the schema"),
        (schema(SELF), "the schema is too complex"),
        (schema(CHOICES), "fewer properties, choices"),
        (schema({"type": "integer", "minimum": 10**30}), "numbers have 64 bits"),
        (schema({"oneOf": [{"type": "integer"}, {"minimum": 3}]}), "write `anyOf`"),
        (schema({"type": "string", "pattern": "^(?=a).*$"}), "look-around"),
        ({"messages": HI, "tools": [tool({"type": "nothing"})]}, "the type `object`"),
        (
            {"messages": HI, "tools": [tool({"properties": {"a": {"type": "nothing"}}})]},
            "the schema of `f` can't be used",
        ),
        ({"messages": HI, "tools": [tool({}), tool({})]}, "two tools have one name"),
        ({"messages": [*HI, {"role": "tool", "content": "a"}]}, "needs the `tool_call_id`"),
        (schema({"enum": ["x" * 300_000]}), "at most 262144 are read"),
        ({"messages": HI, "response_format": {"type": "json_schema"}}, "needs it"),
        ({"messages": HI, "tool_choice": "required"}, "there are no tools"),
        (
            {"messages": HI, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}},
            "`fly` is none of the tools",
        ),
        ({**schema(SCHEMA), "tools": TOOLS, "tool_choice": "required"}, "a call is required"),
        ({"messages": HI, "logit_bias": {"5000": 1}}, "5000 is no token"),
        ({"messages": HI, "logit_bias": {"-1": 1}}, "-1 is no token"),
        ({"messages": HI, "logit_bias": {"a": 1}}, "`a` is no number of a token"),
        ({"messages": HI, "logit_bias": {"0300": 1, "300": -1}}, "`0300` is no number of a token"),
        ({"messages": HI, "logit_bias": {str(i): 1 for i in range(1025)}}, "at most 1024 items"),
        ({"messages": HI, "stream_options": {"include_usage": True}}, "`stream_options` is for a stream"),
        ({"messages": HI, "tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "`tool_choice`: it is neither"),
        (
            {"messages": HI, "tools": TOOLS, "tool_choice": {"type": "function", "function": {}}},
            "`tool_choice.function.name`",
        ),
        ({"messages": HI, "logit_bias": {"1": 101}}, "less than or equal to 100"),
        ({"messages": HI, "presence_penalty": 3}, "less than or equal to 2"),
        ({"messages": [*HI, {"role": "user"}]}, "a message needs `content`"),
        (
            {
                "messages": [
                    *HI,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}]},
                ]
            },
            "no JSON object",
        ),
    ],
)
def test_schemas_tools_and_biases_that_can_not_be_done_are_refused_by_a_sentence(server, body, words):
    answer = server.post(CHAT, **body)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
    assert ask(server, max_tokens=1).choices


def is_whole_or_cut(answer) -> bool:
    (choice,) = answer.json()["choices"]
    with suppress(ValueError):
        return choice["finish_reason"] == "length" or bool(json.dumps(json.loads(choice["message"]["content"])))
    return False


ENDLESS = [
    DEEP,
    {**MANY, "additionalProperties": False},
    {"type": "string", "pattern": "^(a|b|ab){1,1000}(c{1,1000}){1,1000}$"},
    {"type": "array", "items": {"$ref": "#"}},
    {"type": "string", "pattern": "(a{1,1000}){1,1000}{1,1000}"},
    {},
]


@pytest.mark.parametrize("value", ENDLESS)
def test_schemas_without_an_end_end_at_the_limit_of_tokens(server, value):
    answer = server.post(CHAT, **schema(value), max_tokens=120, seed=1)
    assert answer.status_code == 400 or (answer.status_code == 200 and is_whole_or_cut(answer)), answer.text
    assert ask(server, max_tokens=1).choices
