"""Parameters that functions read directly: matrices outside of modules, and experts packed into one tensor.

Each number of an activation has one label; a number of such a parameter has one along every axis. A product reads the
labels of the axis that it contracts and hands on those of the other one; a sum couples those that lie along the same
axis as the channels that it meets.
"""

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import image_rules
from .labelling import MOVES, NO_LABEL, POINTWISE, Weight, tensors_in

if TYPE_CHECKING:
    from .labels import NodeRules

_SAME = frozenset(("to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "detach"))
_TURNED = frozenset(("T", "mT", "H", "mH", "data"))  # properties that are the parameter itself
_PRODUCTS = frozenset(("matmul", "bmm", "mm", "linear"))


def label_weight(rules: "NodeRules", parameter: Tensor) -> Weight:
    """Fresh labels along each axis; claimed once a product or a sum reads them."""
    rows = tuple(rules.out.new_labels(size) for size in parameter.shape)
    axes = (
        labels.view(-1, *(1 for _ in parameter.shape[axis + 1 :])).expand(parameter.shape)
        for axis, labels in enumerate(rows)
    )
    return Weight(rules.path, rows, tuple(axes))


def weights_in(tree: Any) -> list[Weight]:
    if isinstance(tree, Weight):
        return [tree]
    if isinstance(tree, dict):
        return weights_in(tuple(tree.values()))
    return [weight for item in tree for weight in weights_in(item)] if isinstance(tree, (tuple, list)) else []


def label_function_of_weight(rules: "NodeRules", name: str) -> Any:
    """A function that is given such a parameter."""
    parameters = weights_in((rules.args, rules.kwargs))
    if name == "getattr" and rules.args[1] in _TURNED:
        return label_weight_view(rules, parameters[0])
    if name == "getattr" or name in ("size", "dim", "numel"):
        return (
            getattr(parameters[0].axes[0], rules.args[1])
            if name == "getattr"
            else getattr(parameters[0].axes[0], name)(*rules.args[1:])
        )
    if len(parameters) == 1 and rules.args[0] is parameters[0]:
        if name in _SAME:
            return parameters[0]
        if name in MOVES:
            return label_weight_view(rules, parameters[0])
    if len(parameters) == 1 and name in _PRODUCTS:
        return label_product(rules, name)
    if name in POINTWISE:
        return label_and_couple_elementwise(rules, parameters)
    if name in ("cat", "concat", "concatenate"):
        return label_concatenation(rules)
    return block_pruning_of_parameters(rules, parameters, name)


def label_weight_view(rules: "NodeRules", w: Weight) -> Any:
    """A view, transposition or choice of a parameter, done along all of its axes' labels."""
    target = rules.node.target
    if target is operator.getitem and selects_by_tensor(rules.args[1]):
        parts = [couple_indexed_axes(rules, axis, rules.args[1]) for axis in w.axes]
    elif rules.node.op == "call_method":
        parts = [getattr(axis, str(target))(*rules.args[1:], **rules.kwargs) for axis in w.axes]
    else:
        assert not isinstance(target, str), f"{target} is no function"
        parts = [target(axis, *rules.args[1:], **rules.kwargs) for axis in w.axes]
    if isinstance(parts[0], Tensor):
        return w.with_axes(parts)
    return tuple(w.with_axes(axes) for axes in zip(*parts, strict=True))  # chunk, split, unbind


def selects_by_tensor(index: Any) -> bool:
    """Whether an index chooses by numbers in a tensor."""
    return isinstance(index, Tensor) or (isinstance(index, tuple) and any(isinstance(i, Tensor) for i in index))


def couple_indexed_axes(rules: "NodeRules", x: Tensor, index: Any) -> Tensor:
    """Any position along the axes that are chosen from: the first stands for all."""
    parts = index if isinstance(index, tuple) else (index,)
    for axis, part in enumerate(parts):
        if isinstance(part, Tensor) and x.ndim > axis:
            rules.out.couple_along(x, axis)
    return x[tuple(torch.zeros_like(p) if isinstance(p, Tensor) else p for p in parts)]


def label_product(rules: "NodeRules", name: str) -> Tensor:
    """x @ w, w @ x, or a linear layer's function."""
    left, right, *further = [*rules.args, *rules.kwargs.values()]
    if name == "linear":
        result = label_contraction(rules, left, transpose_weight(right))
        bias = further[0] if further else None
        return result if bias is None else rules.label_pointwise([result, bias])
    if isinstance(right, Weight):
        return label_contraction(rules, left, right)
    return label_contraction(rules, right.transpose(-1, -2), transpose_weight(left)).transpose(-1, -2)


def transpose_weight(w: Weight) -> Weight:
    return w.with_axes([axis.transpose(-1, -2) for axis in w.axes])


def label_contraction(rules: "NodeRules", x: Tensor, w: Weight) -> Tensor:
    """x [..., n, k] @ w [..., k, m] -> [..., n, m]"""
    result = torch.full((), NO_LABEL, dtype=torch.int64)
    rows = x.unsqueeze(-2) if x.ndim == 1 else x
    for axis, labels in enumerate(w.axes):
        inner, outer = labels_differ_along(labels, -2), labels_differ_along(labels, -1)
        if inner and outer:
            raise ValueError("one axis of a parameter lies along two")
        if inner:
            claim_weight_axis(rules, w, axis, is_read=True)
            rules.out.couple(rows, labels.amax(-1).unsqueeze(-2))
        elif outer:
            claim_weight_axis(rules, w, axis)
            result = labels.amax(-2, keepdim=True)
    shape = torch.broadcast_shapes(rows.shape[:-2], w.axes[0].shape[:-2])
    expanded = result.expand(*shape, rows.shape[-2], w.axes[0].shape[-1])
    return expanded.squeeze(-2) if x.ndim == 1 else expanded


def label_and_couple_elementwise(rules: "NodeRules", parameters: list[Weight]) -> Tensor | Weight:
    """A sum or a product place by place."""
    activations = list(tensors_in((rules.args, rules.kwargs)))
    if not activations:
        return block_pruning_of_parameters(rules, parameters, "arithmetic")
    x = rules.label_pointwise(activations)
    if len(parameters) == 1 and not (x > NO_LABEL).any():  # a mask and the like: the parameter goes on
        shape = torch.broadcast_shapes(x.shape, parameters[0].axes[0].shape)
        return parameters[0].with_axes([labels.expand(shape) for labels in parameters[0].axes])
    for w in parameters:
        shape = torch.broadcast_shapes(x.shape, w.axes[0].shape)
        x = x.expand(shape)
        for axis, labels in enumerate(w.axes):
            labels = labels.expand(shape)
            if any(labels_differ_along(labels, i) and labels_differ_along(x, i) for i in range(len(shape))):
                claim_weight_axis(rules, w, axis)
                rules.out.couple(x, labels)
    return x


def label_concatenation(rules: "NodeRules") -> Tensor:
    """Parameters beside activations along an axis of positions, as a token for a whole image is: the same channels."""
    axis = rules.kwargs.get("dim", rules.args[1] if len(rules.args) > 1 else 0)
    pieces = list(rules.args[0])
    activation = next((x for x in pieces if isinstance(x, Tensor)), None)
    if activation is None:
        raise ValueError("parameters alone are joined")  # as MobileBERT's head joins two matrices
    channels = activation.narrow(axis, 0, 1)
    for i, w in enumerate(pieces):
        if isinstance(w, Weight):
            rules.out.couple(channels, claim_last_axis_channels(rules, w).narrow(axis, 0, 1))
            shape = list(w.axes[0].shape)
            pieces[i] = channels.expand(*shape[:axis], shape[axis], *shape[axis:][1:])
    return torch.cat(pieces, axis)


def claim_last_axis_channels(rules: "NodeRules", w: Weight) -> Tensor:
    """The labels of a parameter's last axis; its other axes count positions."""
    position, labels = next((i, axis) for i, axis in enumerate(w.axes) if labels_differ_along(axis, -1))
    if any(labels_differ_along(axis, -1) for axis in w.axes[position + 1 :]):
        raise ValueError("several axes of a parameter lie along one")
    claim_weight_axis(rules, w, position)
    return labels


def couple_weights_along(rules: "NodeRules", w: Weight, axis: int, labels: Tensor) -> None:
    """Couple the labels at each position along an axis with the parameter there."""
    for position, axis_labels in enumerate(w.axes):
        if (
            axis_labels.ndim > axis
            and axis_labels.shape[axis] == len(labels)
            and labels_differ_along(axis_labels, axis)
        ):
            claim_weight_axis(rules, w, position)
            rules.out.couple(axis_labels.movedim(axis, -1), labels)


def labels_differ_along(labels: Tensor, axis: int) -> bool:
    """Whether labels differ along an axis."""
    return labels.shape[axis] > 1 and bool((labels != labels.narrow(axis, 0, 1)).any())


def claim_weight_axis(rules: "NodeRules", w: Weight, axis: int, is_read: bool = False) -> None:
    rules.out.claim_axis(w.tensor, axis, w.rows[axis], is_read)


def block_pruning_of_parameters(rules: "NodeRules", parameters: list[Weight], operation: str) -> Any:
    """No rule: what meets the parameter is blocked."""
    labels = rules.out.new_labels(1)
    read = f"the parameter {parameters[0].tensor} is read" if parameters else "something is read"
    rules.out.block_pruning_of(labels, f"{read} outside of a module, by `{operation}`")
    for x in tensors_in((rules.args, rules.kwargs)):
        rules.out.couple(x, labels)
    shape = rules.node.meta.get("shape")
    return (
        labels.expand(shape)
        if shape is not None and all(isinstance(n, int) for n in shape)
        else rules.block_unknown_operation(operation)
    )


def label_topk(rules: "NodeRules") -> Any:
    """Selection of the largest is by index, so that none of them can go as a channel does."""
    x = rules.args[0]
    axis = rules.kwargs.get("dim", rules.args[2] if len(rules.args) > 2 else -1)
    rules.out.couple_along(x, axis)
    rules.out.chosen.append((x.unique().numpy(), x.shape[axis]))
    return tuple(torch.full(shape, NO_LABEL, dtype=torch.int64) for shape in rules.node.meta["shape"])


def label_convolution(rules: "NodeRules") -> Any:
    """torch's function, as modules call it that pad in a way of their own."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    arguments = {**dict(zip(names, rules.args, strict=False)), **rules.kwargs}
    w = arguments["weight"]
    if not isinstance(w, Weight) or w.axes[0].shape != tuple(map(len, w.rows)):
        return block_pruning_of_parameters(rules, weights_in((rules.args, rules.kwargs)), "convolution")
    if isinstance(arguments.get("bias"), Tensor):
        rules.out.couple(arguments["bias"], w.rows[0])
    return image_rules.label_convolution(rules, arguments["input"], w.rows[0], w.tensor, arguments.get("groups", 1))


def label_gather(rules: "NodeRules") -> Any:
    """Labels of a gather: entries along the axis are coupled, since indices choose any of them."""
    arguments = {**dict(zip(("input", "dim", "index"), rules.args, strict=False)), **rules.kwargs}
    x, axis = arguments["input"], arguments["dim"]
    rules.out.couple_along(x, axis)
    shape = [
        min(n, m) if i != axis % x.ndim else n
        for i, (n, m) in enumerate(zip(x.shape, rules.node.meta["shape"], strict=True))
    ]
    x = x.amax(axis, keepdim=True)[tuple(slice(0, n) for n in shape)]
    return x.expand(rules.node.meta["shape"])


def label_embedding(rules: "NodeRules") -> Any:
    """Rows of a parameter, looked up by a function: channels of the stream, of which a layer alone knows nothing."""
    arguments = {**dict(zip(("input", "weight"), rules.args, strict=False)), **rules.kwargs}
    w = arguments["weight"]
    if rules.out.norms_couple:
        return block_pruning_of_parameters(rules, [w], "embedding")
    claim_weight_axis(rules, w, 1)
    return w.rows[1].expand(*arguments["input"].shape, -1)


RULES = {
    "topk": label_topk,
    "embedding": label_embedding,
    "gather": label_gather,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), label_convolution),
}
