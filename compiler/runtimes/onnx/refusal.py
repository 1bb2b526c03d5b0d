"""Rejections of the target `onnx`, on writing and on reading."""

from ....dsl.syntax.diagnostics import Fault

cannot_write_onnx = Fault(
    "cannot-write-onnx",
    "The target `onnx` can't write a model in the standard ops of ONNX.\n\n"
    "Layers that keep a state of their own while they read tokens (state-space mixers, linear attention) and kernels "
    "of packed weights have no standard op. `hf` and `native` hold such models.",
    exit="environment",
)
rejected_onnx = Fault(
    "refused-onnx",
    "An ONNX file holds something that effc's own don't.\n\n"
    "It may come from anybody. effc reads files of standard ops, and of the few of ONNX Runtime's own that it writes, "
    "whose weights lie in the one data file beside them.",
    exit="environment",
)
