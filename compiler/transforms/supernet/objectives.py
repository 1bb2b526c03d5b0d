"""What a family is trained towards: the next token, by every choice of a step, and what the largest says of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ....dsl.syntax.diagnostics import Fault, Reject
from ...core.journal import Journal
from ...models.rows.classifier import check_classes, class_logits
from ...models.rows.forward import evaluating, logits
from ..training.objective import Objective
from .choices import Drawn

no_classes = Fault("no-classes", "A model is to learn from images that have no classes.")


def refuse_wordless(rows: Tensor, name: str) -> None:
    """Reject (no-classes) images without classes: no token follows them."""
    if rows.is_floating_point():
        raise Reject(
            no_classes(
                f"`{name}` are images without classes, and nothing else is to be learned from them",
                help='name the tensor of classes, as in `images("digits.safetensors", classes: "labels")`',
                argument="data",
            )
        )


@dataclass(frozen=True)
class LargestOutputs:
    """What the largest choice says of the rows of one batch; read as a `Reference` is, by the rows' numbers."""

    numbers: Sequence[int]
    values: Tensor  # [b, t, vocab]

    def logits(self, rows: slice, part: slice) -> Tensor:
        return self.values[self.numbers.index(rows.start), part].float()


@dataclass
class Lesson:
    """objective   of the next token; its `original` is the largest choice's word for choices below it
    share       of the loss of smaller choices that is how far they are from the largest
    journal     of the losses of drawn choices, which the search's heuristics read; it survives a kill as training does

    Source: in-place distillation, Yu and Huang 2019 (arXiv 1903.05134), section 3.
    """

    objective: Any
    drawn: Drawn
    journal: Journal
    share: float = 0.0

    def learn(self, chosen: Tensor, weight: float) -> float:
        """Mean loss over the step's choices; adds `weight` times its gradient to the parameters'."""
        choices, total = list(self.drawn.choices), 0.0
        said = self._largest(chosen) if self.share else None
        largest = self.drawn.space.choice("largest")
        for number, choice in enumerate(choices):
            self.drawn.take(choice)
            lesson = self.objective
            if said is not None and choice != largest:
                lesson = replace(lesson, original=said, share=self.share)
            loss = lesson.learn(chosen, weight / len(choices))
            self.journal.remember(f"{self.drawn.step}:{number}:{int(chosen[0])}", partial(float, loss))
            total += loss / len(choices)
        return total

    def losses(self, steps: int) -> list[tuple[dict[str, int], float]]:
        """The choices of the first so many steps, each with the mean of its batches' losses."""
        heard: dict[tuple[int, int], list[float]] = {}
        for key, loss in self.journal.known.items():
            step, number, _ = map(int, key.split(":"))
            heard.setdefault((step, number), []).append(loss)
        found = []
        drawn = replace(self.drawn, tell=None, ranks={}, choices=[])  # what runs stays as it is
        for step in range(1, steps + 1):
            drawn.begin(step)
            for number, choice in enumerate(drawn.choices):
                values = heard[step, number]
                found.append((choice, sum(values) / len(values)))
        return found

    def _largest(self, chosen: Tensor) -> LargestOutputs:
        self.drawn.take(self.drawn.space.choice("largest"))
        model = self.objective.model
        with evaluating(model):
            return LargestOutputs(chosen.tolist(), self.objective.predicted(chosen))


@dataclass(frozen=True)
class Classes:
    """Cross-entropy with a row's class, for models with a head over rows or images; the rest as `Objective`."""

    model: nn.Module
    rows: Tensor
    lengths: Tensor | None
    labels: Tensor
    name: str
    original: LargestOutputs | None = None
    share: float = 0.0

    def predicted(self, chosen: Tensor) -> Tensor:
        lengths = None if self.lengths is None else self.lengths[chosen]
        return class_logits(self.model, self.rows[chosen], lengths)[:, None]  # [b, 1, classes]

    def learn(self, chosen: Tensor, weight: float) -> float:
        found = self.predicted(chosen)[:, 0]
        check_classes(found, self.labels[chosen], self.name)
        loss = nn.functional.cross_entropy(found.float(), self.labels[chosen].to(found.device))
        if self.original is not None:
            theirs = torch.cat([self.original.logits(slice(n, n + 1), slice(0, 1)) for n in chosen.tolist()])
            q, p = found.float().log_softmax(-1), theirs.log_softmax(-1)
            apart = nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
            loss = (1 - self.share) * loss + self.share * apart
        (loss * weight).backward()
        return loss.item()


@dataclass(frozen=True)
class Tokens(Objective):
    """The next token of every position, or of those that are `learned`."""

    def predicted(self, chosen: Tensor) -> Tensor:
        return logits(self.model, self._needed(chosen))
