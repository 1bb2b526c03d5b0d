"""Train the interventions of a model while all its own weights stay."""

from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...compiler.ir.layers.reft import Reft as Edits
from ...compiler.ir.layers.reft import interventions
from ...compiler.ir.program import Program
from ...compiler.models.rows.classifier import (
    class_logits,
    classification_loss_and_accuracy,
    refuse_labels_beyond_outputs,
)
from ...compiler.models.rows.forward import total_nll
from ...compiler.models.rows.prompt_positions import parameters_above_body, prompts
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Effort, Lossy, param
from ...compiler.transforms.training.acceptance import no_gain_diagnostic, refuse_validation_on_training_rows
from ...compiler.transforms.training.effort import estimate_run_effort
from ...compiler.transforms.training.loop import TrainingLoop, TrainingState
from ...compiler.transforms.training.objective import Objective
from ...compiler.transforms.training.trainable import TrainedParameters, activation_checkpointing, training_mode
from ...compiler.transforms.training.trained_pass import Learner
from ...compiler.transforms.training.training_run import training_settings
from ...dsl.checker.demands import no_prompts
from ...dsl.checker.rules import MissingStep, Problem
from ...dsl.checker.skeleton import Skeleton
from ...dsl.checker.values import DataRef, Ratio
from ...dsl.syntax.diagnostics import Fault

nothing_inserted = Fault("nothing-inserted", "Interventions are to be trained in a model that has none.")
prompts_too_short = Fault("prompts-too-short", "An intervention has more positions than any prompt has tokens.")
no_coordinate = Fault("no-coordinate", "A subspace names coordinates that the interventions don't have.")


