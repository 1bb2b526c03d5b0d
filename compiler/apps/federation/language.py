"""A client that learns the next token of its own rows, the answers to prompts, or the classes of texts."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...models.rows.classifier import class_logits, classification_loss_and_accuracy, refuse_labels_beyond_outputs
from ...models.rows.forward import total_nll
from ...models.rows.prompt_positions import prompts
from ...transforms.training.objective import Objective
from ...transforms.training.schedule import RowOrder, seed_of
from ...transforms.training.trainable import TrainedParameters, training_mode
from .bounds import client_refuses
from .client import Evaluation, Learner
from .rows import Rows
from .slots import Slots
from .state import State


@dataclass(frozen=True)
class Local:
    """Local training in a round: AdamW from a fresh start, `steps` times `batch` rows, gradients cut at `clip`.

    noise    of a private client: each row's gradient is cut at `clip`, and their sum gets normal noise of deviation
             noise * clip; a step's rows are then drawn one by one with probability batch / rows. None: not private
    anchor   of a stream: each step takes so large a share, times `lr`, of the way back to the task's beginning
    """

    steps: int
    batch: int
    lr: float
    clip: float = 1.0
    noise: float | None = None
    anchor: float = 0.0


class CausalLmLearner(Learner):
    """`slots` may be shared with other clients of the process, one of whom trains at a time.

    held_out    what it judges by; may have no rows
    """

    def __init__(self, slots: Slots, rows: Rows, validation: Rows, local: Local, base: str):
        self.slots, self.rows, self.held_out, self.local, self.base = slots, rows, validation, local, base
        self.examples = len(rows)

    def initial_state(self, seed: int, rank: int | None = None) -> State:
        return self.slots.initial_state(seed, rank)

    def loss(self, state: State, delta: State) -> float:
        return self.evaluate(state, delta)[0]

    def evaluate(self, state: State, delta: State) -> Evaluation:
        validation = self.held_out
        if not len(validation):
            return Evaluation(math.nan, math.nan)
        self.slots.load_state(state, delta)
        if validation.labels is not None:
            scored = classification_loss_and_accuracy(
                self.slots.model, validation.ids, validation.prompts, validation.labels, "the data"
            )
            return Evaluation(scored.loss, scored.accuracy)
        nats, tokens = total_nll(self.slots.model, validation.ids, validation.speech, validation.prompts)
        return Evaluation(nats / tokens, math.nan)

    def train(self, state: State, names: frozenset[str], delta: State, seed: int, deadline: float) -> State:
        self.slots.load_state(state, delta)
        chosen = {name: p for name, p in self.slots.parameters().items() if name in names}
        with training_mode(self.slots.model, chosen), torch.random.fork_rng(devices=[]):
            trained_params = TrainedParameters(chosen)
            optimizer = torch.optim.AdamW(trained_params.masters.values(), lr=self.local.lr, weight_decay=0.0)
            learn, order = self._make_accumulate_gradients(), RowOrder(len(self.rows), seed)
            for step in range(self.local.steps):
                if time.monotonic() > deadline:
                    raise client_refuses(
                        f"the round's time was over after {step} of {self.local.steps} steps",
                        help="give the round more `deadline`, or clients fewer `steps`",
                    ).rejection()
                torch.manual_seed(seed_of("dropout", seed, step))
                if self.local.noise is None:
                    learn(order.take(step * self.local.batch, self.local.batch), 1.0)
                    trained_params.move_gradients_to_masters()
                    nn.utils.clip_grad_norm_(trained_params.masters.values(), self.local.clip)
                else:
                    accumulate_dp_sgd_gradient(trained_params, learn, len(self.rows), self.local)
                optimizer.step()
                self._pull_towards_anchor(trained_params)
                optimizer.zero_grad(set_to_none=True)
                trained_params.copy_masters_to_parameters()
            self.slots.project_after_training()
        arrays = {name: t.float().cpu().numpy().copy() for name, t in trained_params.tensors().items()}
        return {name: arrays.get(name, array) for name, array in state.items()}

    @torch.no_grad()
    def _pull_towards_anchor(self, trained_params: TrainedParameters) -> None:
        """Some of the way back to where the task began."""
        if self.local.anchor:
            for name, master in trained_params.masters.items():
                back = torch.from_numpy(self.anchor[name]).to(master)
                master.lerp_(back, min(1.0, self.local.lr * self.local.anchor))

    def _make_accumulate_gradients(self) -> Callable[[Tensor, float], float]:
        """Gradient step over rows of these numbers: adds a weight times the gradient of their mean loss."""
        model, rows = self.slots.model, self.rows
        lesson = Objective(model, rows.ids, learned=rows.speech)

        def learn(chosen: Tensor, weight: float) -> float:
            with prompts(model, None if rows.prompts is None else rows.prompts[chosen]):
                return lesson.accumulate_gradients(chosen, weight)

        def classify(chosen: Tensor, weight: float) -> float:
            assert rows.labels is not None and rows.prompts is not None
            logits = class_logits(model, rows.ids[chosen], rows.prompts[chosen]).float()
            refuse_labels_beyond_outputs(logits, rows.labels[chosen], "the data")
            loss = nn.functional.cross_entropy(logits, rows.labels[chosen].to(logits.device))
            (loss * weight).backward()
            return loss.item()

        return learn if rows.labels is None else classify


def accumulate_dp_sgd_gradient(
    trained_params: TrainedParameters,
    accumulate_gradients: Callable[[Tensor, float], float],
    n_client_rows: int,
    local: Local,
) -> None:
    """The noisy mean of clipped gradients of single rows, one backward pass each, at the masters.

    Which rows, and the noise, come from the system: a seed that somebody knows would take both off again.
    Source: DP-SGD, Abadi et al. 2016 (arXiv 1607.00133), with Poisson sampling.
    """
    assert local.noise is not None
    draw = torch.Generator()
    draw.seed()
    sampled = torch.rand(n_client_rows, generator=draw).lt(local.batch / n_client_rows).nonzero().flatten()
    totals = {name: torch.zeros_like(p) for name, p in trained_params.masters.items()}
    for row in sampled:
        accumulate_gradients(row[None], 1.0)
        trained_params.move_gradients_to_masters()
        grads = {name: p.grad for name, p in trained_params.masters.items() if p.grad is not None}
        norm = torch.sqrt(sum((g.square().sum() for g in grads.values()), torch.zeros(())))
        for name, grad in grads.items():
            totals[name] += grad * (local.clip / norm.clamp(min=local.clip))
            trained_params.masters[name].grad = None
    for name, total in totals.items():
        noise = torch.randn(total.shape, generator=draw).to(total)
        trained_params.masters[name].grad = (total + local.noise * local.clip * noise) / local.batch
