"""A model with a head over rows of tokens, or over images: logits of classes, padding left out."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ....dsl.syntax.diagnostics import Fault
from .forward import evaluating, logits_of_output
from .inputs import device_of
from .prompt_positions import prompts

other_classes = Fault("other-classes", "A model's head has other outputs than the data has classes.")

EACH = 32  # rows of a forward that is not learned from


def class_logits(model: nn.Module, rows: Tensor, row_lengths: Tensor | None, subspace: Tensor | None = None) -> Tensor:
    """Logits [b, classes] of rows [b, t] of which the first so many tokens count; of images [b, c, h, w], no lengths.

    Raises Reject (other-classes) where the model gives logits for positions.
    """
    if row_lengths is None:
        logits = logits_of_output(model(rows.to(device_of(model))))
    else:
        width = int(row_lengths.max())
        ids = rows[:, :width].to(device_of(model))
        mask = (torch.arange(width) < row_lengths[:, None]).long().to(ids.device)
        with prompts(model, subspace=subspace):
            logits = logits_of_output(model(input_ids=ids, attention_mask=mask))
    if logits.dim() != 2:
        raise other_classes(
            f"{type(model).__name__} has no head over whole rows", help="take a ...ForSequenceClassification"
        ).rejection()
    return logits


def refuse_labels_beyond_outputs(logits: Tensor, labels: Tensor, name: str) -> None:
    """Reject labels that the head has no output for."""
    if int(labels.max()) >= logits.shape[1]:
        raise other_classes(
            f"the head has {logits.shape[1]} outputs, and `{name}` has more classes",
            help="take the model with a head of as many",
        ).rejection()


class LossAndAccuracy(NamedTuple):
    loss: float
    accuracy: float


def classification_loss_and_accuracy(
    model: nn.Module, rows: Tensor, lengths: Tensor | None, labels: Tensor, name: str
) -> LossAndAccuracy:
    """Mean loss (nats of the right class) and accuracy of rows."""
    nats, right = classification_rows(model, rows, lengths, labels, name)
    return LossAndAccuracy(nats / len(rows), sum(right) / len(rows))


class ClassScores(NamedTuple):
    nats: float
    is_right: list[bool]


def classification_rows(
    model: nn.Module, rows: Tensor, lengths: Tensor | None, labels: Tensor, name: str
) -> ClassScores:
    """Nats of the right class over all rows, and whether the likeliest class of each is the right one."""
    nats, right = 0.0, []
    with evaluating(model):
        for part in torch.arange(len(rows)).split(EACH):
            logits = class_logits(model, rows[part], None if lengths is None else lengths[part]).float().cpu()
            refuse_labels_beyond_outputs(logits, labels[part], name)
            nats += nn.functional.cross_entropy(logits, labels[part], reduction="sum").item()
            right += (logits.argmax(1) == labels[part]).tolist()
    return ClassScores(nats, right)
