"""Windows of tokens from conversations."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...dsl.diagnostics import Reject
from ..context import Context
from ..kinds import Data, param
from ..records import Record, bad_record, check_field, read_records, text_of
from ..windows import content_identity, cut, encode, find_files, need_tokenizer


class Chat(Data):
    """Windows of tokens from conversations.

    A record is a list of `{"role", "content"}` in the field `messages`, or a prompt and a response in two
    fields. Each conversation is written as the tokenizer's chat template writes it; without a template, as
    `role: content` lines (a prompt and its response: joined by a line end). Conversations follow each other,
    each closed by the end token, and are cut into rows of `length` tokens as `text` does it.

    Source: transformers, "Chat templates"; packing as in Raffel et al. 2020 (arXiv 1910.10683), section 2.
    Example: data calib = chat("chats.jsonl", length: 512, samples: 64)
    """

    path: str | tuple[str, ...] = param("JSONL, JSON or CSV file, glob, or list of them.", positional=True)
    length: int = param("Tokens in a row.", ge=2, unit="tokens")
    samples: int | None = param("How many rows; all of them where it is left out.", default=None, ge=1,
                                unit="rows")
    seed: int | None = param("Decides which rows; the run's own seed where it is left out.", default=None)
    messages: str = param("Field that holds the messages.", default="messages")
    prompt: str | None = param("Field of the prompt, in place of messages.", default=None)
    response: str | None = param("Field of the response, in place of messages.", default=None)

    def rows(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        tokenizer = need_tokenizer(tokenizer, ctx)
        ids: list[int] = []
        for path in find_files(self.path, ctx.folder):
            for number, record in enumerate(self._records(path), start=1):
                ids += encode(self._written(record, number, path, tokenizer), tokenizer)
                if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                    ids.append(tokenizer.eos_token_id)
        return cut(ids, self.length, None, self.samples, ctx.seed if self.seed is None else self.seed)

    def identity(self, ctx: Context) -> str:
        about = {"length": self.length, "samples": self.samples, "messages": self.messages,
                 "prompt": self.prompt, "response": self.response, "seed": ctx.seed if self.seed is None else self.seed}
        return content_identity("chat", find_files(self.path, ctx.folder), about, ctx)

    def _records(self, path: Path) -> list[Record]:
        records = read_records(path)
        for name in [f for f in (self.prompt, self.response) if f] or [self.messages]:
            check_field(records, name, path)
        return records

    def _written(self, record: Record, number: int, path: Path, tokenizer: Any) -> str:
        turns = self._turns(record, number, path)
        if tokenizer.chat_template:
            return tokenizer.apply_chat_template(turns, tokenize=False)
        if self.prompt or self.response:
            return "\n".join(turn["content"] for turn in turns)
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)

    def _turns(self, record: Record, number: int, path: Path) -> list[dict[str, str]]:
        if self.prompt or self.response:
            said = [("user", self.prompt), ("assistant", self.response)]
            return [{"role": role, "content": text_of(record, name, number, path)}
                    for role, name in said if name]
        turns = record[self.messages]
        if not isinstance(turns, list) or not turns or not all(
                isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str)
                for t in turns):
            raise Reject(bad_record(f"`{self.messages}` of record {number} of {path} is no list of messages",
                                    help='a message is {"role": "user", "content": "text"}'))
        return [{"role": t["role"], "content": t["content"]} for t in turns]