class Reft(Learner):
    """Train the interventions of a model while all its own weights stay.

    The model learns to predict the tokens of the answers in rows of `pairs`, prompts being edited where `reft.insert`
    said; of rows of `labels` it learns the classes, and the model's head is trained along. Rows of R stay orthonormal
    at every step. With `held_out`, the loss on its answers is measured every so many
    steps and the best interventions are kept; a run that never gets better than its start is refused.

    `subspace` trains some coordinates alone: interventions of rank 8 can learn one task in 0 to 3 and another, by a
    second step, in 4 to 7. Both act where nothing else is said. Later coordinates give way where earlier ones
    turn, as their rows are made orthonormal in order: train in rising order.

    Source: ReFT (Wu et al. 2024, arXiv 2404.03592), section 4; defaults are its settings for commonsense questions,
    with a shorter run.
    Example: fit = tune.reft(data: train, held_out: dev, steps: 200)
    """

    keeps = Lossy()
    determinism = "seeded"
    disjoint = {"held_out": "data"}
    answers = ("data", "held_out")
    after: ClassVar[dict[str, str]] = {"reft.insert": "it trains what that inserts"}

    data: DataRef = param("Prompts with answers to learn from.")
    lr: float = param("Largest learning rate of AdamW.", default=9e-4, gt=0)
    batch: int = param("Rows in a forward.", default=16, ge=1, unit="rows")
    warmup: Ratio = param("Share of the steps over which the learning rate rises.", default=Ratio(0.1), ge=0, le=1)
    schedule: Literal["linear", "cosine", "constant"] = param(
        "How the learning rate falls after that.", default="linear"
    )
    weight_decay: float = param("AdamW's decay of the interventions.", default=0.0, ge=0)
    subspace: tuple[int, ...] | None = param(
        "Coordinates to train, from 0; all where it is left out.", default=None, least=1, distinct=True
    )
    held_out: DataRef | None = param("Prompts with answers to judge by; never learned from.", default=None)

    def problems(self) -> Iterator[Problem]:
        yield MissingStep("reft.insert", "it trains the interventions that a step inserts")

    def run(self, program: Program, ctx: Context) -> None:
        refuse_validation_on_training_rows(self.data, self.held_out, ctx)
        edits = dict(interventions(program.model))
        if not edits:
            raise nothing_inserted(
                f"{type(program.model).__name__} has no interventions", help="put `reft.insert()` before this step"
            ).rejection()
        active = self._trained_coordinates_mask(edits)
        weights = {f"{path}.{name}": p for path, module in edits.items() for name, p in module.named_parameters()}
        hooks = [] if active is None else [p.register_hook(_make_gradient_mask_hook(active)) for p in weights.values()]
        if ctx.labels(self.data) is not None:
            weights |= parameters_above_body(program.model)
        try:
            course = self._train_interventions_to_best(program, ctx, edits, weights, active)
        finally:
            for hook in hooks:
                hook.remove()
        for module in edits.values():
            for function in module.interventions():
                function.store_orthonormal_rows()
        program.changed()
        program.note(
            trained=sum(p.numel() for p in weights.values()),
            subspace=self.subspace,
            steps=course.step,
            best=course.best,
            loss=course.curve,
            held_out=course.held_out,
        )

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        trained = sum(
            shape[0] * (shape[1] if len(shape) > 1 else 1)
            for part in skeleton.parts
            if part.kind == "Intervention"
            for _, shape in part.tensors
        )
        return estimate_run_effort(self, self.data, skeleton, ctx, trained)

    def _train_interventions_to_best(
        self,
        program: Program,
        ctx: Context,
        intervention_by_path: dict[str, Edits],
        weights: dict[str, nn.Parameter],
        coordinate_mask: Tensor | None,
    ) -> TrainingState:
        """Train, and leave the best interventions in place; raises Reject where the start was the best."""
        model, rows = program.model, ctx.rows(self.data)
        regime = training_settings(self, ctx.seed, self.weight_decay)
        learn = self._make_batch_gradient_function(model, intervention_by_path, ctx, coordinate_mask)
        judge = (
            self._make_validation_loss_function(model, intervention_by_path, ctx, coordinate_mask)
            if self.held_out
            else None
        )
        layers = [unit.module(model) for unit in program.units.values()] if self.gradient_checkpointing else ()
        with training_mode(model, weights), activation_checkpointing(layers):
            course = TrainingLoop(TrainedParameters(weights), regime, len(rows), learn, judge, ctx).run()
        if self.held_out and course.best == 0:
            raise no_gain_diagnostic(course.held_out[0][1], course.held_out[1:], "training").rejection()
        return course

    def _make_batch_gradient_function(
        self, model: nn.Module, intervention_by_path: dict[str, Edits], ctx: Context, coordinate_mask: Tensor | None
    ) -> Callable[[Tensor, float], float]:
        """Loss of a batch: on the answers to its prompts, or on its classes."""
        rows, prompt_lengths, labels = (
            ctx.rows(self.data),
            self._prompt_lengths_or_reject(self.data, intervention_by_path, ctx),
            ctx.labels(self.data),
        )
        lesson = Objective(model, rows, learned=ctx.assistant_masks(self.data))

        def learn(chosen: Tensor, weight: float) -> float:
            with prompts(model, prompt_lengths[chosen], coordinate_mask):
                return lesson.accumulate_gradients(chosen, weight)

        if labels is None:
            return learn

        def classify(chosen: Tensor, weight: float) -> float:
            logits = class_logits(model, rows[chosen], prompt_lengths[chosen], coordinate_mask).float()
            refuse_labels_beyond_outputs(logits, labels[chosen], self.data.name)
            loss = nn.functional.cross_entropy(logits, labels[chosen].to(logits.device))
            (loss * weight).backward()
            return loss.item()

        return classify

    def _make_validation_loss_function(
        self, model: nn.Module, intervention_by_path: dict[str, Edits], ctx: Context, coordinate_mask: Tensor | None
    ) -> Callable[[], float]:
        validation = self.held_out
        assert validation is not None, "judged by no rows"
        rows, loss_mask = ctx.rows(validation), ctx.assistant_masks(validation)
        prompt_lengths, labels = (
            self._prompt_lengths_or_reject(validation, intervention_by_path, ctx),
            ctx.labels(validation),
        )

        def judge() -> float:
            if labels is not None:
                return classification_loss_and_accuracy(model, rows, prompt_lengths, labels, validation.name)[0]
            nats, tokens = total_nll(model, rows, loss_mask, prompt_lengths, coordinate_mask)
            return nats / tokens

        return judge

    def _prompt_lengths_or_reject(
        self, data_ref: DataRef, intervention_by_path: dict[str, Edits], ctx: Context
    ) -> Tensor:
        """Number of prompt tokens of each row."""
        lengths = ctx.prompts(data_ref)
        if lengths is None:
            raise no_prompts(
                f"`{data_ref.name}` does not say where a prompt ends and its answer begins",
                help="give rows of `pairs`, or of `labels` to a model with a head",
                argument="data",
            ).rejection()
        for path, module in intervention_by_path.items():
            positions = module.first + module.last
            if int(lengths.max()) < positions:
                raise prompts_too_short(
                    f"{path} edits {positions} positions, and the longest prompt of `{data_ref.name}` has "
                    f"{int(lengths.max())} tokens",
                    help="insert interventions of fewer `positions`",
                    argument="data",
                ).rejection()
        return lengths

    def _trained_coordinates_mask(self, intervention_by_path: dict[str, Edits]) -> Tensor | None:
        """Mask of trained coordinates, [r] bool; None: all."""
        if self.subspace is None:
            return None
        ranks = {module.shape[2] for module in intervention_by_path.values()}
        if len(ranks) > 1 or not self.subspace or not set(self.subspace) <= set(range(min(ranks))):
            available = f"0 to {min(ranks) - 1}" if len(ranks) == 1 else "layers of several ranks"
            raise no_coordinate(
                f"`subspace` is {list(self.subspace)}, and there are {available}",
                help="name coordinates of one rank that all interventions have",
                argument="subspace",
            ).rejection()
        active = torch.zeros(min(ranks), dtype=torch.bool)
        active[list(self.subspace)] = True
        return active


def _make_gradient_mask_hook(coordinate_mask: Tensor) -> Callable[[Tensor], Tensor]:
    """A gradient with zeros for coordinates that are not trained."""

    def keep(gradient: Tensor) -> Tensor:
        mask = coordinate_mask.to(gradient.device).view(-1, *(1,) * (gradient.dim() - 1))
        return gradient * mask

    return keep
