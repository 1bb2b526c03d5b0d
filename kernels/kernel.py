"""A kernel as torch sees it: `torch.ops.effc.NAME`, where NAME is the name of the file.

One class says everything: the schema once, `fake` for shapes under export and compile, `reference` which is
slow and obviously right, `native` which calls the compiled body, and, where weights are packed first,
`pack`. Subclassing registers the op.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPS = torch.library.Library("effc", "DEF")
KERNELS: dict[str, type["Kernel"]] = {}
_compiling, _records, _profiles = torch.compiler.is_compiling, torch.is_grad_enabled, torch.autograd._profiler_enabled
_functions, _modes, _transform = (
    torch._C._len_torch_function_stack,
    torch._C._len_torch_dispatch_stack,
    torch._C._functorch.peek_interpreter_stack,
)
_traces = torch._C._get_tracing_state


def is_unobserved_cpu_call(x: Tensor) -> bool:
    """Whether a call on x is nobody's but the caller's: x is plain and on the CPU, and no gradient, mode,
    transform, trace, compiler or profiler is to learn of it."""
    return not (
        _compiling()
        or _records()
        or type(x) is not Tensor
        or not x.is_cpu
        or _modes()
        or _functions()
        or _transform()
        or _traces()
        or _profiles()
    )


class Kernel(ABC):
    """An op with a compiled body. A final subclass states `name` and `schema`."""

    name: str = ""
    schema: str = ""
    setup_context: Callable[..., None] | None = None  # what the gradient needs, and the gradient,
    backward: Callable[..., Any] | None = None  # where training may meet this op

    def __init_subclass__(cls) -> None:
        if not cls.name:
            return  # abstract: a family of kernels
        OPS.define(cls.name + cls.schema, tags=(torch.Tag.pt2_compliant_tag,))
        OPS.impl(cls.name, cls.native, "CPU")
        torch.library.register_fake(f"effc::{cls.name}", cls.fake, lib=OPS)
        if cls.backward:
            torch.library.register_autograd(f"effc::{cls.name}", cls.backward, setup_context=cls.setup_context, lib=OPS)
        KERNELS[cls.name] = cls

    @staticmethod
    @abstractmethod
    def fake(*arguments):
        """Shapes and dtypes of the result."""

    @staticmethod
    @abstractmethod
    def reference(*arguments):
        """The result by plain torch operations."""

    @staticmethod
    @abstractmethod
    def native(*arguments):
        """The result by the compiled body."""

    @staticmethod
    @abstractmethod
    def unsupported_reason(*arguments) -> str:
        """Why this kernel can't take a layer, as a sentence; "" where it can."""

    @staticmethod
    @abstractmethod
    def cases() -> list:
        """Sizes worth a test: odd ones, tails, the smallest."""
