"""How a model is asked: its chat template where it has one, the plain text otherwise; samples go in front."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
            text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        found = self.tokenizer("\n".join(m["content"] for m in messages))["input_ids"]
        return found or [self.tokenizer.bos_token_id or 0]

    def question(self, text: str) -> list[int]:
        return self.ids([{"role": "user", "content": text if self.chats else f"{text}\n"}])

    def with_samples(self, messages: Sequence[Message], samples: Sequence[Sample], room: int) -> list[int] | None:
        """The same with as many samples in front of the last message as leave `room` for an answer; None where not
        one does."""
        for count in range(len(samples), 0, -1):
            shown = "\n\n".join(sample.text for sample in samples[:count])
            last = {**messages[-1], "content": f"{shown}\n\n{messages[-1]['content']}"}
            ids = self.ids([*messages[:-1], last])
            if len(ids) + room <= self.context:
                return ids
        return None
