"""Requests of OpenAI's API, checked field by field; what is not supported is rejected, never ignored."""

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator, model_validator

from .tools import MAX_TOOLS, CallPolicy, NamedTool, Tool, ToolCall, call_policy

# Neutral: it asks for what is done anyway, of requests that have no such field.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "echo": (False,),
    "suffix": ("",),
    "audio": (),
    "prediction": (),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),  # completions have no tools
    "web_search_options": (),
}


# What divides logits may not be so small that float32 ends: 1e-4 is as greedy as a draw gets.
_LEAST = {"temperature": 1e-4, "top_p": 2.0**-126, "repetition_penalty": 1e-2}


MAX_MESSAGES, MAX_PARTS = 2048, 4096  # of a conversation: an empty message costs a template as much as a long one
_LONGEST_STOP = 1024  # characters
_NUMBER = re.compile("0|-?[1-9][0-9]*")
_MAX_CHOICES, _MAX_PROMPTS, _MAX_BIASES = 8, 32, 1024


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool | None = None


class NamedSchema(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())
    name: str | None = None
    schema_: dict[str, Any] = Field(default_factory=lambda: {"type": "object"}, alias="schema")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def require_json_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("`json_schema` belongs to the type `json_schema`, which needs it")
        return self

    @property
    def schema_or_none(self) -> dict[str, Any] | None:
        """Schema that the answer keeps to."""
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.json_schema else {"type": "object"}


class AnyRequest(BaseModel):
    """Fields that chat and completions share. `user` and its like say who asks; nothing is done with them."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: list[Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]] | None = Field(None, max_length=4)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=_MAX_CHOICES)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=_MAX_BIASES)
    response_format: ResponseFormat | None = None

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @model_validator(mode="before")
    @classmethod
    def drop_neutral_settings(cls, body: Any) -> Any:
        """Drop settings that are given as what they are here; refuse other values of them."""
        if not isinstance(body, dict):
            return body
        neutral = _NEUTRAL.keys() - cls.model_fields.keys()
        for name in neutral & body.keys():
            value = body[name]
            if value is not None and not any(
                value == n and isinstance(value, bool) == isinstance(n, bool) for n in _NEUTRAL[name]
            ):
                raise Unsupported(name, value)
        return {name: value for name, value in body.items() if name not in neutral}

    @field_validator("*", mode="before")
    @classmethod
    def refuse_bools_for_numbers(cls, value: Any, info: Any) -> Any:
        """Refuse `true` for a number, which Python takes for 1."""
        kinds = get_args(cls.model_fields[info.field_name].annotation)
        if isinstance(value, bool) and bool not in kinds and {int, float} & set(kinds):
            raise ValueError(f"`{info.field_name}` is {str(value).lower()}, and a number is needed")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("logit_bias", mode="before")
    @classmethod
    def parse_logit_bias_ids(cls, bias: Any) -> Any:
        """JSON's names are strings: each is a number in one spelling, so that no token has two."""
        if isinstance(bias, dict) and (odd := next((key for key in bias if not _NUMBER.fullmatch(str(key))), None)):
            raise ValueError(f"`{odd!s:.40}` is no number of a token")
        return bias

    @model_validator(mode="after")
    def require_stream_for_its_options(self) -> "AnyRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` is for a stream: send `stream: true` with it")
        return self

    @field_validator(*_LEAST)
    @classmethod
    def refuse_tiny_values(cls, value: float | None, info: Any) -> float | None:
        least = _LEAST[info.field_name]
        if value and value < least:
            instead = "0, which takes the likeliest token, or " if info.field_name == "temperature" else ""
            raise ValueError(f"{value:g} is too small: give {instead}{least:g} or more")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def schema_or_none(self) -> dict[str, Any] | None:
        """JSON Schema that the answer keeps to."""
        return self.response_format.schema_or_none if self.response_format else None

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Unsupported(Exception):
    """A setting that is known and not done here."""

    def __init__(self, name: str, value: Any):
        self.name = name
        legal = " or ".join(str(v) for v in _NEUTRAL[name] if not isinstance(v, (list, dict)) and v != "")
        text = "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else f"{value!s:.60}"
        super().__init__(
            f"`{name}` is {text}, and only {legal} is supported here" if legal else f"`{name}` is not supported here"
        )


