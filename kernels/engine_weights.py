"""The weights that a plan of the native engine names: each checked once, and numbered as C++ knows it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import packed
from .engine_steps import FORMS, Weight
from .native import KernelError


class WeightTable:
    """laid   what C++ reads, in the order of the numbers

    refuse    makes the error that names the step which asked
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], compares_checksums: bool, make_error: Callable[[str], KernelError]
    ):
        self.tensors, self.deep, self.plan_error = tensors, compares_checksums, make_error
        self.numbers: dict[str, int] = {}
        self.laid: list[Weight] = []

    def require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise self.plan_error(problem)

    def weight_index(self, name: str | None) -> int:
        """The number of a weight that C++ knows it by."""
        if name is None:
            return -1
        if name not in self.numbers:
            self.numbers[name] = len(self.laid)
            self.laid.append(self.checked_weight_entry(name, self.tensors[name]))
        return self.numbers[name]

    def checked_weight_entry(self, name: str, tensor: Tensor) -> Weight:
        self.require(
            isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.is_contiguous(),
            f"weight `{name}` is no contiguous tensor of this machine's memory",
        )
        at, count = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        if tensor.dtype is torch.uint8:
            kernel = packed.kernel_of(tensor)
            self.require(bool(kernel), f"weight `{name}` is not packed for any kernel")
            try:
                packed.check_packed_weight(kernel, tensor, reads_all_bytes=self.deep)
            except KernelError as error:
                raise self.plan_error(f"weight `{name}`: {error}") from error
            facts = packed.packed_facts(tensor)
            return Weight(at, count, facts.n, facts.k, packed.KINDS[kernel])
        self.require(
            tensor.dtype in FORMS and tensor.dim() in (1, 2) and tensor.numel() > 0,
            f"weight `{name}` is {tensor.dtype} {list(tensor.shape)}",
        )
        rows = len(tensor) if tensor.dim() == 2 else 1
        return Weight(at, count, rows, tensor.shape[-1], FORMS[tensor.dtype])

    def vector_index(self, name: str | None, *allowed_lengths: int) -> int:
        """A float32 vector of one of these lengths."""
        number = self.weight_index(name)
        if number >= 0:
            w = self.laid[number]
            self.require(
                w.form == 16 and w.n == 1 and w.k in allowed_lengths,
                f"weight `{name}` is not float32 [{' or '.join(map(str, allowed_lengths))}]",
            )
        return number

    def append_packed_weights_of_one_shape(self, names: list[str]) -> int:
        """The first number of packed weights of one shape, which are numbered one after another."""
        first = len(self.laid)
        for name in names:
            self.laid.append(self.checked_weight_entry(name, self.tensors[name]))
            w, head = self.laid[-1], self.laid[first]
            self.require(w.form < 16, f"weight `{name}` is not packed for any kernel")
            self.require((w.n, w.k) == (head.n, head.k), f"weight `{name}` has another shape than `{names[0]}`")
        return first

    def matrix_index(self, name: str, rows: int | None, columns: int | None) -> int:
        """A float32 matrix of so many rows and columns, where they are said."""
        number = self.weight_index(name)
        w = self.laid[number]
        self.require(
            w.form == 16 and columns in (None, w.k) and rows in (None, w.n),
            f"weight `{name}` is not float32 [{rows or 'any'}, {columns or 'any'}]",
        )
        return number
