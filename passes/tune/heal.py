"""Train a pruned model to win back quality that pruning cost."""

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
from torch import nn

from ...compiler.analysis.discovery.discover import skeleton_of
from ...compiler.analysis.planning import shrink
from ...compiler.analysis.planning.selection import linear_parts
from ...compiler.evaluation import reference, similarity
from ...compiler.inputs.data.chat import no_speakers
from ...compiler.ir.outcome import Model, Outcome
from ...compiler.ir.program import Program
from ...compiler.models.rows.encoder_states import resolve_pooling_name
from ...compiler.models.rows.forward import output_kind_of, total_nll
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Effort, Lossy, param
from ...compiler.transforms.training.acceptance import no_gain_diagnostic, refuse_validation_on_training_rows
from ...compiler.transforms.training.adapters import AdapterShape, require_adaptable_modules, with_adapters
from ...compiler.transforms.training.effort import adapter_param_count, estimate_run_effort, param_count_of_parts
from ...compiler.transforms.training.loop import TrainingState
from ...compiler.transforms.training.masks import nonzero_masks
from ...compiler.transforms.training.objective import Objective
from ...compiler.transforms.training.schedule import seed_of
from ...compiler.transforms.training.trained_pass import Learner
from ...compiler.transforms.training.training_run import run_training
from ...compiler.transforms.training.unmerged import UnmergedAdapters
from ...dsl.checker.rules import Conflict, Problem
from ...dsl.checker.skeleton import Skeleton
from ...dsl.checker.values import DataRef, Ratio, Selector


