"""Nodes `MatMulNBits` of a file that may come from anybody.

ONNX Runtime packs their weights when it opens a file, by the sizes that attributes state, before it compares those with
the shapes of the tensors (`PrePack` in matmul_nbits.cc of 1.32): a file of other sizes would have it read past them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

DOMAIN, OPERATOR = "com.microsoft", "MatMulNBits"
BITS = (4, 8)
BLOCKS = (16, 32, 64, 128)  # 512 gave zeros in ONNX Runtime 1.26, and its kernels for CUDA end at 128
FLOAT_INPUTS, INT8_INPUTS = 0, 4  # of `accuracy_level`: inputs stay as they are, or are rounded block by block

_MAX_FEATURES = 1 << 24
_FLOAT, _UINT8 = 1, 2  # onnx.TensorProto
_ATTRIBUTES = ("K", "N", "bits", "block_size", "accuracy_level")


def nbits_problem(graph: Any, nodes: Iterable[Any]) -> str | None:
    """Problem of a graph's nodes of the operator, None where there is none; `nodes` are those of its branches, too.

    They lie in the graph itself, and their weights are initializers of the shapes that their attributes state.
    """
    calls = [node for node in graph.node if _is_nbits(node)]
    if sum(map(_is_nbits, nodes)) > len(calls):
        return f"calls {OPERATOR} inside of a branch"
    names = Counter(tensor.name for tensor in graph.initializer)
    names.update({value.name for value in graph.input} | {name for node in graph.node for name in node.output})
    constants = {tensor.name: tensor for tensor in graph.initializer if names[tensor.name] == 1}
    if not all(_has_stated_shapes(node, constants) for node in calls):
        return f"has weights of {OPERATOR} of other sizes than it states"
    return None


def _is_nbits(node: Any) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, OPERATOR)


def _has_stated_shapes(node: Any, constants: Mapping[str, Any]) -> bool:
    attributes = {a.name: a.i for a in node.attribute if a.type == a.INT}
    if len(node.attribute) != len(_ATTRIBUTES) or set(attributes) != set(_ATTRIBUTES):
        return False
    k, n, bits, block, level = (attributes[name] for name in _ATTRIBUTES)
    if bits not in BITS or block not in BLOCKS or level not in (FLOAT_INPUTS, INT8_INPUTS):
        return False
    if not (0 < k <= _MAX_FEATURES and 0 < n <= _MAX_FEATURES):
        return False
    blocks = -(-k // block)
    expected = [(_UINT8, [n, blocks, block * bits // 8]), (_FLOAT, [n, blocks]), (_UINT8, [n, -(-blocks * bits // 8)])]
    tensors = [constants.get(name) for name in node.input[1:]]
    actual = [None if tensor is None else (tensor.data_type, list(tensor.dims)) for tensor in tensors]
    return len(actual) in (2, 3) and actual == expected[: len(actual)]
