"""The turns of one PyTorch model among many queries: one computation at a time, answers that wait together in a batch.

Each row of a batch has the adapters of its own query, by products gathered per row: what one query trained never
touches another's words. In float32 a row is what it is alone, to rounding; bfloat16 would round otherwise by the number
of rows, so there answers come one by one, as they do for models that don't read padded rows
(`batching_matches_single`).

Source: gathered products as in Punica (Chen et al. 2023, arXiv 2310.18547), section 3, without its kernel.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models.rows.forward import evaluating
from .adaptation import AdaptableModel, State
from .generation import GeneratedText, Settings, TokenStream, eos_ids_of, generate_rows, left_padded_ids_and_mask
from .prompts import Prompts

ROWS = 8  # of a batch: a step of so many of 135M parameters took no longer than one row's, with weights read once
_MAX_DIFFERENCE = 1e-3  # of root mean squares, between a row's logits in a batch and alone: rounding of float32 is 1e-6


@dataclass(eq=False)
class _Row:
    """An answer that is waited for. `error` is what broke its batch."""

    ids: list[int]
    settings: Settings
    growth: TokenStream
    state: State | None
    finished: bool = False
    error: BaseException | None = None


class Batcher:
    """All methods may be called from any thread. `largest` is how many rows the largest batch had."""

    def __init__(self, model: Any, prompts: Prompts, adaptable: AdaptableModel | None):
        self._model, self._prompts, self._adaptable = model, prompts, adaptable
        self._changed = threading.Condition()
        self._busy = False
        self._waiting: list[_Row] = []
        self._agrees: bool | None = None
        self.largest = 0

    @contextmanager
    def exclusive_model(self) -> Iterator[None]:
        """Within it nobody else computes on the model."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)
            self._busy = True
        try:
            yield
        finally:
            self._release_model()

    def generate_in_batch(
        self, ids: list[int], settings: Settings, is_cancelled: Callable[[], bool], state: State | None = None
    ) -> GeneratedText:
        """An answer under the adapters of `state`, or of the bare model."""
        growth = TokenStream(self._prompts, ids, settings, eos_ids_of(self._model, self._prompts), is_cancelled)
        row = _Row(ids, settings, growth, state)
        with self._changed:
            self._waiting.append(row)
        while self._acquire_model_unless_answered(row):
            threading.Thread(target=self._answer_next_batch, name="effc-batch", daemon=True).start()
        if row.error is not None:
            raise row.error
        return growth.generated_text()

    def _answer_next_batch(self) -> None:
        """One batch, in a thread of its own: whoever asked for a short answer is not kept by the long ones beside."""
        try:
            self._answer_batch(self._take_next_batch())
        finally:
            self._release_model()

    def _acquire_model_unless_answered(self, row: _Row) -> bool:
        """Wait for the model, True, or until another thread has answered the row, False."""
        with self._changed:
            self._changed.wait_for(lambda: row.finished or not self._busy)
            if not row.finished:
                self._busy = True
            return not row.finished

    def _release_model(self) -> None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()

    def _take_next_batch(self) -> list[_Row]:
        """Rows that have waited longest, as many as one batch takes within the model's context."""
        with self._changed:
            batch: list[_Row] = []
            for row in self._waiting[:ROWS]:
                longest = max(len(one.ids) for one in (*batch, row))
                if batch and longest + max(one.growth.max_tokens for one in (*batch, row)) > self._prompts.context:
                    break
                batch.append(row)
            del self._waiting[: len(batch)]
            return batch

    def _answer_batch(self, batch: list[_Row]) -> None:
        try:
            if len(batch) > 1 and self._agrees is None:
                self._agrees = batching_matches_single(self._model, self._adaptable)
            for part in [batch] if self._agrees else [[row] for row in batch]:
                self._generate_batch(part)
        except BaseException as error:
            for row in batch:
                row.error = None if row.finished else error
        finally:
            for row in batch:
                self._notify(row)

    def _generate_batch(self, batch: Sequence[_Row]) -> None:
        self.largest = max(self.largest, len(batch))
        with _with_adapters_per_row(self._adaptable, [row.state for row in batch]):
            generate_rows(
                self._model,
                [row.ids for row in batch],
                [row.growth for row in batch],
                [row.settings for row in batch],
                eos_ids_of(self._model, self._prompts),
                lambda number: self._notify_early(batch[number], batch),
            )

    def _notify_early(self, row: _Row, batch: Sequence[_Row]) -> None:
        """Notify rows whose batch continues without them; the last one when the model is as it was, without
        adapters."""
        if any(other is not row and not other.finished for other in batch):
            self._notify(row)

    def _notify(self, row: _Row) -> None:
        """Nobody waits for the other rows of its batch."""
        with self._changed:
            row.finished = True
            self._changed.notify_all()


def _with_adapters_per_row(adaptable: AdaptableModel | None, states: Sequence[State | None]) -> Any:
    assert adaptable is not None or not any(states), "only what can be trained has adapters"
    return adaptable.with_state_per_row(states) if adaptable is not None else nullcontext()


def batching_matches_single(model: Any, adaptable: AdaptableModel | None) -> bool:
    """Whether rows of a batch, one padded and each under other adapters, come out as each does alone: the logits of
    two tokens are compared. False for models below float32, for those that carry a state over padding, and for those
    whose layers see tokens of all rows as one list."""
    if next(model.parameters()).dtype not in (torch.float32, torch.float64):
        return False
    draw = torch.Generator().manual_seed(0)
    width = model.get_input_embeddings().weight.shape[0]
    rows = [torch.randint(width, (length,), generator=draw).tolist() for length in (3, 8)]
    states = [None if adaptable is None else _perturbed_state(adaptable, draw) for _ in rows]
    try:
        single_rows = [
            _logits_of_first_two_tokens(model, adaptable, [row], [state])
            for row, state in zip(rows, states, strict=True)
        ]
        batched = _logits_of_first_two_tokens(model, adaptable, rows, states)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    expected = torch.cat(single_rows, dim=1)
    return bool((batched - expected).square().mean().sqrt() <= _MAX_DIFFERENCE * expected.square().mean().sqrt())


def _perturbed_state(adaptable: AdaptableModel, rng: torch.Generator) -> State:
    return {n: t + 0.05 * torch.randn(t.shape, generator=rng).to(t) for n, t in adaptable.state().items()}


def _logits_of_first_two_tokens(
    model: Any, adaptable: AdaptableModel | None, rows: Sequence[list[int]], states: Sequence[State | None]
) -> Tensor:
    """Logits [2, rows, vocabulary] of the first two tokens of answers."""
    ids, mask = left_padded_ids_and_mask(rows, 0)
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    with evaluating(model), _with_adapters_per_row(adaptable, states):
        generated = model.generate(
            input_ids=ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options
        )
    return torch.stack(generated.logits)
