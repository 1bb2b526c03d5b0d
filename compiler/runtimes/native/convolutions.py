"""Depthwise convolutions along a sequence: functions of mixers, modules of torch, and the zeros around them."""

from types import NotImplementedType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from transformers.activations import ACT2FN

from . import shifting
from .layout import IrregularColumns
from .plan_builder import PlanBuilder
from .rule import NodeCall
from .values import ElementwiseExpr, Rows

_SILU = ("silu", "swish")


def lower_convolution(builder: PlanBuilder, call: NodeCall) -> Rows:
    if call.name == "causal_conv":
        _, x, weight, bias, activation, _ = call.args
        return _lower_convolution(builder, call.node, x, weight, bias, activation)
    return _lower_convolution(builder, call.node, *call.args, **call.kwargs)


def _lower_convolution(
    builder: PlanBuilder, node: fx.Node, x: Any, weight: Any, bias: Any = None, activation: str | None = None, **_: Any
) -> Rows:
    plain = isinstance(x, Rows) and x.index.dim() == 3 and isinstance(weight, Tensor) and weight.dim() == 2
    if not plain or weight.shape[0] != x.index.shape[1]:
        raise builder.rejection(node, "a convolution of another form than one filter for each channel")
    plan, (register, lane) = builder.plan, builder.register(x)
    filters = plan.add_vector(f"{node.name}.filters", weight.mT)
    shift = None if bias is None else plan.add_vector(f"{node.name}.bias", bias)
    silu = activation in _SILU
    rows_out = builder.elementwise("convolve", x.index.shape, lane, x=register, filters=filters, bias=shift, silu=silu)
    return (
        rows_out if silu or activation is None else Rows(rows_out.index, ElementwiseExpr(ACT2FN[activation], (None,)))
    )


def lower_zero_pad(builder: PlanBuilder, call: NodeCall) -> Rows | NotImplementedType:
    """Zeros around a value, by a function or a module."""
    if not isinstance(call.first, Rows):
        return NotImplemented
    if isinstance(call.module, nn.ZeroPad2d):
        return _padded_with_zeros(builder, call.first, call.module.padding)
    return _padded_with_zeros(builder, *call.args, **call.kwargs)


def _padded_with_zeros(
    builder: PlanBuilder, x: Rows, pads: Any, mode: str = "constant", value: float | None = None
) -> Rows | NotImplementedType:
    if mode != "constant" or value:
        return NotImplemented
    return Rows(F.pad(builder.materialised(x).index, [*pads], value=shifting.BEFORE))


def lower_if_depthwise_convolution(builder: PlanBuilder, call: NodeCall) -> Rows | NotImplementedType:
    """Depthwise convolution along the sequence of [batch, channels, tokens]."""
    node, module, x_in = call.node, call.module, call.first
    if not isinstance(module, nn.Conv1d) or not isinstance(x_in, Rows) or len(call.args) > 1 or call.kwargs:
        return NotImplemented
    (size,), weight = module.kernel_size, module.weight.detach().float()
    plain = (module.stride, module.dilation, module.padding_mode) == ((1,), (1,), "zeros")
    is_depthwise = module.groups == module.in_channels == module.out_channels
    if not plain or not is_depthwise or not isinstance(module.padding, tuple) or x_in.index.dim() != 3:
        raise builder.rejection(node, "a convolution of another form than one filter for each channel")
    pad, length = module.padding[0], builder.shape[1]
    index = F.pad(builder.without_pending(x_in).index, (pad, pad), value=shifting.BEFORE)
    ahead = int((index[0, 0] < 0).long().cumprod(0).sum())  # places before the first token
    inside = index[..., ahead : ahead + length]
    # Each place of the result is that of the newest number in its sum: the first is the first token's.
    if ahead != size - 1 or inside.shape[-1] != length or bool((inside < 0).any()) or (index[..., :ahead] >= 0).any():
        raise IrregularColumns
    x = Rows(inside.mT)  # [batch, tokens, channels]
    register, lane = builder.register(x)
    filters = builder.plan.add_vector(f"{node.target}.filters", weight[:, 0].mT)
    bias = None if module.bias is None else builder.plan.add_vector(f"{node.target}.bias", module.bias)
    fields = {"filters": filters, "bias": bias, "silu": False}
    output = builder.elementwise("convolve", x.index.shape, lane, x=register, **fields)
    return Rows(F.pad(output.index.mT, (0, index.shape[-1] - size + 1 - length), value=shifting.BEHIND))
