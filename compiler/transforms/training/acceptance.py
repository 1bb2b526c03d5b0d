"""Rejections of a training run: judged by its training data, or no better than its start."""

from collections.abc import Sequence

from ....dsl.checker.values import DataRef
from ....dsl.syntax.diagnostics import Diagnostic, Fault
from ...analysis.planning import keys
from ...plugin.context import Context

not_healed = Fault(
    "not-healed",
    "Training made a model no better on held-out data.\n\n"
    "Nothing is kept of the step: what it was given is the better model. The note tells how the loss went.",
    exit="failure",
)
held_out_learned = Fault(
    "held-out-learned", "The data that a training run is judged by is the data that it learns from."
)


def refuse_validation_on_training_rows(data: DataRef, validation: DataRef | None, ctx: Context) -> None:
    if validation and keys.data_identity(validation, ctx) == keys.data_identity(data, ctx):
        raise held_out_learned(
            f"`{validation.name}` holds the same rows as `{data.name}`",
            help="judge by other rows, or leave `held_out` out",
        ).rejection()


def no_gain_diagnostic(
    initial_loss_nats: float, step_losses: Sequence[tuple[int, float]], run_label: str = "healing"
) -> Diagnostic:
    """`initial_loss_nats` before training, `step_losses` (step, nats) on the same held-out rows."""
    best_step, best = min(step_losses, key=lambda entry: entry[1])
    advice = "lower" if best > initial_loss_nats + 1e-3 else "raise"  # 1e-3 nats: it hardly moved
    return not_healed(
        f"the held-out loss is {initial_loss_nats:.4f} before training, at best {best:.4f} after step {best_step}",
        help=f"{advice} `lr`, give more or other `data`, or leave the step out: it was better as it was",
        note=f"{run_label} did not help: " + ", ".join(f"{nats:.4f} after {step}" for step, nats in step_losses[:8]),
    )
