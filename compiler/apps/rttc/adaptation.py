"""Test-time training: small adapters on a frozen model, trained on a few samples and set back before the next.

Source: Akyürek et al. 2024 (arXiv 2411.07279) and Hübotter et al. 2025 (arXiv 2410.08020): AdamW, whole samples as
the target, a fresh optimizer and the initial adapters for every query.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ....dsl.syntax.diagnostics import Fault
from ....dsl.syntax.json_types import make_range_predicate
from ...core.cache import canonical_json_sha256
from ...models.rows.forward import logits, slices_within_chunk_bytes, token_losses
from .attachment import attach_adapters
from .sample import Sample

State = Mapping[str, Tensor]

nothing_to_train = Fault("nothing-to-train-on", "No sample was left to train on.")


@dataclass(frozen=True)
class AdapterSettings:
    """Settings of test-time training.

    kind         of adapters: "lora", or "reft" at every position, whose states are smaller
    batch        samples of a step; `epochs` times over all, so ceil(samples / batch) * epochs steps
    clip         largest norm of a step's gradient
    length       tokens of a sample that count
    answers      learn the answers alone, given the questions; texts without a question are learned whole
    reduce       train on those whose score is above min(mean, median) of the scores alone, all where none is
    weigh        a sample's loss counts by its score, mean 1
    seconds      after which no step is started
    """

    rank: Annotated[int, make_range_predicate(1, 256)] = 8
    alpha: float = 16.0
    lr: float = 5e-4
    batch: Annotated[int, make_range_predicate(1, 64)] = 4
    epochs: Annotated[int, make_range_predicate(1, 16)] = 2
    clip: float = 1.0
    length: Annotated[int, make_range_predicate(2, 4096)] = 256
    answers: bool = False
    reduce: bool = False
    weigh: bool = False
    seconds: Annotated[float, make_range_predicate(0, 600)] = 60.0
    seed: int = 0
    kind: Literal["lora", "reft"] = "lora"


def indices_above_min_of_mean_and_median(scores: Sequence[float]) -> list[int]:
    """Numbers of the scores above min(mean, median); all where none is."""
    if not scores:
        return []
    values = torch.tensor(scores, dtype=torch.float64)
    bound = min(float(values.mean()), float(values.quantile(0.5)))
    return [i for i, score in enumerate(scores) if score > bound] or list(range(len(scores)))


@dataclass(frozen=True)
class Trained:
    """`losses` per step, nats a token; `stopped` where the time ran out, or nobody waited any more."""

    losses: tuple[float, ...]
    stopped: bool


class AdaptableModel:
    """A model with adapters that are off until a state is put on; one query at a time may have it.

    on       paths of the modules that get an adapter
    prompt   token ids of a question as it is asked when it is answered
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        adapter_paths: tuple[str, ...],
        adapter_settings: AdapterSettings,
        tokenize_question: Callable[[str], list[int]],
    ):
        self.model, self.regime, self._tokenizer, self._prompt = model, adapter_settings, tokenizer, tokenize_question
        self.on = adapter_paths
        self._adapters = attach_adapters(
            adapter_settings.kind,
            model,
            adapter_paths,
            adapter_settings.rank,
            adapter_settings.alpha,
            adapter_settings.seed,
        )
        self._parameters = self._adapters.parameters()
        adapter_ids = {id(p) for p in self._parameters.values()}
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in adapter_ids)
        self._initial = self.state()
        self.shape = canonical_json_sha256([asdict(adapter_settings), adapter_paths])
        self.disable_adapters()

    def close(self) -> None:
        """Take the adapters off: the model is as it was."""
        self._adapters.close()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    def frozen_weights_checksum(self) -> str:
        """sha256 over all of the model but the adapters."""
        adapter_ids, total = {id(p) for p in self._parameters.values()}, hashlib.sha256()
        for name, tensor in sorted([*self.model.named_parameters(), *self.model.named_buffers()], key=lambda p: p[0]):
            if id(tensor) not in adapter_ids:
                total.update(name.encode())
                total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    def state(self) -> State:
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    def load_and_enable(self, state: State) -> None:
        """Answer with these adapters from now on."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state[name])
        self._switch(enabled=True)

    def disable_adapters(self) -> None:
        """Answer as the bare model."""
        self._switch(enabled=False)

    @contextmanager
    def with_state_per_row(self, states: Sequence[State | None]) -> Iterator[None]:
        """Within it each row of a batch is answered by a state of its own, or by the bare model (None)."""
        self.disable_adapters()
        if all(state is None for state in states):
            yield
            return
        blank = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        row_states = [blank if state is None else state for state in states]
        with self._adapters.rows({name: torch.stack([state[name] for state in row_states]) for name in blank}):
            yield

    def _switch(self, enabled: bool) -> None:
        self._adapters.switch(enabled)

    def reset_and_train(
        self, samples: Sequence[Sample], scores: Sequence[float] = (), is_cancelled: Callable[[], bool] = lambda: False
    ) -> Trained:
        """Set the adapters back, then train them on the samples; they stay on. No step is begun once `is_cancelled`."""
        regime, scores = self.regime, list(scores) or [1.0] * len(samples)
        chosen = indices_above_min_of_mean_and_median(scores) if regime.reduce else list(range(len(samples)))
        if not chosen:
            raise nothing_to_train("there is no sample to train on").rejection()
        rows = [self._sample_ids_and_answer_start(samples[i]) for i in chosen]
        mean = sum(scores[i] for i in chosen) / len(chosen)
        weights = [scores[i] / mean if regime.weigh and mean > 0 else 1.0 for i in chosen]
        self.load_and_enable(self._initial)
        for parameter in self._parameters.values():  # the switch of the adapters froze them
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(self._parameters.values(), lr=regime.lr, weight_decay=0.0)
        step_losses: list[float] = []
        until = time.monotonic() + regime.seconds
        for _ in range(regime.epochs):
            for start in range(0, len(rows), regime.batch):
                if time.monotonic() > until or is_cancelled():
                    return Trained(tuple(step_losses), stopped=True)
                part = slice(start, start + regime.batch)
                step_losses.append(self._optimizer_step(optimizer, rows[part], weights[part]))
        return Trained(tuple(step_losses), stopped=False)

    def _optimizer_step(
        self, optimizer: torch.optim.Optimizer, rows: Sequence[tuple[list[int], int]], weights: Sequence[float]
    ) -> float:
        """Run one optimizer step; the mean loss of its tokens. Rows run one at a time, so that one row's logits are in
        memory."""
        optimizer.zero_grad(set_to_none=True)
        count, total = sum(len(ids) - begin for ids, begin in rows), 0.0
        for (ids, begin), weight in zip(rows, weights, strict=True):
            row = torch.tensor([ids])
            values = logits(self.model, row)[0, begin - 1 : -1]  # [t, vocab]
            targets = row[0, begin:].to(values.device)
            gradient = torch.empty_like(values)
            for part in slices_within_chunk_bytes(values):  # float32 copies of all logits never exist
                chunk = values.detach()[part].float().requires_grad_()
                loss = token_losses(chunk, targets[part]).sum()
                (slope,) = torch.autograd.grad(loss, chunk)
                gradient[part] = (slope * (weight / count)).to(gradient.dtype)
                total += float(loss.detach())
            values.backward(gradient)
        nn.utils.clip_grad_norm_(self._parameters.values(), self.regime.clip)
        optimizer.step()
        return total / count

    def _sample_ids_and_answer_start(self, sample: Sample) -> tuple[list[int], int]:
        """Token ids of a sample with an end, and where what is learned begins: at 1 at least, nothing predicts 0."""
        end = self._tokenizer.eos_token_id
        head = self._prompt(sample.question) if sample.question else []
        answer_ids = self._tokenizer(sample.answer, add_special_tokens=not head)["input_ids"]
        ids = [*head, *answer_ids, *([] if end is None else [end])]
        ids = ids[: self.regime.length]
        begin = len(head) if self.regime.answers and head and len(head) < len(ids) else 1
        if len(ids) < 2:
            ids = [ids[0] if ids else 0] * 2
        return ids, begin
