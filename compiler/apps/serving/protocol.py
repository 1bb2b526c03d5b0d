"""Requests of OpenAI's API, checked field by field; what is not supported is rejected, never ignored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator, model_validator

# Neutral: it asks for what is done anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "echo": (False,),
    "suffix": ("",),
    "audio": (),
    "prediction": (),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "web_search_options": (),
}


# What divides logits may not be so small that float32 ends: 1e-4 is as greedy as a draw gets.
_LEAST = {"temperature": 1e-4, "top_p": 2.0**-126, "repetition_penalty": 1e-2}


MAX_MESSAGES, MAX_PARTS = 2048, 4096  # of a conversation: an empty message costs a template as much as a long one
_LONGEST_STOP = 1024  # characters


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool | None = None


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
        for name in _NEUTRAL.keys() & body.keys():
            value = body[name]
            if value is not None and value not in _NEUTRAL[name]:
                raise Unsupported(name, value)
        return {name: value for name, value in body.items() if name not in _NEUTRAL}

    @field_validator("stop", mode="before")
    @classmethod
    def are_a_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator(*_LEAST)
    @classmethod
    def can_be_computed_with(cls, value: float | None, info: Any) -> float | None:
        least = _LEAST[info.field_name]
        if value and value < least:
            instead = "0, which takes the likeliest token, or " if info.field_name == "temperature" else ""
            raise ValueError(f"{value:g} is too small: give {instead}{least:g} or more")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def tells_usage(self) -> bool:
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
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(AnyRequest):
    messages: Annotated[list[Message], FailFast()] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

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
    prompt: str | list[int]
    logprobs: int | None = Field(None, ge=0, le=5)

    @field_validator("prompt", mode="before")
    @classmethod
    def single_prompt(cls, prompt: Any) -> Any:
        """A text or its tokens; OpenAI also takes lists of such."""
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
            if len(prompt) > 1:
                raise ValueError(f"{len(prompt)} prompts are given, and one is answered at a time")
            prompt = prompt[0]
        if isinstance(prompt, str):
            return prompt
        if isinstance(prompt, list) and {*map(type, prompt)} <= {int}:
            return prompt
        raise ValueError("it is neither a text nor a list of tokens")

    @property
    def token_limit(self) -> int:
        return self.max_tokens or 16  # OpenAI's default

    @property
    def alternatives(self) -> int | None:
        return self.logprobs
