"""Operators that a stored exported program may call.

Of aten: public ones of tensors whose other arguments are numbers, sizes and types. That leaves out what reads or writes
files, draws from generators, prints, or takes over another tensor's memory. Private ones and kernels behind
`convolution`, which trust callers to have looked at shapes, those that write into a tensor as `out`, those of
TorchScript's numbers alone (a remainder of 0 ends the process), and families that trust what is in a tensor (quantised,
sparse and nested ones, backends of one vendor) are left out. Of effc: its own kernels. Of Python: arithmetic.
"""

import re
from functools import cache

import torch

from ...kernels.ops import KERNELS


def _split_on_spaces(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OVERLOAD = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
_PYTHON = _split_on_spaces("""
    _operator.add _operator.sub _operator.mul _operator.floordiv _operator.truediv _operator.mod _operator.neg
    _operator.eq _operator.ne _operator.lt _operator.le _operator.gt _operator.ge _operator.and_ _operator.or_
    _operator.not_ _operator.getitem _operator.pos torch.sym_max torch.sym_min torch.sym_not torch.sym_int
    torch.sym_float torch.sym_sum torch.sym_ite math.ceil math.floor math.trunc
""")
_PRIVATE = _split_on_spaces("""
    __and__ __or__ __xor__ __lshift__ __rshift__ __iand__ __ior__ _assert_tensor_metadata _assert_scalar
""")  # those that torch.export writes: names of Python's operators (`&`), and conditions, which compute nothing
_OF_NUMBERS = _split_on_spaces("_assert_scalar sym_constrain_range sym_constrain_range_for_size")  # conditions on sizes
_WITH_TEXT = _split_on_spaces("""
    einsum gelu gelu_ div div_ divide floor_divide pad scatter_reduce scatter_reduce_ index_reduce scatter scatter_
    norm linalg_norm linalg_vector_norm linalg_matrix_norm bucketize searchsorted meshgrid _assert_scalar argsort
""")
_KINDS = re.compile(r"(Optional\[)?(List\[)?(Optional\[)?(Tensor|int|SymInt|float|bool|number|Device)\]*")
_FAMILIES = re.compile(
    r".*(quant|mkldnn|cudnn|miopen|sparse|nested|fbgemm|vulkan|embedding_bag|rnn|lstm|gru|ctc|unsafe|storage|resize|"
    r"from_file|strided|set_data|backward|pin_memory|coalesce|histogramdd|hspmm|inverse|int_repr|overrideable|"
    r"flatten_dense|retain|requires_grad|batch_norm_|slow_conv|thnn_conv|conv_depthwise3d).*|_.*|q_.*|qscheme|set_?|data|renorm_"
)


def _is_dispatched(name: str, overload: str) -> bool:
    """Whether torch's dispatcher has an operator: others are TorchScript's own, which fake tensors do not know."""
    return torch._C._dispatch_has_kernel(f"aten::{name}" if overload == "default" else f"aten::{name}.{overload}")


@cache
def is_allowed_operator(target: str) -> bool:
    """Whether a program may call an operator: `torch.ops.aten.add.Tensor`, `torch.ops.effc.dense_linear.default`."""
    if target in _PYTHON:
        return True
    if target.startswith("torch.ops.effc.") and target.endswith(".default"):
        return target.removeprefix("torch.ops.effc.").removesuffix(".default") in KERNELS
    match = _OVERLOAD.fullmatch(target)
    return match is not None and _is_allowed_aten_overload(*match.groups())


def _is_allowed_aten_overload(name: str, overload: str) -> bool:
    if name not in _PRIVATE and _FAMILIES.fullmatch(name):
        return False
    if overload.startswith("__") or not torch._C._jit_get_schemas_for_operator(f"aten::{name}"):
        return False
    packet = getattr(torch.ops.aten, name)
    if overload not in packet.overloads() or not _is_dispatched(name, overload):
        return False
    schema = getattr(packet, overload)._schema
    arguments = schema.arguments
    if any(argument.is_out for argument in arguments):
        return False
    if name not in _OF_NUMBERS and not any("Tensor" in str(part.type) for part in (*arguments, *schema.returns)):
        return False
    kinds = [str(argument.type) for argument in arguments]
    text = ("str", "Optional[str]")
    return all(_KINDS.fullmatch(kind) or (kind in text and name in _WITH_TEXT) for kind in kinds)
