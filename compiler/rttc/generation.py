"""Tokens of an answer by a model of transformers (or one that generates as such do), up to a stop string."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...dsl.diagnostics import Fault, Reject
from ..rows.inputs import device_of
from ..serving.chat import prompt_too_long
from ..serving.text import Stops
from .prompts import Prompts

empty_prompt = Fault("empty-prompt", "A model was asked to answer nothing at all.", exit="usage")


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Settings:
    """How an answer is drawn. `temperature` 0 takes the likeliest token."""

    most: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()


def generate(
    model: Any, prompts: Prompts, ids: list[int], settings: Settings, stopped: Callable[[], bool]
) -> tuple[str, int, str]:
    """The text, the number of its tokens, and why it ended: "stop" or "length"."""
    if not ids:
        raise Reject(empty_prompt("the prompt has no token", help="ask something"))
    most = min(settings.most, prompts.context - len(ids))
    if most < 1:
        raise Reject(prompt_too_long(f"the prompt has {len(ids)} tokens, the model takes {prompts.context - 1}"))
    heard = _Streamer(prompts.tokenizer, settings.stops, stopped)
    row = torch.tensor([ids], device=device_of(model))
    drawn = settings.temperature > 0
    chosen: dict[str, Any] = {
        "do_sample": drawn,
        "max_new_tokens": most,
        "temperature": settings.temperature if drawn else None,
        "top_p": settings.top_p if drawn else None,
        "top_k": 0 if drawn else None,
    }
    ends = model.generation_config.eos_token_id
    ends = prompts.tokenizer.eos_token_id if ends is None else ends
    pad = ends[0] if isinstance(ends, list) else ends
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # training follows: no inference tensors
        torch.manual_seed(settings.seed % 2**63)
        with suppress(_Met):
            model.generate(
                input_ids=row,
                attention_mask=torch.ones_like(row),
                eos_token_id=ends,
                pad_token_id=pad,
                streamer=heard,
                **chosen,
            )
    if stopped():
        raise Cancelled
    text, last = heard.text(), heard.tokens[-1] if heard.tokens else None
    ended = heard.stops.met or last in (ends if isinstance(ends, list) else [ends])
    return text, len(heard.tokens), "stop" if ended else "length"


class _Met(Exception):
    """A stop string was said, or nobody listens."""


class _Streamer:
    """What `generate` calls a streamer."""

    def __init__(self, tokenizer: Any, stops: tuple[str, ...], stopped: Callable[[], bool]):
        self.tokens: list[int] = []
        self.stops = Stops(stops)
        self._tokenizer, self._stopped, self._prompt, self._wanted = tokenizer, stopped, True, stops

    def put(self, value: Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        self.tokens += value.reshape(-1).tolist()
        if self._stopped():
            raise _Met
        if self._wanted and any(stop in self._decoded() for stop in self._wanted):
            raise _Met

    def end(self) -> None: ...

    def text(self) -> str:
        return self.stops.push(self._decoded()) + self.stops.end()

    def _decoded(self) -> str:
        return self._tokenizer.decode(self.tokens, skip_special_tokens=True)
