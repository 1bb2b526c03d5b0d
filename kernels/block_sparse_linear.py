"""bfloat16 weights kept or dropped 16 outputs by 2 inputs at a time.

No expansion: a kept vector is read as it stands, beside the number of its inputs. It pays from about 80 % of
zero blocks, where the bitmap kernels are held up by expanding and not by memory.
"""

import torch

from .packed_linear import PackedLinear


class BlockSparseLinear(PackedLinear):
    """bfloat16 weights kept or dropped 16 outputs by 2 inputs at a time."""

    name = "block_sparse_linear"

    @classmethod
    def unsupported_reason(cls, n, k, dtype=torch.bfloat16) -> str:
        if k > 65536:
            return f"it has {k} inputs, and group numbers reach 65536"
        return super().unsupported_reason(n, k, dtype)
