"""Rows that a client learns from, and what else is known of each: its prompt, what is learned, its class."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ....dsl.checker.values import DataRef

if TYPE_CHECKING:
    from ...plugin.context import Context


@dataclass(frozen=True)
class Rows:
    """
    ids      [n, length] int64
    prompts  [n] how many of a row's first tokens are its prompt; None where rows are no prompts with answers
    speech   [n, length] bool: which tokens are learned to be predicted; None for all
    labels   [n] the number of each row's class; None where rows have none
    """

    ids: Tensor
    prompts: Tensor | None = None
    speech: Tensor | None = None
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, row_indices: Sequence[int]) -> "Rows":
        """The rows of these indices, in their order."""
        at = torch.as_tensor(row_indices, dtype=torch.int64)
        columns: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        selected: dict[str, Any] = {name: None if value is None else value[at] for name, value in columns.items()}
        return Rows(**selected)


def rows_of(name: str, ctx: "Context") -> Rows:
    """Rows of a data set of a recipe."""
    ref = DataRef(name)
    speech = ctx.assistant_masks(ref)
    learned = ctx.loss_mask(ref) if speech is None else speech
    return Rows(ctx.rows(ref), ctx.prompts(ref), learned, ctx.labels(ref))


def concatenate_rows(batches: Sequence[Rows]) -> Rows:
    """Concatenate batches of rows; a column that one of them lacks is dropped."""
    columns: dict[str, Any] = {}
    for f in fields(Rows):
        values = [getattr(part, f.name) for part in batches]
        columns[f.name] = None if any(v is None for v in values) else torch.cat(values)
    return Rows(**columns)
