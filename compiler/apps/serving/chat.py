"""Talking to a causal language model: prompts in, text out as it comes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessorList

from ....dsl.syntax.diagnostics import Fault
from ...artifacts.openers.export import Exported
from ...models.rows.chat_template import render_template_or_reject
from ...models.rows.inputs import device_of
from ...models.rows.packed_inputs import is_media_encoder_decoder, sound_shape
from ...runtimes.finite_logits import FiniteLogits
from .text import TextDecoder

prompt_too_long = Fault("prompt-too-long", "A prompt has more tokens than the model has positions.", exit="usage")
not_generative = Fault("not-generative", "A model that can't generate text was asked to.", exit="usage")

Message = dict[str, str]


@dataclass(frozen=True)
class Reply:
    """`stop` is "end" where the model ended it, "length" at the limit, "stopped" where the reader did."""

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    stop: str

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0


def refuse_without_generate(model: Any) -> None:
    """Raise Reject of a model that generates nothing, or nothing of texts."""
    if is_media_encoder_decoder(model):
        raise not_generative(
            f"this model {'hears sounds' if sound_shape(model) else 'sees images'} and reads no prompt",
            help=f"`effc.load` opens it, and its `generate` takes `{model.main_input_name}`",
        ).rejection()
    if getattr(model, "can_generate", lambda: False)():
        return
    program = isinstance(model, Exported)
    raise not_generative(
        "a program of torch alone generates no text: it keeps nothing of the tokens before"
        if program
        else f"{type(model).__name__} generates no text",
        help='compile it with `pt2("...", context: 1024)`, or as `hf` or `native`'
        if program
        else "`effc run` talks to causal language models",
    ).rejection()


@dataclass
class ChatSession:
    """A model with its tokenizer.

    temperature  0 takes the likeliest token each time, so that an answer can be had again
    seed         of the sampling; every answer starts from it
    draft_tokens  of the conversation's own n-grams, that the model verifies at once at most
    label        of the model, in sentences
    """

    model: Any
    tokenizer: Any
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    draft_tokens: int = 0
    label: str = "the model"
    history: list[Message] = field(default_factory=list)

    def __post_init__(self):
        refuse_without_generate(self.model)

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer knows how a conversation is written."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def answer(self, prompt: str, on_text: Callable[[str], None]) -> Reply:
        """Answer (or, without a chat template, continue) a prompt; `on_text` gets the text piece by piece.

        A KeyboardInterrupt ends the answer; what was said stays in the history.
        """
        messages = [*self.history, {"role": "user", "content": prompt}]
        inputs, messages = self._encode_within_context(messages, prompt)
        stream = _Stream(self.tokenizer, on_text)
        started, stop = time.monotonic(), ""
        torch.manual_seed(self.seed)
        try:
            with torch.inference_mode():
                self.model.generate(**inputs, **self._generation_options(), streamer=stream)
        except KeyboardInterrupt:
            stop = "stopped"
        stream.end()
        if self.has_chat_template:
            self.history = [*messages, {"role": "assistant", "content": stream.text}]
        stop = stop or ("length" if len(stream.tokens) >= self.max_new_tokens else "end")
        prompt_tokens, seconds = inputs["input_ids"].shape[1], time.monotonic() - started
        return Reply(stream.text, prompt_tokens, len(stream.tokens), seconds, stop)

    def _encode_within_context(self, messages: list[Message], prompt: str) -> tuple[dict[str, Any], list[Message]]:
        """Token ids; the oldest exchanges are forgotten where the model has too few positions."""
        max_positions = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
        while True:
            ids = self._prompt_ids(messages, prompt)
            if ids.shape[1] < max_positions:
                break
            if len(messages) == 1:
                raise prompt_too_long(
                    f"the prompt has {ids.shape[1]} tokens, the model takes {max_positions - 1}"
                ).rejection()
            messages = messages[2:]
        ids = ids.to(device_of(self.model))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, messages

    def _prompt_ids(self, messages: Sequence[Message], prompt: str) -> torch.Tensor:
        if self.has_chat_template:
            text = render_template_or_reject(self.tokenizer, messages, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(prompt)["input_ids"]
        start = self.tokenizer.bos_token_id
        ids = ids or [start if start is not None else self.tokenizer.eos_token_id or 0]
        return torch.tensor([ids])

    def _generation_options(self) -> dict[str, Any]:
        eos = self.model.generation_config.eos_token_id
        eos = self.tokenizer.eos_token_id if eos is None else eos
        pad = self.tokenizer.pad_token_id
        pad = (eos[0] if isinstance(eos, list) else eos) if pad is None else pad
        chosen: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "num_beams": 1,  # beams are no stream
            "do_sample": self.temperature > 0,
            "logits_processor": LogitsProcessorList([FiniteLogits(self.label)]),
        }
        if self.draft_tokens:
            chosen["prompt_lookup_num_tokens"] = self.draft_tokens
        if self.temperature > 0:
            return {**chosen, "temperature": self.temperature}
        return {**chosen, "temperature": None, "top_p": None, "top_k": None}


class _Stream:
    """Streamer for `generate`: text as soon as its characters are complete."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        self._decoder, self._notify = TextDecoder(tokenizer), on_text
        self.tokens: list[int] = []
        self.text = ""
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        for token in () if self._is_prompt else value.reshape(-1).tolist():
            self.tokens.append(token)
            self._emit(self._decoder.push(token))
        self._is_prompt = False

    def end(self) -> None:
        self._emit(self._decoder.end())

    def _emit(self, text: str) -> None:
        if text:
            self._notify(text)
            self.text += text
