"""The one training loop: AdamW with warmup, accumulation, clipping and early stop; it survives a kill.

A run that was killed goes on from its last checkpoint and comes to the same bits: what a step does follows
from its number (schedule.py), the rest is on disk (saved.py).
Source: AdamW, Loshchilov and Hutter 2019 (arXiv 1711.05101).
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ....dsl.syntax.diagnostics import Fault
from ...core.cache import canonical_json_sha256
from ...core.events import Ticked
from ...core.quantity import size_text
from ...evaluation.reference import no_space
from ...models.rows.batch_limit import micro_batches
from ...plugin.context import Context
from .run_files import RunCheckpoints
from .schedule import RowOrder, learning_rate_factor, seed_of
from .trainable import TrainedParameters

diverged = Fault(
    "diverged",
    "The loss of a training run became NaN or infinite.\n\n"
    "The steps were too large, or the model's outputs were not finite to begin with.",
    exit="failure",
)

POINTS = 50  # of the loss curve, at most


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a run.

    warmup       steps over which the learning rate rises
    batch        rows of a forward; `accumulate` of them make a step
    clip         largest norm of a step's gradient
    every        steps between two looks at the held-out data; `patience` of them without a gain end the run
    save         steps between two checkpoints
    """

    steps: int
    lr: float
    warmup: int
    schedule: str
    batch: int
    accumulate: int
    clip: float
    weight_decay: float
    every: int
    patience: int
    save: int
    seed: int


@dataclass
class TrainingState:
    """State and history of a run; plain data.

    curve      (step, mean loss of the steps since the last point)
    held_out   (step, nats per token); step 0 is before the first one
    best       the step after which the held-out loss was lowest; without held-out data, the last
    finished   nothing is left to do
    """

    step: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    best: int = 0
    finished: bool = False
    pending: list[float] = field(default_factory=list)  # losses since the last point

    @property
    def lowest(self) -> float:
        return min(nats for _, nats in self.held_out)


