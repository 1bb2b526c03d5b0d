"""The shapes of OpenAI's answers: objects, chunks of a stream, and errors."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from .request import Piece, Token

DONE = "data: [DONE]\n\n"
INVALID = "invalid_request_error"


class ErrorResponse(Exception):
    """A request that is answered by an error."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else INVALID
        self.body = error_body(message, kind, param, code)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class AnswerBuilder:
    """One answer in the making. `prompt` is the number of its tokens."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, prompt: int, tokenizer: Any):
        self._prompt, self._tokenizer, self._count = prompt, tokenizer, 0
        self._head = {"id": f"{self.prefix}-{uuid4().hex}", "created": int(time.time()), "model": model}
        self._texts: list[str] = []
        self._tokens: list[Token] = []
        self._finish: str | None = None
        self._n_buffered = 0

    def add(self, piece: Piece) -> None:
        self._texts.append(piece.text)
        self._tokens += piece.tokens
        self._count, self._n_buffered = piece.count, piece.n_cached
        self._finish = piece.finish or None

    def response_body(self, logprobs: bool) -> dict[str, Any]:
        choice = self._choice("".join(self._texts), self._logprobs(self._tokens) if logprobs else None)
        return {
            **self._head,
            "object": self.kind,
            "choices": [{**choice, "finish_reason": self._finish}],
            "usage": self.usage(),
        }

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first text."""
        return []

    def chunk(self, piece: Piece, logprobs: bool) -> dict[str, Any]:
        choice = self._delta(piece.text, self._logprobs(piece.tokens) if logprobs else None)
        return self._chunk([{**choice, "finish_reason": piece.finish or None}])

    def closing(self) -> dict[str, Any]:
        """The chunk that tells the usage alone."""
        return {**self._chunk([]), "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._count,
            "total_tokens": self._prompt + self._count,
            "prompt_tokens_details": {"cached_tokens": self._n_buffered},
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": choices}

    def _choice(self, text: str, logprobs: Any) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": logprobs}

    _delta = _choice

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        likeliest = [{self._text(id): logprob for id, logprob in t.likeliest} for t in tokens]
        return {
            "tokens": [self._text(t.id) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": likeliest,
            "text_offset": [],
        }

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)


class ChatAnswer(AnswerBuilder):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])]

    def _choice(self, text: str, logprobs: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": logprobs}

    def _delta(self, text: str, logprobs: Any) -> dict[str, Any]:
        return {"index": 0, "delta": {"content": text} if text else {}, "logprobs": logprobs}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        entries = [
            {**self._logprob(t.id, t.logprob), "top_logprobs": [self._logprob(*pair) for pair in t.likeliest]}
            for t in tokens
        ]
        return {"content": entries, "refusal": None}

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        is_complete = "\ufffd" not in text  # else its bytes are no characters, and are not known here
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if is_complete else None}
