"""Prompts: the model's chat template where it has one, the plain text otherwise; samples go in front."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...models.rows.chat_template import render_template_or_reject
from .sample import Sample

Message = dict[str, str]


@dataclass(frozen=True)
class Prompts:
    """Of one tokenizer. `context` is how many tokens the model takes."""

    tokenizer: Any
    context: int

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def tokenize_conversation(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation, ready to be answered. Without a template, the messages one below the other."""
        if self.has_chat_template:
            text = render_template_or_reject(self.tokenizer, messages, add_generation_prompt=True)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        token_ids = self.tokenizer("\n".join(m["content"] for m in messages))["input_ids"]
        return token_ids or [self.tokenizer.bos_token_id or 0]

    def question(self, text: str) -> list[int]:
        return self.tokenize_conversation(
            [{"role": "user", "content": text if self.has_chat_template else f"{text}\n"}]
        )

    def tokenize_with_samples(
        self, messages: Sequence[Message], samples: Sequence[Sample], answer_tokens: int
    ) -> list[int] | None:
        """Prompt ids with as many samples in front of the last message as leave `answer_tokens` for an answer; None
        where not one does. The first sample is the nearest to the message."""
        for count in range(len(samples), 0, -1):
            ids = self.tokenize_conversation(
                [*messages[:-1], *self._messages_with_samples(messages[-1], samples[:count])]
            )
            if len(ids) + answer_tokens <= self.context:
                return ids
        return None

    def _messages_with_samples(self, question_message: Message, samples: Sequence[Sample]) -> list[Message]:
        """A chat model reads answered questions as turns before its own, which it then answers alike; in one message
        with the question a small model takes them for a part of it."""
        answered = [s for s in reversed(samples) if s.question and self.has_chat_template]
        passages = [s for s in reversed(samples) if s not in answered]
        exchanges = [
            {"role": role, "content": text}
            for s in answered
            for role, text in (("user", s.question), ("assistant", s.answer))
        ]
        return [
            *exchanges,
            {**question_message, "content": "\n\n".join([*(s.text for s in passages), question_message["content"]])},
        ]
