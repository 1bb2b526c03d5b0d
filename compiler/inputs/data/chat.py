"""Windows of tokens from conversations."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ....dsl.syntax.diagnostics import Fault
from ...plugin.context import Context
from ...plugin.interfaces import param
from ..records import Record, field_text, invalid_record
from ..sampled_rows import SampledRows
from ..windows import encode, require_tokenizer, token_windows

no_speakers = Fault("no-speakers", "Only responses are to be learned, and the rows don't say which tokens are theirs.")


class Chat(SampledRows):
    """Windows of tokens from conversations.

    A record is a list of `{"role", "content"}` in the field `messages`, or a prompt and a response in two
    fields. Each conversation is written as the tokenizer's chat template writes it; without a template, as
    `role: content` lines (a prompt and its response: joined by a line end). Conversations follow each other,
    each closed by the end token, and are cut into rows of `length` tokens as `text` does it.
    `tune.heal(learn: responses)` learns only what assistants say.

    Source: transformers, "Chat templates"; packing as in Raffel et al. 2020 (arXiv 1910.10683), section 2.
    Example: data calib = chat("chats.jsonl", length: 512, samples: 64)
    """

    path: str | tuple[str, ...] = param("JSONL, JSON, CSV or TSV file, glob, or list of them.", positional=True)
    length: int = param("Tokens in a row.", ge=2, unit="tokens")
    messages: str = param("Field that holds the messages.", default="messages")
    prompt: str | None = param("Field of the prompt, in place of messages.", default=None)
    response: str | None = param("Field of the response, in place of messages.", default=None)

    def identity_facts(self, ctx: Context) -> dict[str, Any]:
        return super().identity_facts(ctx) | {"seed": self.sampling_seed(ctx)}

    def rows(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        ids: list[int] = []
        for messages in self._conversations(ctx):
            ids += encode(self._render_checked(messages, require_tokenizer(tokenizer, ctx)), tokenizer)
            if _lacks_end_token(ids, tokenizer):
                ids.append(tokenizer.eos_token_id)
        return self._cut_into_rows(ids, ctx)

    def assistant_masks(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        """Masks of the assistants' tokens, with the end token; a token that overlaps counts."""
        tokenizer = require_tokenizer(tokenizer, ctx)
        if not tokenizer.is_fast:
            raise no_speakers(
                f"a {type(tokenizer).__name__} doesn't say where in a text its tokens lie",
                help="learn all tokens, or take a tokenizer with a tokenizer.json",
            ).rejection()
        ids: list[int] = []
        mask: list[int] = []
        for messages in self._conversations(ctx):
            text = self._render_checked(messages, tokenizer)
            spans = self._assistant_spans(messages, text, tokenizer)
            encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
            ids += encoded["input_ids"]
            mask += [any(start < b and a < end for a, b in spans) for start, end in encoded["offset_mapping"]]
            if _lacks_end_token(ids, tokenizer):
                ids.append(tokenizer.eos_token_id)
                mask.append(messages[-1]["role"] == "assistant")
        return self._cut_into_rows(mask, ctx)

    def _cut_into_rows(self, values: list[int], ctx: Context) -> Iterator[Any]:
        return token_windows(values, self.length, None, self.samples, self.sampling_seed(ctx))

    def _conversations(self, ctx: Context) -> Iterator[list[dict[str, str]]]:
        fields = [f for f in (self.prompt, self.response) if f] or [self.messages]
        return (self._parse_messages(*entry) for entry in self.records(fields, ctx))

    def _render_checked(self, messages: list[dict[str, str]], tokenizer: Any) -> str:
        return (
            self._render_template(messages, tokenizer)
            if tokenizer.chat_template
            else "\n".join(self._message_lines(messages))
        )

    def _render_template(self, messages: list[dict[str, str]], tokenizer: Any, **options: Any) -> str:
        from jinja2 import TemplateError

        from ...models.rows.chat_template import render_template

        try:
            return render_template(tokenizer, messages, **options)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages[:6])
            raise invalid_record(
                f"the tokenizer's chat template refuses a conversation of {roles}: {error}",
                help="name roles and their order as the template does",
            ).rejection() from error

    def _message_lines(self, messages: list[dict[str, str]]) -> list[str]:
        named = not (self.prompt or self.response)
        return [f"{message['role']}: {message['content']}" if named else message["content"] for message in messages]

    def _assistant_spans(self, messages: list[dict[str, str]], text: str, tokenizer: Any) -> list[tuple[int, int]]:
        """Character spans of the assistants' turns in a rendered conversation."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if tokenizer.chat_template:
                before = (
                    self._render_template(messages[:number], tokenizer, add_generation_prompt=True) if number else ""
                )
                after = self._render_checked(messages[: number + 1], tokenizer)
                if not (text.startswith(after) and after.startswith(before)):
                    raise no_speakers(
                        "the chat template writes the beginning of a conversation otherwise once "
                        "it goes on, so who says what can't be told",
                        help="learn all tokens",
                    ).rejection()
                spans.append((len(before), len(after)))
            else:
                end = len("\n".join(self._message_lines(messages[: number + 1])))
                spans.append((end - len(message["content"]), end))
        return spans

    def _parse_messages(self, record: Record, line_number: int, path: Path) -> list[dict[str, str]]:
        if self.prompt or self.response:
            fields = [("user", self.prompt), ("assistant", self.response)]
            return [
                {"role": role, "content": field_text(record, name, line_number, path)} for role, name in fields if name
            ]
        messages = record[self.messages]
        if (
            not isinstance(messages, list)
            or not messages
            or not all(
                isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str)
                for t in messages
            )
        ):
            raise invalid_record(
                f"`{self.messages}` of record {line_number} of {path} is no list of messages",
                help='a message is {"role": "user", "content": "text"}',
            ).rejection()
        return [{"role": t["role"], "content": t["content"]} for t in messages]


def _lacks_end_token(ids: list[int], tokenizer: Any) -> bool:
    """Whether a conversation still lacks the end token."""
    return tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]
