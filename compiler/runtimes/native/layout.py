"""Layout of a value: a tensor of element numbers, in the value's shape.

A register is rows [tokens, width]. Element `first[r] + token * width + column` names one number of register r
for one token of a sample batch. Whatever a program does to shapes (view, transpose, chunk, cat, ...) is done to
these numbers by torch itself, so no shape logic is repeated here; at the end they say which columns of which
registers a step reads.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class IrregularColumns(Exception):
    """A value whose numbers are not the same columns for every token."""


@dataclass(frozen=True)
class RowLayout:
    """A value as rows: the same columns for every token.

    columns   [width] element numbers of the first token, in the order in which the value holds them
    order     [elements] flat positions of the value, token by token
    """

    columns: Tensor
    order: Tensor


class RegisterColumn(NamedTuple):
    register: int
    column: int


class Layout:
    """Registers of a sample batch of `tokens` tokens."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.widths: list[int] = []
        self._first = [0]

    def register(self, width: int) -> int:
        self.widths.append(width)
        self._first.append(self._first[-1] + self.tokens * width)
        return len(self.widths) - 1

    def rows(self, register: int) -> Tensor:
        """Element numbers [tokens, width] of a whole register."""
        width, first = self.widths[register], self._first[register]
        return torch.arange(first, first + self.tokens * width).view(self.tokens, width)

    @property
    def first_elements(self) -> list[int]:
        """The first element of each register."""
        return self._first[:-1]

    def columns(self, register: int) -> Tensor:
        return self.rows(register)[0]

    def register_column_of_element(self, element: int) -> RegisterColumn:
        """Register and column of an element of the first token."""
        register = bisect_right(self._first, element) - 1
        return RegisterColumn(register, element - self._first[register])

    def registers_and_tokens(self, elements: Tensor) -> tuple[Tensor, Tensor]:
        """Register and token of every element."""
        first = torch.tensor(self._first)
        register = torch.searchsorted(first, elements.contiguous(), right=True) - 1
        width = torch.tensor([*self.widths, 1])[register]
        return register, torch.div(elements - first[register], width, rounding_mode="floor")

    def as_row_layout(self, index: Tensor) -> RowLayout:
        """A value as rows. Raises IrregularColumns where tokens hold different columns, or other tokens' numbers."""
        flat = index.reshape(-1)
        if flat.numel() % self.tokens:
            raise IrregularColumns
        register, column = self.register_column_of_element(int(flat[0]))
        if column == 0 and torch.equal(flat, self.rows(register).reshape(-1)):
            return RowLayout(self.columns(register), torch.arange(flat.numel()))  # a whole register, as most are
        registers, token = self.registers_and_tokens(flat)
        order = torch.sort(token, stable=True).indices
        elements = flat[order].view(self.tokens, -1)  # [tokens, width]
        widths = torch.tensor(self.widths)[registers[order]].view(self.tokens, -1)[0]
        expected = elements[0] + torch.arange(self.tokens)[:, None] * widths
        if not torch.equal(expected, elements):
            raise IrregularColumns
        return RowLayout(elements[0], order)

    def index_of_ordered_rows(self, register: int, order: Tensor, shape: torch.Size) -> Tensor:
        """The index of a value whose rows, read in `order`, are a whole register."""
        index = torch.empty(order.shape, dtype=torch.int64)
        index[order] = self.rows(register).reshape(-1)
        return index.view(shape)


@dataclass(frozen=True)
class ColumnRun:
    """`count` blocks of `block` columns of one register, `stride` apart."""

    register: int
    start: int
    block: int
    stride: int
    count: int


def split_into_column_runs(layout: Layout, columns: Tensor) -> list[ColumnRun]:
    """Columns as few regular runs, in order."""
    pieces: list[list[int]] = []  # [register, start, length]
    for element in columns.tolist():
        register, column = layout.register_column_of_element(element)
        if pieces and pieces[-1][0] == register and pieces[-1][1] + pieces[-1][2] == column:
            pieces[-1][2] += 1
        else:
            pieces.append([register, column, 1])
    result: list[ColumnRun] = []
    for register, start, length in pieces:
        last = result[-1] if result else None
        if last and (last.register, last.block) == (register, length):
            stride = start - last.start if last.count == 1 else last.stride
            if start == last.start + last.count * stride and stride >= 0:
                result[-1] = ColumnRun(register, last.start, length, stride, last.count + 1)
                continue
        result.append(ColumnRun(register, start, length, length, 1))
    return result
