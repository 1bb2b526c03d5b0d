"""Numbers of tokens that came before: sequences that a model moves along, and convolutions in modules of torch.

An index has -1 where a text has not begun, and its numbers are zero; what lies `s` tokens back in every row of it is a
convolution with one tap. Behind a text's end an index has -2, and nothing may read that.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .layout import IrregularColumns
from .values import Rows

if TYPE_CHECKING:
    from .reader import Reader

BEFORE, BEHIND = -1, -2


@dataclass(frozen=True)
class _Line:
    """Numbers of tokens [tokens, width] as they are in each token, and how far back a value takes each column."""

    base: Tensor
    back: Tensor  # [width]


class ShiftRules:
    """The part of a `Reader` that knows what moves along a sequence."""

    def __init__(self, reader: "Reader"):
        self.reader = reader
        self._known: dict[tuple[int, int], int] = {}  # register, how far back -> register

    def lower_padding(self, x: Rows, pads: Any, mode: str = "constant", value: float | None = None) -> Rows | None:
        if mode != "constant" or value:
            return None
        return Rows(F.pad(self.reader.materialised(x).index, [*pads], value=BEFORE))

    def without_places_before(self, index: Tensor) -> Tensor:
        """Element numbers without places before a text: numbers of tokens before are those of a step."""
        axis = self._token_axis(index)
        ordered = index.movedim(axis, 1)  # [batch, tokens, ...]
        line = self._analyse(ordered.flatten(2) if index.dim() > 2 else ordered[..., None])
        elements = line.base.clone()
        for back in line.back.unique().tolist():
            if back:
                columns = line.back == back
                elements[:, columns] = self.shifted_back(line.base[:, columns], back)
        return elements.view(ordered.shape).movedim(1, axis)

    def _token_axis(self, index: Tensor) -> int:
        """The axis along which tokens follow each other."""
        batch, length = self.reader.shape
        for axis in range(1, index.dim()):
            if index.shape[axis] == length and index.shape[0] == batch:
                last = index.select(axis, length - 1).reshape(batch, -1)
                if bool((index.select(axis, 0) < 0).any()) and bool((last >= 0).all()):
                    return axis
        raise IrregularColumns

    def _analyse(self, index: Tensor) -> _Line:
        """Of an index [batch, tokens, width]; Scattered where its columns are no numbers of tokens before."""
        layout, (batch, length) = self.reader.plan.layout, self.reader.shape
        last = index[:, -1]
        register, token = layout.locate(last.reshape(-1))
        first, width = (torch.tensor(x)[register].view(last.shape) for x in (layout.starts, layout.widths))
        positions = torch.arange(batch)[:, None] * length + length - 1
        back = positions - token.view(last.shape)
        tokens = torch.arange(batch * length).view(batch, length, 1)
        base = first[:, None] + tokens * width[:, None] + ((last - first) % width)[:, None]
        expected = torch.where(torch.arange(length)[:, None] >= back[:, None], base - (back * width)[:, None], BEFORE)
        if (
            bool((back < 0).any())
            or not torch.equal(back, back[:1].expand_as(back))
            or not torch.equal(expected, index)
        ):
            raise IrregularColumns
        return _Line(base.flatten(0, 1), back[0])

    def shifted_back(self, base: Tensor, back: int) -> Tensor:
        """Element numbers [tokens, width] of what these were `back` tokens before."""
        reader = self.reader
        x, _ = reader.register(Rows(base))
        if (x, back) not in self._known:
            taps = torch.zeros(back + 1, base.shape[1])
            taps[0] = 1.0
            filters = reader.plan.vector_entry(f"{reader.current.name}.back.{back}.{x}", taps)
            self._known[x, back] = reader.plan.append_step(
                "convolve", base.shape[1], x=x, filters=filters, bias=None, silu=False
            )
        return reader.plan.layout.rows(self._known[x, back])

    # -- convolutions in modules -----------------------------------------------------------------------------

    def lower_depthwise_convolution(self, node: fx.Node, module: nn.Conv1d, x_in: Rows) -> Rows:
        """Depthwise convolution along the sequence of [batch, channels, places]."""
        reader, (size,), weight = self.reader, module.kernel_size, module.weight.detach().float()
        plain = (module.stride, module.dilation, module.padding_mode) == ((1,), (1,), "zeros")
        is_depthwise = module.groups == module.in_channels == module.out_channels
        if not plain or not is_depthwise or not isinstance(module.padding, tuple) or x_in.index.dim() != 3:
            raise reader.rejection(node, "a convolution of another form than one filter for each channel")
        pad, length = module.padding[0], reader.shape[1]
        index = F.pad(reader.without_pending(x_in).index, (pad, pad), value=BEFORE)
        ahead = int((index[0, 0] < 0).long().cumprod(0).sum())  # places before the first token
        inside = index[..., ahead : ahead + length]
        # Each place of the result is that of the newest number in its sum: the first is the first token's.
        if (
            ahead != size - 1
            or inside.shape[-1] != length
            or bool((inside < 0).any())
            or (index[..., :ahead] >= 0).any()
        ):
            raise IrregularColumns
        x = Rows(inside.mT)  # [batch, tokens, channels]
        register, lane = reader.register(x)
        filters = reader.plan.vector_entry(f"{node.target}.filters", weight[:, 0].mT)
        bias = None if module.bias is None else reader.plan.vector_entry(f"{node.target}.bias", module.bias)
        fields = {"filters": filters, "bias": bias, "silu": False}
        output = reader.elementwise("convolve", x.index.shape, lane, x=register, **fields)
        return Rows(F.pad(output.index.mT, (0, index.shape[-1] - size + 1 - length), value=BEHIND))
