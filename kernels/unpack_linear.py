"""A packed weight back as it was, less what packing rounded: for gradients, and to look at."""

import torch

from . import levels, native
from . import packed as packing
from .kernel import Kernel
from .packed_linear import PackedLinear, unpack_packed_weight


class UnpackLinear(Kernel):
    """packed, n outputs, k inputs -> the weight [n, k] float32."""

    name = "unpack_linear"
    schema = "(Tensor packed, int n, int k) -> Tensor"

    @staticmethod
    def fake(packed, n, k) -> torch.Tensor:
        return packed.new_empty((n, k), dtype=torch.float32)

    @staticmethod
    def reference(packed, n, k) -> torch.Tensor:
        return unpack_packed_weight(packed)

    @staticmethod
    def native(packed, n, k) -> torch.Tensor:
        kernel = packing.kernel_of(packed)
        packing.check_packed_weight(kernel or "dense_linear", packed, n)
        weight = torch.empty((n, k))
        arguments = (
            levels.active_level_code(),
            packed.data_ptr(),
            packed.numel(),
            n,
            k,
            weight.data_ptr(),
            torch.get_num_threads(),
        )
        native.call_or_raise("unpack_linear", *arguments)
        return weight

    @staticmethod
    def unsupported_reason(n, k) -> str:
        return ""

    cases = PackedLinear.cases
