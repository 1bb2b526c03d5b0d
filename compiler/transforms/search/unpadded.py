"""Rows of data without what fills them up, for passes that look at what modules are given."""

from typing import TYPE_CHECKING

from torch import Tensor

from ....dsl.checker.values import DataRef

if TYPE_CHECKING:
    from ...plugin.context import Context


def unpadded_rows_by_length(ctx: "Context", data: DataRef, max_rows: int | None = None) -> list[Tensor]:
    """Rows of data; texts with classes, which are filled up behind, by length and without their padding."""
    rows = ctx.rows(data)[:max_rows]
    lengths = ctx.prompts(data) if ctx.labels(data) is not None else None
    if lengths is None:
        return [rows]
    lengths = lengths[:max_rows]
    return [rows[lengths == length, :length] for length in lengths.unique().tolist()]
