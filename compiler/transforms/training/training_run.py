"""From what a pass is asked, the numbers of a run, and the run: one home for every pass that trains."""

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor, nn

from ....dsl.checker.values import DataRef, Ratio
from ....dsl.syntax.diagnostics import Reject
from ...core.events import Said
from ...core.quantity import counted
from ...ir.program import Program
from ...plugin.context import Context
from .acceptance import no_gain
from .loop import Course, Regime, Run
from .trainable import Trained, recomputing, training


class TrainingParams(Protocol):
    """The parameters that passes which train have in common."""

    @property
    def steps(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def warmup(self) -> Ratio: ...
    @property
    def schedule(self) -> str: ...
    @property
    def batch(self) -> int: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def clip(self) -> float: ...
    @property
    def every(self) -> int: ...
    @property
    def patience(self) -> int: ...
    @property
    def save(self) -> int: ...
    @property
    def gradient_checkpointing(self) -> bool: ...
    @property
    def held_out(self) -> DataRef | None: ...


def regime(asked: TrainingParams, seed: int, weight_decay: float = 0.0) -> Regime:
    return Regime(
        steps=asked.steps,
        lr=asked.lr,
        warmup=round(asked.warmup.value * asked.steps),
        schedule=asked.schedule,
        batch=asked.batch,
        accumulate=asked.accumulate,
        clip=asked.clip,
        weight_decay=weight_decay,
        every=asked.every,
        patience=asked.patience,
        save=asked.save,
        seed=seed,
    )


def train(
    asked: TrainingParams,
    program: Program,
    ctx: Context,
    weights: Mapping[str, nn.Parameter],
    rows: int,
    learn: Callable[[Tensor, float], float],
    judge: Callable[[], float],
    *,
    kept: Mapping[str, Tensor] | None = None,
    begin: Callable[[int], None] | None = None,
    weight_decay: float = 0.0,
    verb: str = "training",
) -> Course:
    """Train `weights` as `Run` says, and leave the best in place.

    kept     what may change of a parameter, as `Trained.masks`
    judge    nats per token on `held_out`; asked only where that is given
    verb     what a run is called where something is said of it
    Fewer rows than a batch has are told: every step learns the same ones.
    Raises Reject (not-healed) where the start was the best.
    """
    if rows < asked.batch:
        ctx.tell(Said(f"{verb}: {counted(rows, 'row')} for a batch of {asked.batch}, which has the same ones again"))
    layers = [unit.module(program.model) for unit in program.units.values()]
    with training(program.model, weights), recomputing(layers if asked.gradient_checkpointing else ()):
        course = Run(
            Trained(weights, kept),
            regime(asked, ctx.seed, weight_decay),
            rows,
            learn,
            judge if asked.held_out else None,
            ctx,
            begin,
        ).run()
    if asked.held_out and course.best == 0:
        raise Reject(no_gain(course.held_out[0][1], course.held_out[1:], verb))
    return course
