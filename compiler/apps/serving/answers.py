"""The shapes of OpenAI's answers: objects, and chunks of a stream."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from .request import AnswerChunk, Token
from .tools import CallParser, CallPolicy

DONE = "data: [DONE]\n\n"


def server_sent_event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class _Choice:
    """One of the answers to a request, so far."""

    def __init__(self, policy: CallPolicy | None):
        self.texts: list[str] = []
        self.tokens: list[Token] = []
        self.finish: str | None = None
        self.count = self.n_cached = 0
        self.parser = CallParser(policy) if policy else None

    def add(self, chunk: AnswerChunk) -> str:
        """Take a piece; the text of it that is in no call of a tool."""
        text = chunk.text
        if self.parser:
            text = self.parser.push(text) + (self.parser.end() if chunk.finish else "")
        self.texts.append(text)
        self.tokens += chunk.tokens
        self.count, self.n_cached = chunk.count, chunk.n_cached
        self.finish = ("tool_calls" if self.calls and chunk.finish == "stop" else chunk.finish) or None
        return text

    @property
    def calls(self) -> list[dict[str, Any]]:
        return self.parser.calls if self.parser else []


class AnswerBuilder:
    """The response to one request in the making.

    n_prompt_tokens   number of the prompt's tokens
    n_choices         answers to it
    policy    tools that they may call
    """

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, model: str, n_prompt_tokens: int, tokenizer: Any, n_choices: int = 1, policy: CallPolicy | None = None
    ):
        self._prompt, self._tokenizer = n_prompt_tokens, tokenizer
        self._head = {"id": f"{self.prefix}-{uuid4().hex}", "created": int(time.time()), "model": model}
        self._choices = [_Choice(policy) for _ in range(n_choices)]

    def add(self, piece: AnswerChunk) -> str:
        """Take a piece of a choice; the text of it that is in no call of a tool."""
        return self._choices[piece.index].add(piece)

    @property
    def is_complete(self) -> bool:
        return all(choice.finish for choice in self._choices)

    def response_body(self, logprobs: bool) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                **self._content("".join(choice.texts), choice.calls),
                "logprobs": self._logprobs(choice.tokens) if logprobs else None,
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(self._choices)
        ]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def opening_chunks(self) -> list[dict[str, Any]]:
        """Chunks before the first text."""
        return []

    def chunk(self, piece: AnswerChunk, text: str, logprobs: bool) -> dict[str, Any]:
        """The chunk of a piece that was added, whose text `add` gave."""
        choice = self._choices[piece.index]
        fields = {
            "index": piece.index,
            **self._delta(text, choice.calls if piece.finish else []),
            "logprobs": self._logprobs(piece.tokens) if logprobs else None,
            "finish_reason": choice.finish,
        }
        return self._chunk([fields])

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk that tells the usage alone."""
        return {**self._chunk([]), "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        count = sum(choice.count for choice in self._choices)
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": count,
            "total_tokens": self._prompt + count,
            "prompt_tokens_details": {"cached_tokens": max(choice.n_cached for choice in self._choices)},
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": choices}

    def _content(self, text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        assert not calls, "completions have no tools"
        return {"text": text}

    _delta = _content

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "tokens": [self._token_text(t.id) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [None if t.logprob is None else self._top_logprobs_by_text(t) for t in tokens],
            "text_offset": [t.offset for t in tokens],
        }

    def _top_logprobs_by_text(self, token: Token) -> dict[str, float]:
        """By text: of tokens that are written alike, the likeliest."""
        entries: dict[str, float] = {}
        for id, logprob in token.likeliest:
            entries.setdefault(self._token_text(id), logprob)
        return entries

    def _token_text(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)


class ChatAnswer(AnswerBuilder):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening_chunks(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        indices = range(len(self._choices))
        return [self._chunk([{"index": i, "delta": delta, "logprobs": None, "finish_reason": None}]) for i in indices]

    def _content(self, text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        message = {"role": "assistant", "content": None if calls and not text else text, "refusal": None}
        return {"message": {**message, "tool_calls": calls} if calls else message}

    def _delta(self, text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
        return {"delta": delta}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        entries = [
            {**self._logprob(t.id, t.logprob), "top_logprobs": [self._logprob(*pair) for pair in t.likeliest]}
            for t in tokens
        ]
        return {"content": entries, "refusal": None}

    def _logprob(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._token_text(token)
        is_complete = "\ufffd" not in text  # else its bytes are no characters, and are not known here
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if is_complete else None}
