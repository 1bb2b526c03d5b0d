"""Objectives of a family's training: the next token, by every choice of a step, and the largest choice's outputs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ....dsl.syntax.diagnostics import Fault
from ...core.journal import Journal
from ...models.rows.classifier import class_logits, refuse_labels_beyond_outputs
from ...models.rows.forward import evaluating, logits
from ..training.objective import Objective
from .choices import ChoiceSampler
from .norms import with_batch_statistics

no_classes = Fault("no-classes", "A model is to learn from images that have no classes.")


def refuse_unlabelled_images(rows: Tensor, data_name: str) -> None:
    """Reject (no-classes) images without classes: no token follows them."""
    if rows.is_floating_point():
        raise no_classes(
            f"`{data_name}` are images without classes, and nothing else is to be learned from them",
            help='name the tensor of classes, as in `images("digits.safetensors", classes: "labels")`',
            argument="data",
        ).rejection()


@dataclass(frozen=True)
class LargestOutputs:
    """Outputs of the largest choice for one batch, with the interface of a `OriginalOutputs`."""

    numbers: Sequence[int]
    values: Tensor  # [b, t, vocab]

    def logits(self, rows: slice, positions: slice) -> Tensor:
        return self.values[self.numbers.index(rows.start), positions].float()


@dataclass
class SubnetObjective:
    """objective   of the next token; its `original` is the largest choice's word for choices below it
    share       of the loss of smaller choices that is how far they are from the largest
    journal     of the losses of drawn choices, which the search's heuristics read; it survives a kill as training does

    Source: in-place distillation, Yu and Huang 2019 (arXiv 1903.05134), section 3.
    """

    objective: Any
    sampler: ChoiceSampler
    journal: Journal
    share: float = 0.0

    def accumulate_gradients(self, row_indices: Tensor, gradient_factor: float) -> float:
        """Mean loss over the step's choices; adds `gradient_factor` times its gradient to the parameters'."""
        choices, total = list(self.sampler.choices), 0.0
        teacher = self._largest_outputs(row_indices) if self.share else None
        largest = self.sampler.space.choice("largest")
        for number, choice in enumerate(choices):
            self.sampler.activate(choice)
            lesson = self.objective
            if teacher is not None and choice != largest:
                lesson = replace(lesson, original=teacher, share=self.share)
            loss = lesson.accumulate_gradients(row_indices, gradient_factor / len(choices))
            self.journal.get_or_compute(f"{self.sampler.step}:{number}:{int(row_indices[0])}", partial(float, loss))
            total += loss / len(choices)
        return total

    def mean_losses_of_sampled_choices(self, step_count: int) -> list[tuple[dict[str, int], float]]:
        """The choices of the first so many steps, each with the mean of its batches' losses."""
        by_step: dict[tuple[int, int], list[float]] = {}
        for key, loss in self.journal.known.items():
            step, number, _ = map(int, key.split(":"))
            by_step.setdefault((step, number), []).append(loss)
        result = []
        sampler = replace(self.sampler, on_choice=None, ranks={}, choices=[])  # what runs stays as it is
        for step in range(1, step_count + 1):
            sampler.draw_and_activate_first(step)
            for number, choice in enumerate(sampler.choices):
                values = by_step[step, number]
                result.append((choice, sum(values) / len(values)))
        return result

    def _largest_outputs(self, row_indices: Tensor) -> LargestOutputs:
        self.sampler.activate(self.sampler.space.choice("largest"))
        model = self.objective.model
        with evaluating(model), with_batch_statistics(model):  # running ones are of all choices, mixed
            return LargestOutputs(row_indices.tolist(), self.objective.predicted(row_indices))


@dataclass(frozen=True)
class ClassificationObjective:
    """Cross-entropy with a row's class, for models with a head over rows or images; the rest as `Objective`."""

    model: nn.Module
    rows: Tensor
    lengths: Tensor | None
    labels: Tensor
    name: str
    original: LargestOutputs | None = None
    share: float = 0.0

    def predicted(self, row_indices: Tensor) -> Tensor:
        lengths = None if self.lengths is None else self.lengths[row_indices]
        return class_logits(self.model, self.rows[row_indices], lengths)[:, None]  # [b, 1, classes]

    def accumulate_gradients(self, row_indices: Tensor, gradient_factor: float) -> float:
        logits = self.predicted(row_indices)[:, 0]
        refuse_labels_beyond_outputs(logits, self.labels[row_indices], self.name)
        loss = nn.functional.cross_entropy(logits.float(), self.labels[row_indices].to(logits.device))
        if self.original is not None:
            teacher = torch.cat([self.original.logits(slice(n, n + 1), slice(0, 1)) for n in row_indices.tolist()])
            q, p = logits.float().log_softmax(-1), teacher.log_softmax(-1)
            kl = nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
            loss = (1 - self.share) * loss + self.share * kl
        (loss * gradient_factor).backward()
        return loss.item()


@dataclass(frozen=True)
class Tokens(Objective):
    """The next token of every position, or of those that are `learned`."""

    def predicted(self, row_indices: Tensor) -> Tensor:
        return logits(self.model, self._rows_up_to_last_learned(row_indices))