@dataclass
class TrainingLoop:
    """One training run.

    accumulate_gradients(rows, factor)   loss over the rows of these numbers; adds `factor` times its gradient
    evaluate()          nats per token on held-out data, or None where there is none
    before_step(step)   is told of each step before it learns, of one that runs again after a kill, too
    """

    trained: TrainedParameters
    regime: TrainingSettings
    rows: int
    accumulate_gradients: Callable[[Tensor, float], float]
    evaluate: Callable[[], float] | None
    ctx: Context
    before_step: Callable[[int], None] | None = None

    def __post_init__(self):
        shapes = {name: list(p.shape) for name, p in self.trained.parameters.items()}
        self.saved = RunCheckpoints(self.ctx.workdir, canonical_json_sha256([asdict(self.regime), self.rows, shapes]))
        self.order = RowOrder(self.rows, self.regime.seed)
        self.course, self.saved_step = TrainingState(), 0  # kept: the step of the last checkpoint
        self.optimizer = torch.optim.AdamW(
            self.trained.masters.values(), lr=self.regime.lr, weight_decay=self.regime.weight_decay
        )

    def run(self) -> TrainingState:
        """Train to the end, and leave the best weights in place."""
        with torch.random.fork_rng():
            self._resume_from_checkpoint()
            if not self.course.finished:
                self._train_remaining_steps()
        self._restore_best_weights()
        return self.course

    def _train_remaining_steps(self) -> None:
        self._refuse_small_disk()
        if self.evaluate and not self.course.held_out:
            self._evaluate_save_best_and_check_patience(0)
        for step in range(self.course.step + 1, self.regime.steps + 1):
            loss = self._train_step(step)
            if self.evaluate and (step % self.regime.every == 0 or step == self.regime.steps):
                self._evaluate_save_best_and_check_patience(step)
            self.course.finished = self.course.finished or step == self.regime.steps
            if step % self.regime.save == 0 or self.course.finished:
                self._save_checkpoint()
            self.ctx.tick(Ticked("step", step, self.regime.steps, self._progress_text(loss)))
            if self.course.finished:
                break

    def _progress_text(self, loss: float) -> str:
        best = f", held out {self.course.lowest:.3f} at best" if self.course.held_out else ""
        return f"loss {loss:.3f}{best}"

    # -- a step ----------------------------------------------------------------------------------------------

    def _train_step(self, step: int) -> float:
        regime, masters, loss = self.regime, self.trained.masters.values(), 0.0
        if self.before_step is not None:
            self.before_step(step)
        for part in range(regime.accumulate):
            torch.manual_seed(seed_of("dropout", regime.seed, step, part))
            start = ((step - 1) * regime.accumulate + part) * regime.batch
            rows = self.order.take(start, regime.batch)
            for some in micro_batches(rows):
                share = len(some) / len(rows) / regime.accumulate
                loss += self.accumulate_gradients(some, share) * share
            self._refuse_non_finite(loss, "loss", step)
        self.trained.move_gradients_to_masters()
        norm = torch.nn.utils.clip_grad_norm_(masters, regime.clip).item()
        if not math.isfinite(norm) and self.course.step > self.saved_step:
            self._save_checkpoint()  # the loss was a number, so the weights are sound
        self._refuse_non_finite(norm, "gradient", step)
        for group in self.optimizer.param_groups:
            group["lr"] = regime.lr * learning_rate_factor(step, regime.steps, regime.warmup, regime.schedule)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.trained.copy_masters_to_parameters()
        self._record_step_loss(step, loss)
        return loss

    def _record_step_loss(self, step: int, loss: float) -> None:
        course = self.course
        course.step = step
        course.pending.append(loss)
        if step % math.ceil(self.regime.steps / POINTS) == 0 or step == self.regime.steps:
            course.curve.append((step, math.fsum(course.pending) / len(course.pending)))
            course.pending.clear()
            self.ctx.record(f"step {step}: loss", course.curve[-1][1], "nats/token")

    def _refuse_non_finite(self, value: float, label: str, step: int) -> None:
        if math.isfinite(value):
            return
        notes = [f"the loss was {loss:.3g} at step {number}" for number, loss in self.course.curve[-1:]]
        if self.saved_step:
            notes.append(
                f"weights as they were after step {self.saved_step} are kept, and the same recipe goes on from there"
            )
        raise diverged(
            f"the {label} is {'NaN' if math.isnan(value) else 'infinite'} at step {step}",
            note="; ".join(notes),
            help=f"lower `lr`, which is {self.regime.lr:g}, or give more `warmup`"
            if step > 1
            else "the model's outputs are not finite before it is trained: look at the step before this one",
        ).rejection()

    # -- held-out data ---------------------------------------------------------------------------------------

    def _evaluate_save_best_and_check_patience(self, step: int) -> None:
        """Measure; keep the weights if they are the best so far; end a run that has long got no better."""
        assert self.evaluate is not None
        course, nats = self.course, self.evaluate()
        self._refuse_non_finite(nats, "held-out loss", step)
        better = not course.held_out or nats < course.lowest
        course.held_out.append((step, nats))
        self.ctx.record(f"step {step}: held-out loss", nats, "nats/token")
        if better:
            course.best = step
            if step:
                self.saved.write_tensors(f"best-{step}", self.trained.tensors())
        waited = sum(at > course.best for at, _ in course.held_out)
        course.finished = waited >= self.regime.patience

    def _restore_best_weights(self) -> None:
        """The start's weights are not kept: a run whose best is step 0 has nothing to give."""
        if self.evaluate is None:
            self.course.best = self.course.step
        elif 0 < self.course.best < self.course.step:
            self.trained.load(self.saved.load_tensors(f"best-{self.course.best}"))

    # -- going on after a kill -------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        name = f"state-{self.course.step}"
        tensors = {f"weight:{n}": t for n, t in self.trained.tensors().items()}
        for key, master in self.trained.masters.items():
            # What never had a gradient, such as an expert that no token was sent to, has no state yet.
            state = self.optimizer.state.get(master, {})
            tensors |= {f"{part}:{key}": value for part, value in state.items()}
        self.saved.write_tensors(name, tensors)
        best = [f"best-{self.course.best}"] if self.evaluate and self.course.best else []
        self.saved.write_manifest_and_prune_folders(asdict(self.course), [name, *best])
        self.saved_step = self.course.step

    def _refuse_small_disk(self) -> None:
        """Reject where the disk lacks room for two checkpoints, each of weights and two moments, and two best
        weights."""
        needed = sum(m.nbytes for m in self.trained.masters.values()) * (8 if self.evaluate else 6)
        self.ctx.workdir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.ctx.workdir).free
        if needed > 0.9 * free:
            raise no_space(
                f"the checkpoints of training take {size_text(needed)}, {size_text(free)} are free in "
                f"{self.ctx.workdir}",
                help="train fewer parameters, or give another --cache-dir",
            ).rejection()

    def _resume_from_checkpoint(self) -> None:
        stored = self.saved.read_checkpoint_and_clean_up()
        if stored is None:
            return
        self.course = TrainingState(
            **{
                **stored,
                "curve": [(s, v) for s, v in stored["curve"]],
                "held_out": [(s, v) for s, v in stored["held_out"]],
            }
        )
        tensors, self.saved_step = self.saved.load_tensors(f"state-{self.course.step}"), self.course.step
        self.trained.load({name: tensors[f"weight:{name}"] for name in self.trained.masters})
        self.optimizer.load_state_dict(self._optimizer_state_dict(tensors))

    def _optimizer_state_dict(self, checkpoint_tensors: dict[str, Tensor]) -> dict[str, Any]:
        numbers = {name: number for number, name in enumerate(self.trained.masters)}
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in checkpoint_tensors.items():
            part, _, name = key.partition(":")
            if part != "weight":
                state.setdefault(numbers[name], {})[part] = tensor.clone()
        return {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}
