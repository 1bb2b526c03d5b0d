"""Windows of tokens from conversations."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ....dsl.syntax.diagnostics import Fault, Reject
from ...plugin.context import Context
from ...plugin.interfaces import Data, param
from ..records import Record, bad_record, check_field, read_records, text_of
from ..windows import content_identity, cut, encode, find_files, need_tokenizer

no_speakers = Fault("no-speakers", "Only responses are to be learned, and the rows don't say which tokens are theirs.")


class Chat(Data):
    """Windows of tokens from conversations.

    A record is a list of `{"role", "content"}` in the field `messages`, or a prompt and a response in two
    fields. Each conversation is written as the tokenizer's chat template writes it; without a template, as
    `role: content` lines (a prompt and its response: joined by a line end). Conversations follow each other,
    each closed by the end token, and are cut into rows of `length` tokens as `text` does it.
    `tune.heal(learn: responses)` learns only what assistants say.

    Source: transformers, "Chat templates"; packing as in Raffel et al. 2020 (arXiv 1910.10683), section 2.
    Example: data calib = chat("chats.jsonl", length: 512, samples: 64)
    """

    reads = {"path": ("file",)}

    path: str | tuple[str, ...] = param("JSONL, JSON or CSV file, glob, or list of them.", positional=True)
    length: int = param("Tokens in a row.", ge=2, unit="tokens")
    samples: int | None = param("How many rows; all of them where it is left out.", default=None, ge=1, unit="rows")
    seed: int | None = param("Decides which rows; the run's own seed where it is left out.", default=None)
    messages: str = param("Field that holds the messages.", default="messages")
    prompt: str | None = param("Field of the prompt, in place of messages.", default=None)
    response: str | None = param("Field of the response, in place of messages.", default=None)

    def rows(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        ids: list[int] = []
        for turns in self._conversations(ctx):
            ids += encode(self._written(turns, need_tokenizer(tokenizer, ctx)), tokenizer)
            if _is_open(ids, tokenizer):
                ids.append(tokenizer.eos_token_id)
        return self._cut(ids, ctx)

    def speech(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        """What assistants say, and the end token after it; a token that reaches into it belongs to it."""
        tokenizer = need_tokenizer(tokenizer, ctx)
        if not tokenizer.is_fast:
            raise Reject(
                no_speakers(
                    f"a {type(tokenizer).__name__} doesn't say where in a text its tokens lie",
                    help="learn all tokens, or take a tokenizer with a tokenizer.json",
                )
            )
        ids: list[int] = []
        said: list[int] = []
        for turns in self._conversations(ctx):
            text = self._written(turns, tokenizer)
            spans = self._spans(turns, text, tokenizer)
            made = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
            ids += made["input_ids"]
            said += [any(start < b and a < end for a, b in spans) for start, end in made["offset_mapping"]]
            if _is_open(ids, tokenizer):
                ids.append(tokenizer.eos_token_id)
                said.append(turns[-1]["role"] == "assistant")
        return self._cut(said, ctx)

    def _cut(self, values: list[int], ctx: Context) -> Iterator[Any]:
        return cut(values, self.length, None, self.samples, ctx.seed if self.seed is None else self.seed)

    def _conversations(self, ctx: Context) -> Iterator[list[dict[str, str]]]:
        for path in find_files(self.path, ctx.folder):
            for number, record in enumerate(self._records(path), start=1):
                yield self._turns(record, number, path)

    def identity(self, ctx: Context) -> str:
        about = {
            "length": self.length,
            "samples": self.samples,
            "messages": self.messages,
            "prompt": self.prompt,
            "response": self.response,
            "seed": ctx.seed if self.seed is None else self.seed,
        }
        return content_identity("chat", find_files(self.path, ctx.folder), about, ctx)

    def _records(self, path: Path) -> list[Record]:
        records = read_records(path)
        for name in [f for f in (self.prompt, self.response) if f] or [self.messages]:
            check_field(records, name, path)
        return records

    def _written(self, turns: list[dict[str, str]], tokenizer: Any) -> str:
        return self._templated(turns, tokenizer) if tokenizer.chat_template else "\n".join(self._lines(turns))

    def _templated(self, turns: list[dict[str, str]], tokenizer: Any, **more: Any) -> str:
        from jinja2 import TemplateError

        from ...models.rows.chat_template import render

        try:
            return render(tokenizer, turns, **more)
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns[:6])
            raise Reject(
                bad_record(
                    f"the tokenizer's chat template refuses a conversation of {roles}: {error}",
                    help="name roles and their order as the template does",
                )
            ) from error

    def _lines(self, turns: list[dict[str, str]]) -> list[str]:
        named = not (self.prompt or self.response)
        return [f"{turn['role']}: {turn['content']}" if named else turn["content"] for turn in turns]

    def _spans(self, turns: list[dict[str, str]], text: str, tokenizer: Any) -> list[tuple[int, int]]:
        """Where in a written conversation assistants speak: begin and end of each turn of theirs."""
        found = []
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            if tokenizer.chat_template:
                before = self._templated(turns[:number], tokenizer, add_generation_prompt=True) if number else ""
                after = self._written(turns[: number + 1], tokenizer)
                if not (text.startswith(after) and after.startswith(before)):
                    raise Reject(
                        no_speakers(
                            "the chat template writes the beginning of a conversation otherwise once "
                            "it goes on, so who says what can't be told",
                            help="learn all tokens",
                        )
                    )
                found.append((len(before), len(after)))
            else:
                end = len("\n".join(self._lines(turns[: number + 1])))
                found.append((end - len(turn["content"]), end))
        return found

    def _turns(self, record: Record, number: int, path: Path) -> list[dict[str, str]]:
        if self.prompt or self.response:
            said = [("user", self.prompt), ("assistant", self.response)]
            return [{"role": role, "content": text_of(record, name, number, path)} for role, name in said if name]
        turns = record[self.messages]
        if (
            not isinstance(turns, list)
            or not turns
            or not all(
                isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str)
                for t in turns
            )
        ):
            raise Reject(
                bad_record(
                    f"`{self.messages}` of record {number} of {path} is no list of messages",
                    help='a message is {"role": "user", "content": "text"}',
                )
            )
        return [{"role": t["role"], "content": t["content"]} for t in turns]


def _is_open(ids: list[int], tokenizer: Any) -> bool:
    """Whether a conversation still lacks the end token."""
    return tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]
