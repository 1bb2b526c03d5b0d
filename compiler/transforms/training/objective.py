"""Training objectives: the next token, or the original's class of a row, and distillation."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...evaluation.reference import OriginalOutputs, other_vocabulary
from ...models.rows.forward import are_token_logits, logits, slices_within_chunk_bytes
from ...models.rows.inputs import targets_and_prediction_mask


@dataclass(frozen=True)
class Objective:
    """(1 - share) * cross-entropy with the next token + share * t^2 * KL(original || model), softened by t.

    rows          [n, length] token ids; position p predicts p + 1, the first token of a row is given; rows that are
                  judged as a whole, as pictures are, have nothing to learn but what the original says
    original      what the original says of the same rows; needed where `share` is more than 0
    learned       [n, length] bool: which tokens are learned to be predicted, all where it is None
    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2: t^2 keeps the gradients' size as t grows.
    """

    model: nn.Module
    rows: Tensor
    original: OriginalOutputs | None = None
    share: float = 0.0
    temperature: float = 1.0
    learned: Tensor | None = None

    def accumulate_gradients(self, row_indices: Tensor, gradient_factor: float) -> float:
        """Mean loss over the rows of these numbers; adds `gradient_factor` times its gradient to the parameters'.

        The gradient of the logits is taken piece by piece, so that float32 copies of all of them never exist.
        """
        ids = self._rows_up_to_last_learned(row_indices)  # [b, t]
        values = logits(self.model, ids)  # [b, t, vocab]
        gradient = torch.zeros_like(values)
        targets, learned = self._targets_and_loss_mask(ids.to(values.device), values)
        if self.learned is not None:
            learned = self.learned[row_indices, 1 : ids.shape[1]].to(values.device)
        count, total = targets.numel() if learned is None else int(learned.sum()), 0.0
        for row, number in enumerate(row_indices.tolist()):
            for part in slices_within_chunk_bytes(values[row, : targets.shape[1]]):
                chunk = values.detach()[row, part].float().requires_grad_()  # [c, vocab]
                keep = None if learned is None else learned[row, part]
                loss = self._summed_loss(chunk, targets[row, part], number, part, keep)
                (slope,) = torch.autograd.grad(loss, chunk)
                gradient[row, part] = (slope * (gradient_factor / count)).to(gradient.dtype)
                total += loss.item()
        values.backward(gradient)
        return total / count

    def _targets_and_loss_mask(self, rows: Tensor, predicted_logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Targets of rows, [b, p], and the mask of those that count; a placeholder [b, 1] for pure distillation."""
        targets, learned = targets_and_prediction_mask(self.model, rows)
        if are_token_logits(self.model, predicted_logits, rows, targets):
            return targets, learned
        assert self.share == 1, "rows that are judged as a whole teach nothing by themselves"
        return targets.new_zeros(predicted_logits.shape[:2], dtype=torch.int64), None

    def _rows_up_to_last_learned(self, row_indices: Tensor) -> Tensor:
        """The chosen rows up to the last token that is learned in any: no earlier prediction reads what is behind."""
        if self.learned is None:
            return self.rows[row_indices]
        positions_used = torch.arange(self.rows.shape[1]) * self.learned[row_indices]
        return self.rows[row_indices, : int(positions_used.max()) + 1]

    def _summed_loss(
        self, logits: Tensor, targets: Tensor, row_index: int, positions: slice, loss_mask: Tensor | None
    ) -> Tensor:
        """Sum over some positions of one row, or over those of them to `loss_mask`, [c] bool."""
        student, selected_targets = (logits, targets) if loss_mask is None else (logits[loss_mask], targets[loss_mask])
        loss = (
            nn.functional.cross_entropy(student, selected_targets, reduction="sum")
            if self.share < 1
            else student.new_zeros(())
        )
        if not self.share:
            return loss
        assert self.original is not None, "there is nothing to distill from"
        teacher = self.original.logits(slice(row_index, row_index + 1), positions).to(logits.device)
        if teacher.shape != logits.shape:
            raise other_vocabulary(
                f"distillation compares {logits.shape[-1]} logits with the original's {teacher.shape[-1]}",
                help="heal without `distill`",
            ).rejection()
        q, p = (
            (x / self.temperature).log_softmax(-1)
            for x in (student, teacher if loss_mask is None else teacher[loss_mask])
        )
        kl = nn.functional.kl_div(q, p, reduction="sum", log_target=True)
        return (1 - self.share) * loss + self.share * self.temperature**2 * kl
