"""From what a pass is asked, the numbers of a run, and the run: one home for every pass that trains."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ...core.events import Said
from ...core.quantity import count_text
from ...ir.program import Program
from ...plugin.context import Context
from .acceptance import no_gain_diagnostic
from .loop import TrainingLoop, TrainingSettings, TrainingState
from .trainable import TrainedParameters, activation_checkpointing, training_mode
from .trained_pass import Learner


def training_settings(params: Learner, seed: int, weight_decay: float = 0.0) -> TrainingSettings:
    return TrainingSettings(
        steps=params.steps,
        lr=params.lr,
        warmup=round(params.warmup.value * params.steps),
        schedule=params.schedule,
        batch=params.batch,
        accumulate=params.accumulate,
        clip=params.clip,
        weight_decay=weight_decay,
        every=params.every,
        patience=params.patience,
        save=params.save,
        seed=seed,
    )


def run_training(
    params: Learner,
    program: Program,
    ctx: Context,
    weights: Mapping[str, nn.Parameter],
    n_rows: int,
    accumulate_gradients: Callable[[Tensor, float], float],
    evaluate: Callable[[], float],
    *,
    trainable_masks: Mapping[str, Tensor] | None = None,
    before_step: Callable[[int], None] | None = None,
    weight_decay: float = 0.0,
    run_label: str = "training",
) -> TrainingState:
    """Train `weights` as `params` say, and leave the best in place.

    trainable_masks   which numbers of a parameter may change, as `TrainedParameters.masks`
    evaluate          nats per token on `held_out`; asked only where that is given
    run_label         what a run is called where something is said of it
    Fewer rows than a batch has are told: every step learns the same ones.
    Raises Reject (not-healed) where the start was the best.
    """
    if n_rows < params.batch:
        ctx.emit_event(
            Said(
                f"{run_label}: {count_text(n_rows, 'row')} for a batch of {params.batch}, which has the same ones again"
            )
        )
    layers = [unit.module(program.model) for unit in program.units.values()]
    with (
        training_mode(program.model, weights),
        activation_checkpointing(layers if params.gradient_checkpointing else ()),
    ):
        course = TrainingLoop(
            TrainedParameters(weights, trainable_masks),
            training_settings(params, ctx.seed, weight_decay),
            n_rows,
            accumulate_gradients,
            evaluate if params.held_out else None,
            ctx,
            before_step,
        ).run()
    if params.held_out and course.best == 0:
        raise no_gain_diagnostic(course.held_out[0][1], course.held_out[1:], run_label).rejection()
    return course
