"""The closed list of operations that a stored graph may name, and their spellings.

A name is `leaf.attention`, `torch.cat`, `functional.silu`, `operator.add`, `getattr`, or a library function
in full, `transformers.masking_utils.create_causal_mask`. Everything else is refused: stored graphs are
untrusted.
"""

import importlib
import operator
import re
from typing import Any

import torch

from . import leaves


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OPERATOR = _words("""
    add sub mul truediv floordiv mod pow matmul neg pos abs invert and_ or_ xor lshift rshift eq ne lt le
    gt ge getitem setitem iadd isub imul itruediv ifloordiv iand ior
""")
_UNARY = frozenset({"neg", "pos", "abs", "invert"})

_TORCH = _words("""
    abs add addcmul addmm all amax amin any arange argmax argmin argsort as_tensor atan2 baddbmm
    bitwise_and bitwise_not bitwise_or bmm broadcast_to bucketize cat ceil chunk clamp clip clone concat
    conv1d conv2d conv3d cos cosh cummax cumprod cumsum diag_embed diff div dot einsum empty empty_like eq
    erf exp expand_copy expm1 eye flatten flip floor floor_divide full full_like gather ge gt histc
    index_add index_select isfinite isinf isnan le linspace log log1p log2 logaddexp logical_and
    logical_not logical_or logsumexp lt masked_fill masked_select matmul max maximum mean min minimum
    movedim mul multiply narrow ne neg nonzero norm not_equal numel ones ones_like outer permute pow prod
    rand randint randn reciprocal relu remainder repeat_interleave reshape roll round rsqrt rsub
    scalar_tensor scatter scatter_add select sigmoid sign sin sinh softmax log_softmax sort split sqrt
    square squeeze stack std sub sum swapaxes t take_along_dim tan tanh tensor tensor_split tile topk
    transpose tril triu true_divide unbind unflatten unsqueeze var view_as_complex view_as_real where
    zeros zeros_like
""")

_FUNCTIONAL = _words("""
    adaptive_avg_pool1d adaptive_avg_pool2d avg_pool1d avg_pool2d conv1d conv2d conv3d dropout elu
    embedding fold gelu glu group_norm hardsigmoid hardswish interpolate layer_norm leaky_relu linear
    log_softmax logsigmoid max_pool1d max_pool2d mish normalize one_hot pad pixel_shuffle relu relu6
    rms_norm scaled_dot_product_attention selu sigmoid silu softmax softplus tanh unfold
""")

_METHOD = _words("""
    abs add add_ addcmul all amax amin any argmax argmin argsort bfloat16 bitwise_not bmm bool ceil chunk
    clamp clamp_ clip clone contiguous copy_ cos cpu cummax cumprod cumsum detach diff dim div div_ dot
    double eq exp expand expand_as expm1 fill_ flatten flip float floor floor_divide gather ge gt half
    index_add index_add_ index_select int is_contiguous isfinite isnan item le log log1p logical_and
    logical_not logical_or logsumexp long lt masked_fill masked_fill_ masked_scatter matmul max mean min
    movedim mul mul_ narrow ne neg new_empty new_full new_ones new_tensor new_zeros nonzero norm numel
    permute pow prod reciprocal relu repeat repeat_interleave reshape roll round rsqrt scatter scatter_
    scatter_add scatter_add_ select sigmoid sign sin size softmax sort split sqrt square squeeze std sub
    sub_ sum swapaxes swapdims t tanh tile to topk transpose tril triu type type_as unbind unflatten
    unfold unsqueeze var view view_as where zero_ get_seq_length get_mask_sizes get_query_offset
    has_previous_state get_max_cache_shape update_conv_state update_recurrent_state get_conv_state
    get_recurrent_state
""")

_ATTRIBUTE = frozenset({"shape", "device", "T", "mT", "H", "mH", "data", "real", "imag"})
_LIBRARY = re.compile(r"transformers\.(masking_utils|modeling_utils|models\.\w+\.modeling_\w+)\.(\w+)")
_PARTS = re.compile(r"(?!_*$)[A-Za-z0-9]\w*|_\w*[A-Za-z0-9]\w*")

DTYPES = {str(value).removeprefix("torch."): value
          for value in vars(torch).values() if isinstance(value, torch.dtype)}


class Unlisted(ValueError):
    """An operation that is not on the list; the text says which."""


def function_name(function: Any) -> str:
    """The spelling of a call's target. Raises Unlisted."""
    if leaves.OWN.get(getattr(function, "__name__", "")) is function:
        return f"leaf.{function.__name__}"
    if function is getattr:
        return "getattr"
    name = getattr(function, "__name__", "")
    for prefix, listed, owner in _TABLES:
        if name in listed and getattr(owner, name, None) is function:
            return f"{prefix}.{name}"
    full = f"{getattr(function, '__module__', '')}.{name}"
    if _LIBRARY.fullmatch(full) and leaves.function_role(name):
        return full
    raise Unlisted(f"the function {full}")


def function_called(name: str) -> Any:
    """The target of a call by its spelling. Raises Unlisted."""
    if name == "getattr":
        return getattr
    prefix, _, rest = name.partition(".")
    if prefix == "leaf" and rest in leaves.OWN:
        return leaves.OWN[rest]
    for table, listed, owner in _TABLES:
        if prefix == table and rest in listed:
            return getattr(owner, rest)
    library = _LIBRARY.fullmatch(name)
    if library and leaves.function_role(library.group(2)):
        try:
            found = getattr(importlib.import_module(name.rpartition(".")[0]), library.group(2), None)
        except ImportError:
            found = None
        if found is not None:
            return getattr(found, "__effc_original__", found)
    raise Unlisted(f"the function {name[:80]}")


def operand_count(function: Any) -> int:
    """How many operands a listed function of `operator` takes."""
    return {operator.setitem: 3}.get(function, 1 if function.__name__ in _UNARY else 2)


def check_method(name: str) -> str:
    """The name of a method, if it is on the list. Raises Unlisted."""
    if name not in _METHOD:
        raise Unlisted(f"the method {name[:80]}")
    return name


def check_attribute(name: str) -> str:
    """The name of a property that `getattr` may read. Raises Unlisted."""
    if name not in _ATTRIBUTE:
        raise Unlisted(f"the property {str(name)[:80]}")
    return name


def check_path(path: str) -> str:
    """A dotted path below a module: identifiers and list positions, nothing private to Python."""
    parts = path.split(".")
    if len(path) > 400 or any(not _PARTS.fullmatch(part) or part.startswith("__") for part in parts):
        raise Unlisted(f"the path {path[:80]}")
    return path


_TABLES = (
    ("operator", _OPERATOR, operator),
    ("torch", _TORCH, torch),
    ("functional", _FUNCTIONAL, torch.nn.functional),
)