class Heal(Learner):
    """Train a pruned model to win back quality that pruning cost.

    The model learns to predict the next token of every position of `data`, in rows of `pairs` the answers alone, or
    with `learn: responses` what assistants say in the conversations of `chat`. With `distill`, a share of the loss is
    how far the model's predictions are from the original's on the same rows.

    A model that judges rows as a whole, as those of pictures do, learns what the original says of each.

    A model without a head, as a sentence embedder is, learns the original's hidden states instead: of every token
    that is no padding, and the vector of each row (see `similarity`); `held_out` is judged by the same.

    `method: lora` trains adapters of low rank on linear modules and merges them: names, shapes and ties are
    then as before. `method: full` trains all parameters, or the selected modules'; it holds their gradients
    and two moments as well, three times their bytes.

    Zeros stay zero: where at least 1% of a weight matrix is exactly zero, as `sparsify.*` leaves it, only the
    others are trained, and an adapter gives nothing where the weight is zero, beside it and merged. `zeros:
    fill` trains all. Adapters that are given apart leave the weights beneath as they are, zeros and all.

    With `held_out`, the loss there is measured every so many steps, the best weights are kept, and the run
    ends once nothing has got better for a while; a run that never gets better than its start is refused.
    Without it, the last weights are kept, whatever they are worth. The loss curve stands in the manifest.

    On little text, distill: full training alone learned 139 KB by heart and left a model that had lost three
    branches worse than it was, with `distill: 50%` it gave back 38 % of what was lost (bench/heal.py).

    Source: LoRA (Hu et al. 2021, arXiv 2106.09685), on zeros SparsePEFT (Munoz et al. 2024, arXiv 2410.03750);
    distillation (Hinton et al. 2015, arXiv 1503.02531);
    defaults of the recovery of MultiPruner (Munoz et al. 2025, arXiv 2501.09949), with a shorter run.
    Example: fit = tune.heal(data: calib, held_out: dev, steps: 400, distill: 50%)
    """

    keeps = Lossy()
    acts_on = "linear"
    everywhere = True
    changes = ("weights", "values")
    determinism = "seeded"
    disjoint = {"held_out": "data"}
    results = ("model", "adapters")
    extra: ClassVar[str] = "tune"
    requires: ClassVar[tuple[str, ...]] = ("peft",)

    data: DataRef = param("Rows to learn from.")
    learn: Literal["all", "responses"] = param(
        "Every token, of `pairs` the answers; or what assistants say.", default="all"
    )
    lr: float = param("Largest learning rate of AdamW.", default=1e-4, gt=0)
    method: Literal["lora", "full"] = param("Train adapters and merge them, or the weights themselves.", default="lora")
    merge: bool = param("Add the adapters to the weights; false gives them apart, for the target `peft`.", default=True)
    on: Selector | None = param(
        "Linear modules to train; all inside the layers, and with `full` all that the model has, where it is left out.",
        default=None,
    )
    rank: int = param("Rank of the adapters.", default=16, ge=1)
    alpha: float = param("What the adapters' product is multiplied with, divided by the rank.", default=32.0, gt=0)
    dropout: float = param("Probability that an input of an adapter is dropped.", default=0.05, ge=0, lt=1)
    zeros: Literal["keep", "fill"] = param("Whether zeros of sparse matrices stay zero.", default="keep")
    distill: Ratio = param("Share of the loss that the original's predictions make up.", default=Ratio(0.0), ge=0, le=1)
    temperature: float = param("What both predictions are softened by before they are compared.", default=1.0, gt=0)
    weight_decay: float = param("AdamW's decay of what is trained.", default=0.0, ge=0)

    def problems(self) -> Iterator[Problem]:
        if self.method == "full" and not self.merge:
            yield Conflict(
                ("method", "merge"), "`method: full` leaves no adapters apart from the model", "write `method: lora`"
            )

    def result_kind(self) -> str:
        return "model" if self.merge else "adapters"

    def result_of(self, outcome: Outcome, ctx: Context) -> Outcome:
        if self.merge:
            return super().result_of(outcome, ctx)
        refuse_validation_on_training_rows(self.data, self.held_out, ctx)
        assert isinstance(outcome, Model), f"healed: {outcome.kind}"
        program, shape = outcome.program, AdapterShape(self.rank, self.alpha, self.dropout)
        paths = require_adaptable_modules(program, self.on, "method: full")
        with with_adapters(program.model, paths, shape, seed_of("adapters", ctx.seed), zeros="fill") as adapters:
            weights = adapters.parameters()
            course = self._train_and_restore_best(program, ctx, weights)
            tensors = {name: p.detach().clone() for name, p in weights.items()}
        self._note_training(program, course, weights, merged_loss=None)
        return UnmergedAdapters(program, None, shape, tensors)

    def run(self, program: Program, ctx: Context) -> None:
        refuse_validation_on_training_rows(self.data, self.held_out, ctx)
        if self.method == "full":
            weights = self._trainable_weights(program)
            course = self._train_and_restore_best(
                program, ctx, weights, nonzero_masks(weights) if self.zeros == "keep" else {}
            )
        else:
            shape = AdapterShape(self.rank, self.alpha, self.dropout)
            paths, seed = require_adaptable_modules(program, self.on, "method: full"), seed_of("adapters", ctx.seed)
            with with_adapters(program.model, paths, shape, seed, zeros=self.zeros) as adapters:
                weights = adapters.parameters()
                course = self._train_and_restore_best(program, ctx, weights)
                adapters.merge_into_weights()
        merged = (
            self._measure_merged_or_reject(program, ctx, course) if self.held_out and self.method == "lora" else None
        )
        program.changed()
        self._note_training(program, course, weights, merged)

    def _note_training(
        self,
        program: Program,
        training_state: TrainingState,
        weights: dict[str, nn.Parameter],
        merged_loss: float | None,
    ) -> None:
        program.note(
            method=self.method,
            trained=sum(p.numel() for p in weights.values()),
            steps=training_state.step,
            best=training_state.best,
            loss=training_state.curve,
            held_out=training_state.held_out,
            merged=merged_loss,
        )

    def originals(self) -> tuple[DataRef, ...]:
        return (self.data,) if self.distill.value else ()

    def required_modules(self) -> tuple[str, ...]:
        return self.requires if self.method == "lora" else ()

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        chosen = linear_parts(skeleton, self.on)
        if self.method == "lora":
            trained = adapter_param_count(chosen, self.rank)
        else:
            trained = param_count_of_parts(chosen) if self.on else shrink.param_count(skeleton)
        narrow = self.method == "full" and skeleton.facts.get("dtype") in ("bfloat16", "float16")
        return estimate_run_effort(
            self, self.data, skeleton, ctx, trained, extra_evaluations=2, has_master_weights=narrow
        )

    def _train_and_restore_best(
        self,
        program: Program,
        ctx: Context,
        weights: dict[str, nn.Parameter],
        weight_masks: Mapping[str, torch.Tensor] | None = None,
    ) -> TrainingState:
        """Train, and leave the best weights in place; raises Reject where the start was the best."""
        model, rows = program.model, ctx.rows(self.data)
        output_kind = output_kind_of(model, rows[:1])
        if output_kind == "states":
            return self._train_towards_hidden_states(program, ctx, weights, weight_masks)
        loss_mask = None if output_kind == "classes" else self._loss_mask_or_none(self.data, ctx)
        share = self.distill.value if output_kind == "tokens" else 1.0
        original = reference.load_or_make_reference(ctx, self.data) if share else None
        lesson = Objective(model, rows, original, share, self.temperature, loss_mask)
        teaching = torch.arange(len(rows)) if loss_mask is None else loss_mask[:, 1:].any(1).nonzero()[:, 0]
        return run_training(
            self,
            program,
            ctx,
            weights,
            len(teaching),
            lambda chosen, weight: lesson.accumulate_gradients(teaching[chosen], weight),
            lambda: self._validation_loss(model, ctx),
            trainable_masks=weight_masks,
            weight_decay=self.weight_decay,
            run_label="healing",
        )

    def _train_towards_hidden_states(
        self,
        program: Program,
        ctx: Context,
        weights: dict[str, nn.Parameter],
        weight_masks: Mapping[str, torch.Tensor] | None,
    ) -> TrainingState:
        """Training towards the original's hidden states, the only outputs of a model without a head."""
        model, rows = program.model, ctx.rows(self.data)
        original, pooling = (
            similarity.load_or_make_states(ctx, self.data),
            resolve_pooling_name(ctx.origin.folder, "auto"),
        )
        return run_training(
            self,
            program,
            ctx,
            weights,
            len(rows),
            lambda chosen, weight: similarity.accumulate_hidden_state_gradient(
                model, rows, original, pooling, chosen, weight
            ),
            lambda: self._validation_loss(model, ctx),
            trainable_masks=weight_masks,
            weight_decay=self.weight_decay,
            run_label="healing",
        )

    def _measure_merged_or_reject(self, program: Program, ctx: Context, training_state: TrainingState) -> float:
        """Measured with adapters beside the weights, and now again with their sum, which is rounded."""
        start, merged = training_state.held_out[0][1], self._validation_loss(program.model, ctx)
        if not merged < start:
            raise no_gain_diagnostic(start, [(training_state.best, merged)]).rejection()
        return merged

    def _validation_loss(self, model: nn.Module, ctx: Context) -> float:
        assert self.held_out is not None, "judged by no rows"
        rows = ctx.rows(self.held_out)
        output_kind = output_kind_of(model, rows[:1])
        if output_kind == "classes":
            return reference.mean_kl_divergence(
                model, rows, reference.load_or_make_reference(ctx, self.held_out), "divergence", self.held_out.name
            )
        if output_kind == "states":
            original_states, pooling = (
                similarity.load_or_make_states(ctx, self.held_out),
                resolve_pooling_name(ctx.origin.folder, "auto"),
            )
            return similarity.mean_hidden_state_loss(model, rows, original_states, pooling)
        nats, tokens = total_nll(model, rows, self._loss_mask_or_none(self.held_out, ctx))
        return nats / tokens

    def _loss_mask_or_none(self, data_ref: DataRef, ctx: Context) -> torch.Tensor | None:
        """Mask of the tokens that count: None for all."""
        if self.learn == "all":
            return ctx.loss_mask(data_ref)
        loss_mask = ctx.assistant_masks(data_ref)
        if loss_mask is None or not loss_mask[:, 1:].any():
            who = "has rows without a speaker" if loss_mask is None else "holds rows in which no assistant speaks"
            raise no_speakers(
                f"`{data_ref.name}` {who}, and only responses are to be learned",
                help="give rows of `chat`, or `learn: all`",
            ).rejection()
        return loss_mask

    def _trainable_weights(self, program: Program) -> dict[str, nn.Parameter]:
        """All parameters, or those of the selected modules; one that is shared, once."""
        model = program.model
        if self.on is None:
            return dict(model.named_parameters())
        named = {
            f"{part.path}.{name}": p
            for part in linear_parts(skeleton_of(program), self.on)
            for name, p in model.get_submodule(part.path).named_parameters()
        }
        name_of = {id(p): name for name, p in reversed(named.items())}
        return {name: p for name, p in named.items() if name_of[id(p)] == name}
