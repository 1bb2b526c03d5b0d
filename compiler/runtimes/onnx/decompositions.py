"""Decompositions of exported programs for ONNX, without a second trace where few operations have to go.

torch's exporter traces a program twice again to take apart what ONNX has no operation for. Of most models that is a
handful of casts and one `&`, which are rewritten here in place.
"""

from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

_ATEN = torch.ops.aten
_CASTS = (_ATEN.to.dtype, _ATEN.to.device, _ATEN.to.dtype_layout)
_IDENTITIES = (_ATEN.detach_.default, _ATEN.detach.default, _ATEN.alias.default, _ATEN.lift_fresh_copy.default)
_SPELT = {_ATEN.__and__.Tensor: _ATEN.bitwise_and.Tensor, _ATEN.__or__.Tensor: _ATEN.bitwise_or.Tensor}
_CHECKS = (  # which the exporter drops itself
    _ATEN.sym_constrain_range_for_size.default,
    _ATEN._assert_async.msg,
    _ATEN._assert_scalar.default,
    _ATEN._assert_tensor_metadata.default,
)


@contextmanager
def light_decompositions() -> Iterator[None]:
    """Inside, `run_decompositions` gives a program back, rewritten, if no other operation of it is to be decomposed."""
    # Exchanged on the class, since torch.onnx.export calls it itself and takes no other. A program that another thread
    # decomposes meanwhile computes what it did, as all rewrites keep its numbers.
    stock = ExportedProgram.run_decompositions

    def run(program: ExportedProgram, table: Any = None, **options: Any) -> ExportedProgram:
        if table is None or not _suffices(program.graph, table):
            return stock(program, table, **options)
        _rewrite(program.graph)
        program.graph_module.recompile()
        return program

    ExportedProgram.run_decompositions = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = stock  # type: ignore[method-assign]


def _suffices(graph: fx.Graph, decomposed: Container[Any]) -> bool:
    """Whether all calls of a graph are rewritten here, or neither decomposed nor in place."""
    output = next(reversed(graph.nodes))
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            if node.target in _IDENTITIES and output in node.users:  # the signature has its name
                return False
            if node.target in (*_CASTS, *_IDENTITIES, *_SPELT, *_CHECKS) or _is_unused_size(node):
                continue
            if node.target in decomposed or _may_mutate(node.target):
                return False
        elif node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            return False
    return True


def _may_mutate(op: torch._ops.OpOverload) -> bool:
    """Whether an operation may write to what it reads, as `batch_norm`, whose schema does not say so."""
    return op._schema.is_mutable or torch.Tag.maybe_aliasing_or_mutating in op.tags


def _is_unused_size(node: fx.Node) -> bool:
    """Whether a node is a stride or a size that checks alone read."""
    return node.target is _ATEN.sym_stride.int and all(_is_check(user) for user in node.users)


def _is_check(node: fx.Node) -> bool:
    return node.target in _CHECKS or (bool(node.users) and all(map(_is_check, node.users)))


def _rewrite(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target in _CHECKS:
            graph.erase_node(node)
        elif node.target in _SPELT:
            node.target = _SPELT[node.target]
        elif node.target in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in _CASTS:
            dtype = node.meta["val"].dtype
            node.target, node.args, node.kwargs = _ATEN._to_copy.default, node.args[:1], {"dtype": dtype}
    graph.eliminate_dead_code()
    graph.lint()