class Part(BaseModel):
    model_config = ConfigDict(extra="ignore")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def require_content(self) -> "Message":
        if self.content is None and not (self.role == "assistant" and self.tool_calls is not None):
            raise ValueError("a message needs `content`; only an assistant's with `tool_calls` may go without")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a message of the role `tool` needs the `tool_call_id` that it answers")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content or ()]
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": "".join(parts),
        }
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class ChatRequest(AnyRequest):
    messages: Annotated[list[Message], FailFast()] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("tool_choice", mode="before")
    @classmethod
    def require_tool_choice_form(cls, choice: Any) -> Any:
        """Before the forms of it are tried, each of which would be complained of."""
        if choice in (None, "none", "auto", "required") or (
            isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("function"), dict)
        ):
            return choice
        raise ValueError(
            "it is neither `none`, `auto` nor `required`, and names no function: "
            '`{"type": "function", "function": {"name": ...}}` does'
        )

    @model_validator(mode="after")
    def refuse_two_grammars(self) -> "ChatRequest":
        policy = self.call_policy
        if policy and policy.forced and self.schema_or_none is not None:
            raise ValueError("a call is required, so that `response_format` can't say what the answer is")
        return self

    @property
    def call_policy(self) -> CallPolicy | None:
        return call_policy(self.tools, self.tool_choice, parallel=self.parallel_tool_calls is not False)

    @property
    def answer_policy(self) -> CallPolicy | None:
        """Policy of what the answer may call: nothing where it keeps to a schema."""
        return self.call_policy if self.schema_or_none is None else None

    @field_validator("messages", mode="before")
    @classmethod
    def refuse_many_messages(cls, messages: Any) -> Any:
        """Counted before the first of them is looked at."""
        if not isinstance(messages, list):
            return messages
        if len(messages) > MAX_MESSAGES:
            raise ValueError(f"there are {len(messages)} messages, and a conversation has at most {MAX_MESSAGES}")
        contents = [message.get("content") for message in messages if isinstance(message, dict)]
        parts = sum(len(content) for content in contents if isinstance(content, list))
        if parts > MAX_PARTS:
            raise ValueError(f"the messages have {parts} parts, and those of a conversation have at most {MAX_PARTS}")
        return messages

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionRequest(AnyRequest):
    prompt: list[str] | list[list[int]] = Field(max_length=_MAX_PROMPTS)
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def prompts_as_list(cls, prompt: Any) -> Any:
        """A text or its tokens, or a list of such."""
        single = isinstance(prompt, str) or (isinstance(prompt, list) and {*map(type, prompt)} <= {int})
        prompts = [prompt] if single else prompt
        kinds = {*map(type, prompts)} if isinstance(prompts, list) else set()
        if kinds != {str} and (kinds != {list} or any({*map(type, ids)} - {int} for ids in prompts)):
            raise ValueError("it is neither a text nor a list of tokens, nor a list of them")
        return prompts

    @model_validator(mode="after")
    def refuse_many_choices(self) -> "CompletionRequest":
        if (count := len(self.prompt) * (self.n or 1)) > _MAX_PROMPTS:
            raise ValueError(f"prompts times `n` are {count}, and at most {_MAX_PROMPTS} answers are given at a time")
        return self

    @model_validator(mode="after")
    def require_tokens_to_answer(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("`max_tokens` is 0, which leaves an answer with `echo` alone")
        return self

    @property
    def token_limit(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default

    @property
    def alternatives(self) -> int | None:
        return self.logprobs
