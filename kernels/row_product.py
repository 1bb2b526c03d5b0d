"""A product with a plain weight for a few rows, at the speed at which memory is read."""

import torch
from torch.nn.functional import linear

from .kernel import Kernel
from .native import KernelError
from .sequences import (
    FLOATS,
    as_float32,
    call_kernel_at_active_level,
    check_shape,
    data_pointer,
    pointer_and_stride,
    with_contiguous_rows,
)

MAX_ROWS = 8  # from there on torch's own product is as fast


class RowProduct(Kernel):
    """x [m, k], w [n, k] as x, bias [n] or None -> x @ w.T + bias, sums in float32."""

    name = "row_product"
    schema = "(Tensor x, Tensor w, Tensor? bias) -> Tensor"

    @staticmethod
    def fake(x, w, bias) -> torch.Tensor:
        return x.new_empty(x.shape[0], w.shape[0])

    @staticmethod
    def reference(x, w, bias) -> torch.Tensor:
        return linear(x.float(), w.float(), None if bias is None else bias.float()).to(x.dtype)

    @classmethod
    def native(cls, x, w, bias) -> torch.Tensor:
        (m, k), n = x.shape, w.shape[0]
        check_shape("a weight", w, n, k)
        check_shape("a bias", bias, n)
        if x.dtype is not w.dtype or x.dtype not in FLOATS:
            raise KernelError(f"rows of {x.dtype} do not fit a weight of {w.dtype}")
        x, w, bias, y = with_contiguous_rows(x), w.contiguous(), as_float32(bias), torch.empty(m, n, dtype=x.dtype)
        call_kernel_at_active_level(
            cls.name,
            *pointer_and_stride(x),
            *map(data_pointer, (w, bias, y)),
            m,
            n,
            k,
            x.dtype is torch.float32,
            torch.get_num_threads(),
        )
        return y

    @staticmethod
    def unsupported_reason(num_rows: int, weight: torch.Tensor) -> str:
        if num_rows > MAX_ROWS:
            return f"it has {num_rows} rows, and torch's product is as fast from {MAX_ROWS} on"
        return "" if weight.dtype in FLOATS else f"its weights are {weight.dtype}"

    @staticmethod
    def cases() -> list[tuple[int, int, int]]:
        """Rows, outputs, inputs."""
        return [(1, 1, 1), (1, 17, 33), (2, 64, 48), (3, 65, 100), (5, 7, 16), (8, 130, 257)]
