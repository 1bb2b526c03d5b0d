"""How a model is asked: its chat template where it has one, the plain text otherwise; samples go in front."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...models.rows.chat_template import conversation
from .sample import Sample

Message = dict[str, str]


@dataclass(frozen=True)
class Prompts:
    """Of one tokenizer. `context` is how many tokens the model takes."""

    tokenizer: Any
    context: int

    @property
    def chats(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation, ready to be answered. Without a template, the messages one below the other."""
        if self.chats:
            text = conversation(self.tokenizer, messages, add_generation_prompt=True)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        found = self.tokenizer("\n".join(m["content"] for m in messages))["input_ids"]
        return found or [self.tokenizer.bos_token_id or 0]

    def question(self, text: str) -> list[int]:
        return self.ids([{"role": "user", "content": text if self.chats else f"{text}\n"}])

    def with_samples(self, messages: Sequence[Message], samples: Sequence[Sample], room: int) -> list[int] | None:
        """The same with as many samples in front of the last message as leave `room` for an answer; None where not
        one does. The first sample is the nearest to the message."""
        for count in range(len(samples), 0, -1):
            ids = self.ids([*messages[:-1], *self._shown(messages[-1], samples[:count])])
            if len(ids) + room <= self.context:
                return ids
        return None

    def _shown(self, last: Message, samples: Sequence[Sample]) -> list[Message]:
        """A chat model reads answered questions as turns before its own, which it then answers alike; in one message
        with the question a small model takes them for a part of it."""
        turns = [s for s in reversed(samples) if s.question and self.chats]
        told = [s for s in reversed(samples) if s not in turns]
        asked = [
            {"role": role, "content": text}
            for s in turns
            for role, text in (("user", s.question), ("assistant", s.answer))
        ]
        return [*asked, {**last, "content": "\n\n".join([*(s.text for s in told), last["content"]])}]
