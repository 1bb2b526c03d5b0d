"""Tokens of an answer, up to an end, a limit or a stop string: by the engine, or by a model of transformers in rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from ....dsl.syntax.diagnostics import Fault
from ...models.checkpoints.generation_config import eos_ids_tuple
from ...models.rows.inputs import device_of
from ...runtimes.finite_logits import FiniteLogits
from ...runtimes.model import DecoderModel
from ..serving.chat import prompt_too_long
from ..serving.text import StopStrings
from .prompts import Prompts

empty_prompt = Fault("empty-prompt", "A model was asked to answer nothing at all.", exit="usage")


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Settings:
    """Sampling settings of an answer. `temperature` 0 takes the likeliest token."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()


class GeneratedText(NamedTuple):
    text: str
    n_tokens: int
    finish_reason: str  # "stop" or "length"


class TokenStream:
    """The tokens of one answer as they come.

    ids      of the prompt; Reject where it has none, or more than the model takes
    ends     tokens that end an answer
    """

    def __init__(
        self,
        prompts: Prompts,
        ids: Sequence[int],
        settings: Settings,
        eos_ids: Sequence[int],
        is_cancelled: Callable[[], bool],
    ):
        if not ids:
            raise empty_prompt("the prompt has no token", help="ask something").rejection()
        self.max_tokens = min(settings.max_tokens, prompts.context - len(ids))
        if self.max_tokens < 1:
            raise prompt_too_long(
                f"the prompt has {len(ids)} tokens, the model takes {prompts.context - 1}"
            ).rejection()
        self.tokens: list[int] = []
        self.finished = False
        self._tokenizer, self._eos_ids, self._is_cancelled, self._targets = (
            prompts.tokenizer,
            eos_ids,
            is_cancelled,
            settings.stops,
        )

    def push(self, token: int) -> None:
        self.tokens.append(token)
        met = any(stop in self._decoded() for stop in self._targets)
        self.finished = met or token in self._eos_ids or len(self.tokens) >= self.max_tokens or self._is_cancelled()

    def generated_text(self) -> GeneratedText:
        """Raises Cancelled."""
        if self._is_cancelled():
            raise Cancelled
        stops = StopStrings(self._targets)
        text = stops.push_text(self._decoded()) + stops.end()
        is_stopped = stops.met or (bool(self.tokens) and self.tokens[-1] in self._eos_ids)
        return GeneratedText(text, len(self.tokens), "stop" if is_stopped else "length")

    def _decoded(self) -> str:
        return self._tokenizer.decode(self.tokens, skip_special_tokens=True)


def eos_ids_of(model: Any, prompts: Prompts) -> tuple[int, ...]:
    known = (model.generation_config.eos_token_id, prompts.tokenizer.eos_token_id)
    return next((eos_ids_tuple(eos) or () for eos in known if eos is not None), ())


def generate_one(
    model: Any, prompts: Prompts, ids: Sequence[int], settings: Settings, is_cancelled: Callable[[], bool]
) -> GeneratedText:
    """An answer by the engine."""
    eos_ids = eos_ids_of(model, prompts)
    growth = TokenStream(prompts, ids, settings, eos_ids, is_cancelled)
    generate_rows(model, [ids], [growth], [settings], eos_ids)
    return growth.generated_text()


@torch.no_grad()  # training follows: no inference tensors
def generate_rows(
    model: Any,
    rows: Sequence[Sequence[int]],
    streams: Sequence[TokenStream],
    settings: Sequence[Settings],
    eos_ids: Sequence[int],
    on_end: Callable[[int], None] = lambda row: None,
) -> None:
    """Answers of a model to several prompts in one batch, each by settings of its own; a single one of the native
    engine by drafts of its prompt.

    streams    what each row says is pushed there; `on_end` hears the number of a row as soon as it has ended
    """
    pad = eos_ids[0] if eos_ids else 0
    draft_tokens = model.draft_tokens if isinstance(model, DecoderModel) and len(rows) == 1 else 0
    ids, mask = left_padded_ids_and_mask(rows, pad, device_of(model))
    model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=max(one.max_tokens for one in streams),
        eos_token_id=list(eos_ids) or None,
        pad_token_id=pad,
        logits_processor=LogitsProcessorList([FiniteLogits("the model"), _SampledTokens(settings)]),
        stopping_criteria=StoppingCriteriaList([_Finished(streams, on_end)]),
        prompt_lookup_num_tokens=draft_tokens or None,
    )


def left_padded_ids_and_mask(rows: Sequence[Sequence[int]], pad_id: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """Token ids [b, t] that end together, and the mask of those that are some."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


class _SampledTokens(LogitsProcessor):
    """Leaves of each row's logits the token that its own settings draw; the largest is taken then."""

    def __init__(self, settings: Sequence[Settings]):
        self._settings = settings
        self._generators = [torch.Generator().manual_seed(one.seed % 2**63) for one in settings]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        masked_scores = scores.clone()
        for row, (one, generator) in enumerate(zip(self._settings, self._generators, strict=True)):
            if one.temperature:
                logits = TemperatureLogitsWarper(float(one.temperature))(input_ids, scores[row : row + 1].float().cpu())
                logits = TopPLogitsWarper(float(one.top_p))(input_ids, logits)
                token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                masked_scores[row] = -torch.inf
                masked_scores[row, int(token)] = 0.0
        return masked_scores


class _Finished(StoppingCriteria):
    def __init__(self, growth: Sequence[TokenStream], on_end: Callable[[int], None]):
        self._growth, self._notify = growth, on_end

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        for row, one in enumerate(self._growth):
            if not one.finished:
                one.push(int(input_ids[row, -1]))
                if one.finished:
                    self._notify(row)
        return torch.tensor([one.finished for one in self._growth], device=input_ids.device)
