"""Numbers of tokens that came before: sequences that a model moves along.

An index has -1 where a text has not begun, and its numbers are zero; what lies `s` tokens back in every row of it is a
convolution with one tap. Behind a text's end an index has -2, and nothing may read that.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .layout import IrregularColumns
from .values import Rows

if TYPE_CHECKING:
    from .plan_builder import PlanBuilder


BEFORE, BEHIND = -1, -2


@dataclass(frozen=True)
class _Line:
    """Numbers of tokens [tokens, width] as they are in each token, and how far back a value takes each column."""

    base: Tensor
    back: Tensor  # [width]


def lower_token_shifts(builder: "PlanBuilder", index: Tensor) -> Tensor:
    """Element numbers without places before a text: numbers of tokens before are those of a step."""
    axis = _token_axis(builder, index)
    ordered = index.movedim(axis, 1)  # [batch, tokens, ...]
    line = _token_shift_columns(builder, ordered.flatten(2) if index.dim() > 2 else ordered[..., None])
    elements = line.base.clone()
    for back in line.back.unique().tolist():
        if back:
            columns = line.back == back
            elements[:, columns] = append_token_shift(builder, line.base[:, columns], back)
    return elements.view(ordered.shape).movedim(1, axis)


def _token_axis(builder: "PlanBuilder", index: Tensor) -> int:
    """The axis along which tokens follow each other."""
    batch, length = builder.shape
    for axis in range(1, index.dim()):
        if index.shape[axis] == length and index.shape[0] == batch:
            last = index.select(axis, length - 1).reshape(batch, -1)
            if bool((index.select(axis, 0) < 0).any()) and bool((last >= 0).all()):
                return axis
    raise IrregularColumns


def _token_shift_columns(builder: "PlanBuilder", index: Tensor) -> _Line:
    """Express an index [batch, tokens, width] as a shift by tokens; Scattered where its columns are no numbers of
    tokens before."""
    layout, (batch, length) = builder.plan.layout, builder.shape
    last = index[:, -1]
    register, token = layout.registers_and_tokens(last.reshape(-1))
    first, width = (torch.tensor(x)[register].view(last.shape) for x in (layout.first_elements, layout.widths))
    positions = torch.arange(batch)[:, None] * length + length - 1
    back = positions - token.view(last.shape)
    tokens = torch.arange(batch * length).view(batch, length, 1)
    base = first[:, None] + tokens * width[:, None] + ((last - first) % width)[:, None]
    expected = torch.where(torch.arange(length)[:, None] >= back[:, None], base - (back * width)[:, None], BEFORE)
    if bool((back < 0).any()) or not torch.equal(back, back[:1].expand_as(back)) or not torch.equal(expected, index):
        raise IrregularColumns
    return _Line(base.flatten(0, 1), back[0])


def append_token_shift(builder: "PlanBuilder", base: Tensor, distance: int) -> Tensor:
    """Element numbers [tokens, width] of what these were `distance` tokens before."""
    x, _ = builder.register(Rows(base))

    def convolve() -> int:
        taps = torch.zeros(distance + 1, base.shape[1])
        taps[0] = 1.0
        filters = builder.plan.add_vector(f"{builder.current.name}.back.{distance}.{x}", taps)
        return builder.plan.append_step("convolve", base.shape[1], x=x, filters=filters, bias=None, silu=False)

    return builder.plan.layout.rows(builder.remember(("shifted", x, distance), convolve))
