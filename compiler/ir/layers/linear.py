"""Linear modules whose weight is packed for a native kernel, as passes of `lower` leave them in a model."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ....dsl.syntax.diagnostics import Fault
from ....kernels import packed as packing
from ....kernels.native import KernelError
from ....kernels.ops import LINEARS
from ...core.json_errors import reject_on_error

packed_damaged = Fault(
    "packed-damaged",
    "A packed weight does not hold together: it was cut, changed, or is of another version or byte order.\n\n"
    "Kernels read packed weights without looking, so each is checked whole before the first use.",
    exit="environment",
)
cpu_only = Fault(
    "cpu-only", "A model that runs native kernels is to run on something else than a CPU.", exit="environment"
)


class KernelLinear(nn.Module):
    """y = x @ w.T + bias by a native kernel, w packed for it: what a lowered linear module becomes.

    kernel   `dense_linear`, `sparse_linear`, ... (`kernels.packed.KINDS`), also the name of the op it calls
    packed   [bytes] uint8; a buffer, so it is in the state dict, and copies and exports have it
    bias     [out] or None
    A swappable module (`edits.Swappable`): a graph sees one call of a leaf whose role is "linear".
    """

    packed: Tensor

    def __init__(self, kernel: str, in_features: int, out_features: int, packed: Tensor, bias: Tensor | None = None):
        super().__init__()
        if kernel not in packing.KINDS:
            raise ValueError(f"{kernel} is no kernel for linear modules")
        self.kernel, self.in_features, self.out_features = kernel, in_features, out_features
        self.register_buffer("packed", packed)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def of(cls, module: nn.Module, kernel: str) -> "KernelLinear":
        """Kernel module in place of a linear module, its weight packed. Raises `KernelError` where it can't be."""
        weight = weight_of(module)
        packed, bias = LINEARS[kernel].pack(weight), module.bias
        assert bias is None or isinstance(bias, Tensor), f"a bias that is a {type(bias).__name__}"
        return cls(kernel, weight.shape[1], weight.shape[0], packed, bias)

    def forward(self, x: Tensor) -> Tensor:
        return LINEARS[self.kernel].call_op_or_kernel(x, self.packed, self.bias, self.out_features)

    def extra_repr(self) -> str:
        return f"{self.kernel}, in_features={self.in_features}, out_features={self.out_features}"

    def spec(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bytes": self.packed.numel(),
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, old: nn.Module, spec: dict[str, Any]) -> "KernelLinear":
        if not isinstance(old, (nn.Linear, Conv1D)):
            raise TypeError(f"a packed weight in place of a {type(old).__name__}")
        n, k, size = spec["out_features"], spec["in_features"], spec["bytes"]
        shape = weight_of(old).shape
        fits = all(type(number) is int and number > 0 for number in (n, k, size)) and n <= shape[0] and k <= shape[1]
        if not fits or size > 4 * (n + 64) * (k + 64) + (1 << 16):  # float32 with room for masks and scales
            raise ValueError(f"a packed weight of {n} outputs, {k} inputs and {size} bytes")
        device = old.weight.device
        bias = torch.empty(n, dtype=old.weight.dtype, device=device) if spec["bias"] else None
        return cls(spec["kernel"], k, n, torch.empty(size, dtype=torch.uint8, device=device), bias)

    def checked_copy(self, packed: Tensor) -> Tensor:
        """Copy of a weight that came from a file, checked, in memory that the kernel reads fastest.

        Raises `KernelError`. A file is mapped in small pages, which cost a quarter of the bandwidth.
        """
        packed = packing.checked_aligned_copy(self.kernel, packed, self.out_features)
        inputs = packing.packed_facts(packed).k
        if inputs != self.in_features:
            raise KernelError(
                f"the packed weight can't be used: it has {inputs} inputs, and the layer has {self.in_features}"
            )
        return packed


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a convolution, or [out, in] of a linear module; of a Conv1D, which keeps it the other way round,
    a view."""
    weight = module.weight
    assert isinstance(weight, Tensor), f"a {type(module).__name__} has no weight"
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def kernel_linears(model: nn.Module) -> Iterator[tuple[str, KernelLinear]]:
    """The lowered linear modules of a model by path."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, KernelLinear))


def count_params(model: nn.Module) -> int:
    """Number of parameters of a model, shared ones once; packed weights count as the originals.

    A head that was tied to the embedding and then packed holds numbers that the embedding has already.
    """
    config = getattr(model, "config", None)
    tied = getattr(model, "_tied_weights_keys", None) if getattr(config, "tie_word_embeddings", False) else None
    packed = (
        m.in_features * m.out_features for path, m in kernel_linears(model) if f"{path}.weight" not in (tied or ())
    )
    return sum(packed) + sum(p.numel() for p in model.parameters())


def check_and_copy_packed_weights(model: nn.Module) -> None:
    """Settle every packed weight that came from a file; Reject (packed-damaged) with the module's path."""
    for path, module in kernel_linears(model):
        if not module.packed.is_meta:
            module.packed = _checked_copy_or_reject(path, module, module.packed)


def refuse_damaged_packed_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Reject (packed-damaged) tensors of a file, by name, that a model without storage could not run; one of them at a
    time is read."""
    for path, module in kernel_linears(model):
        _checked_copy_or_reject(path, module, tensors[f"{path}.packed"])


def _checked_copy_or_reject(path: str, module: KernelLinear, packed: Tensor) -> Tensor:
    with reject_on_error(packed_damaged, f"{path}", "copy the files again, or compile again", error_types=KernelError):
        return module.checked_copy(packed)


def refuse_non_cpu_device_of_kernels(model: nn.Module, device: Any) -> None:
    """Reject a device that kernels don't run on, where a model has any."""
    first = next(kernel_linears(model), None)
    if first is not None and torch.device(device).type != "cpu":
        raise cpu_only(
            f"{first[0]} runs the kernel `{first[1].kernel}`, which {device} has not",
            help="load it on the CPU, or compile without the steps `lower.*`",
        ).rejection()
