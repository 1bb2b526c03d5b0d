"""Tools of a chat: what a client declares, the grammar of a call, and the calls in an answer's text.

A model that is free to call writes `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` between its text (Qwen,
Hermes, SmolLM3); one that must call writes the JSON alone, whatever its template shows.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ...core.safe_read import parse_strict_json
from .grammar import GrammarCompiler, Matcher

START, END = "<tool_call>", "</tool_call>"
MAX_TOOLS = 128  # as OpenAI has it
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class Function(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def are_of_an_object(cls, parameters: dict[str, Any] | None) -> dict[str, Any] | None:
        if parameters is not None and parameters.get("type", "object") != "object":
            raise ValueError("a function takes an object: its schema has the type `object`")
        return parameters


class Tool(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: they read parameters of each."""
        function = {"parameters": _NO_PARAMETERS, **self.function.model_dump(exclude_none=True)}
        return {"type": "function", "function": function}


class FunctionName(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: _Name


class NamedTool(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["function"]
    function: FunctionName


class FunctionCall(BaseModel):
    model_config = ConfigDict(extra="ignore")
    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def are_an_object(cls, arguments: str) -> str:
        """Read here, so that a conversation with other ones is refused before anything is done."""
        try:
            if isinstance(parse_strict_json(arguments or "{}"), dict):
                return arguments
        except ValueError:
            pass
        raise ValueError("it is no JSON object")


class ToolCall(BaseModel):
    """A call that an assistant's message in the conversation holds."""

    model_config = ConfigDict(extra="ignore")
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: with the arguments as an object."""
        arguments = parse_strict_json(self.function.arguments or "{}")
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


@dataclass(frozen=True)
class CallPolicy:
    """Tools that an answer may or must call.

    forced   the answer is one call and nothing else
    """

    functions: tuple[Function, ...]
    forced: bool

    def grammar(self, compiler: GrammarCompiler) -> Matcher:
        """Raises ErrorResponse that names the function whose parameters can't be kept to."""
        for f in self.functions:
            if f.parameters:
                compiler.of_schema(f.parameters, "tools", f"the schema of `{f.name}`")
        if self.forced:
            calls = [
                {
                    "type": "object",
                    "properties": {"name": {"const": f.name}, "arguments": f.parameters or _NO_PARAMETERS},
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
                for f in self.functions
            ]
            return compiler.of_schema({"anyOf": calls} if len(calls) > 1 else calls[0], "tools")
        tags = [
            (START, f'{START}\n{{"name": "{f.name}", "arguments": ', f.parameters or _NO_PARAMETERS, f"}}\n{END}")
            for f in self.functions
        ]
        return compiler.of_tags(tags, "tools")


def call_policy(tools: Sequence[Tool] | None, choice: str | NamedTool | None) -> CallPolicy | None:
    """Policy of a request's `tools` and `tool_choice`; None where no tool may be called. Raises ValueError."""
    functions = tuple(tool.function for tool in tools or ())
    if len({f.name for f in functions}) < len(functions):
        raise ValueError("two tools have one name")
    if isinstance(choice, NamedTool):
        functions = tuple(f for f in functions if f.name == choice.function.name)
        if not functions:
            raise ValueError(f"`{choice.function.name}` is none of the tools")
        return CallPolicy(functions, forced=True)
    if choice == "required" and not functions:
        raise ValueError("a call is required, and there are no tools")
    if choice == "none" or not functions:
        return None
    return CallPolicy(functions, forced=choice == "required")


class CallParser:
    """Calls in the text of one answer, as it grows."""

    def __init__(self, policy: CallPolicy):
        self._forced = policy.forced
        self._buffered = ""  # of a call that is not complete, or of what may begin one
        self.calls: list[dict[str, Any]] = []

    def push(self, text: str) -> str:
        """Text that is in no call."""
        self._buffered += text
        if self._forced:
            return ""
        plain_text = ""
        while START in self._buffered:
            prefix, _, tail = self._buffered.partition(START)
            plain_text += prefix
            body, end, remainder = tail.partition(END)
            if not end:
                self._buffered = START + tail
                return plain_text
            self._add(body)
            self._buffered = remainder
        overlap = next((n for n in range(len(START) - 1, 0, -1) if self._buffered.endswith(START[:n])), 0)
        n_plain = len(self._buffered) - overlap
        plain_text, self._buffered = plain_text + self._buffered[:n_plain], self._buffered[n_plain:]
        return plain_text

    def end(self) -> str:
        """The tail, when no more text comes: a call that was cut off is text."""
        tail, self._buffered = self._buffered, ""
        return "" if self._forced and self._add(tail) else tail

    def _add(self, body: str) -> bool:
        try:
            call = parse_strict_json(body)
            name, arguments = call["name"], json.dumps(call["arguments"], ensure_ascii=False)
        except (ValueError, TypeError, KeyError):  # cut off at the limit of tokens
            return False
        function = {"name": name, "arguments": arguments}
        self.calls.append({"id": f"call_{uuid4().hex[:24]}", "type": "function", "function": function})
        return True
