"""Tools of a chat: what a client declares, the grammar of a call, and the calls in an answer's text.

A model that is free to call writes `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` between its text (Qwen,
Hermes, SmolLM3); one that must call writes the JSON alone, whatever its template shows.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ...core.safe_read import parse_strict_json
from .grammar import GrammarCompiler, Matcher
from .tagged_text import Tag

START, END = "<tool_call>", "</tool_call>"
MAX_TOOLS = 128  # as OpenAI has it
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_COMPOSING = frozenset({"$ref", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "patternProperties"})
_OUTSIDE_STRING, _IN_STRING = re.compile(rf'"|{END}'), re.compile(r'\\.|"', re.DOTALL)


class Function(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def require_object_schema(cls, parameters: dict[str, Any] | None) -> dict[str, Any] | None:
        if parameters is not None and parameters.get("type", "object") != "object":
            raise ValueError("a function takes an object: its schema has the type `object`")
        return parameters

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """Parameters as an object, closed unless they say otherwise: small models go on with arguments of their own."""
        if not self.parameters:
            return _NO_PARAMETERS
        closed = "properties" in self.parameters and not _COMPOSING & self.parameters.keys()
        return {"type": "object", **({"additionalProperties": False} if closed else {}), **self.parameters}


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
    def require_json_object(cls, arguments: str) -> str:
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

    forced       the answer is one call and nothing else
    parallel     whether an answer that is free may have several calls
    """

    functions: tuple[Function, ...]
    forced: bool
    parallel: bool = True

    def grammar(self, compiler: GrammarCompiler) -> Matcher:
        """Raises ErrorResponse that names the function whose parameters can't be kept to."""
        for f in self.functions:
            if f.parameters:
                compiler.of_schema(f.schema_of_arguments, "tools", f"the schema of `{f.name}`")
        beginnings = {f.name: f'{{"name": "{f.name}", "arguments": ' for f in self.functions}
        if self.forced:
            tags = [Tag(beginnings[f.name], f.schema_of_arguments, "}") for f in self.functions]
            return compiler.of_tag(tags, "tools")
        tags = [Tag(f"\n{beginnings[f.name]}", f.schema_of_arguments, "}\n", START, END) for f in self.functions]
        return compiler.of_tagged_text(tags, self.parallel, "tools")


def call_policy(
    tools: Sequence[Tool] | None, choice: str | NamedTool | None, parallel: bool = True
) -> CallPolicy | None:
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
    return CallPolicy(functions, choice == "required", parallel)


class CallParser:
    """Calls in the text of one answer, as it grows.

    A call's end is looked for outside of its strings. One that can't be read is text, as is one that is cut off.
    """

    def __init__(self, policy: CallPolicy):
        self._forced, self._names = policy.forced, {f.name for f in policy.functions}
        self._buffered = ""  # of a call that is not complete, or of what may begin one
        self._scanned = 0  # characters of it in which no call ends; 0 before a call has begun
        self._in_string = False
        self.calls: list[dict[str, Any]] = []

    def push(self, text: str) -> str:
        """Text that is in no call."""
        self._buffered += text
        if self._forced:
            return ""
        plain_text = ""
        while self._scanned or START in self._buffered:
            if not self._scanned:
                prefix, _, tail = self._buffered.partition(START)
                plain_text += prefix
                self._buffered, self._scanned, self._in_string = START + tail, len(START), False
            end = self._end_of_call()
            if end is None:
                return plain_text
            call, self._buffered, self._scanned = self._buffered[:end], self._buffered[end:], 0
            if not self._add(call[len(START) : -len(END)]):
                plain_text += call
        overlap = next((n for n in range(len(START) - 1, 0, -1) if self._buffered.endswith(START[:n])), 0)
        n_plain = len(self._buffered) - overlap
        plain_text, self._buffered = plain_text + self._buffered[:n_plain], self._buffered[n_plain:]
        return plain_text

    def end(self) -> str:
        """The tail, when no more text comes: a call that was cut off is text."""
        tail, self._buffered, self._scanned = self._buffered, "", 0
        return "" if self._forced and self._add(tail) else tail

    def _end_of_call(self) -> int | None:
        """Position behind the first END that is in no string; None where it is not there. Nothing is read twice."""
        while True:
            pattern, uncertain = (_IN_STRING, 1) if self._in_string else (_OUTSIDE_STRING, len(END) - 1)
            match = pattern.search(self._buffered, self._scanned)
            if match is None:
                self._scanned = max(self._scanned, len(self._buffered) - uncertain)
                return None
            self._scanned = match.end()
            if match[0] == END:
                return self._scanned
            if match[0] == '"':
                self._in_string = not self._in_string

    def _add(self, body: str) -> bool:
        try:
            call = parse_strict_json(body)
            name, arguments = call["name"], call["arguments"]
        except (ValueError, TypeError, KeyError):  # cut off at the limit of tokens
            return False
        if name not in self._names or not isinstance(arguments, dict):
            return False
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        self.calls.append({"id": f"call_{uuid4().hex[:24]}", "type": "function", "function": function})
        return True
