"""The closed list of operations that a stored graph may name, and their spellings.

A name is `leaf.attention`, `torch.cat`, `functional.silu`, `linalg.norm`, `fft.fftn`, `operator.add`, `getattr`, or a
library function in full, `transformers.masking_utils.create_causal_mask`. Everything else is refused: stored graphs
are untrusted.
"""

import operator
import re
import sys
import types
from typing import Any

import torch

from ..core.safe_read import Unlisted
from .layers import leaves
from .layers.hub_kernels import unwrap_kernel_module


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OPERATOR = _words("""
    abs add and_ eq floordiv ge getitem gt iadd iand ifloordiv imul invert ior isub itruediv le lshift lt
    matmul mod mul ne neg or_ pos pow rshift setitem sub truediv xor
""")
_UNARY = frozenset({"neg", "pos", "abs", "invert"})

_TORCH = _words("""
    abs add addcdiv addcmul addmm all amax amin angle any arange argmax argmin argsort as_tensor atan2
    baddbmm bincount bitwise_and bitwise_not bitwise_or block_diag bmm broadcast_to bucketize
    cartesian_prod cat cdist ceil chunk clamp clip clone combinations complex concat concatenate conv1d
    conv2d conv3d cos cosh count_nonzero cov cross cummax cumprod cumsum cumulative_trapezoid diag_embed
    diagflat diagonal diff div dot dstack einsum empty empty_like eq erf erfinv exp expand_copy expm1 eye
    flatten flip fliplr flipud floor floor_divide fmod frac full full_like gather ge greater greater_equal
    gt heaviside histc hstack hypot imag index_add index_copy index_put index_select inner isclose
    isfinite isin isinf isnan kron le lerp less less_equal linspace log log1p log2 log_softmax logaddexp
    logical_and logical_not logical_or logspace logsumexp lt masked_fill masked_scatter masked_select
    matmul max maximum mean median min minimum mm movedim mul multiply mv nan_to_num nanmean nansum narrow
    ne neg negative nonzero norm not_equal numel ones ones_like outer permute polar positive pow prod
    quantile rand randint randn ravel real reciprocal relu remainder renorm repeat_interleave reshape roll
    rot90 round rsqrt rsub scalar_tensor scatter scatter_add scatter_reduce searchsorted select sgn
    sigmoid sign signbit sin sinc sinh softmax sort split split_with_sizes sqrt square squeeze stack std
    std_mean sub sum swapaxes swapdims t take_along_dim tan tanh tensor tensor_split tensordot tile topk
    trace transpose tril triu true_divide trunc unbind unflatten unsqueeze vander var var_mean
    view_as_complex view_as_real vstack where zeros zeros_like
""")

_FUNCTIONAL = _words("""
    adaptive_avg_pool1d adaptive_avg_pool2d avg_pool1d avg_pool2d conv1d conv2d conv3d dropout elu
    embedding fold gelu glu group_norm hardsigmoid hardswish interpolate layer_norm leaky_relu linear
    log_softmax logsigmoid max_pool1d max_pool2d mish normalize one_hot pad pixel_shuffle relu relu6
    rms_norm scaled_dot_product_attention selu sigmoid silu softmax softplus tanh unfold
""")

_LINALG = _words("matrix_norm norm vector_norm")

_FFT = _words("fft fft2 fftn ifft ifft2 ifftn irfft irfftn rfft rfftn")

_METHOD = _words("""
    abs add add_ addcdiv addcmul addmm addmv all amax amin any argmax argmin argsort baddbmm bfloat16
    bitwise_and bitwise_not bitwise_or bmm bool broadcast_to ceil ceil_ chunk clamp clamp_ clip clip_
    clone contiguous copy_ cos cosh cpu cross cummax cumprod cumsum detach diagonal diff dim div div_ dot
    double eq erf erfinv exp exp_ expand expand_as expm1 fill_ flatten flip float floor floor_
    floor_divide fmod frac gather ge get_conv_state get_mask_sizes get_max_cache_shape get_query_offset
    get_recurrent_state get_seq_length gt half has_previous_state index_add index_add_ index_copy
    index_fill index_fill_ index_put index_select inner int is_contiguous isclose isfinite isinf isnan
    item le lerp log log10 log1p log2 logaddexp logical_and logical_not logical_or logsumexp long lt
    masked_fill masked_fill_ masked_scatter masked_select matmul max maximum mean min minimum mm movedim
    mul mul_ multiply mv nan_to_num narrow ndimension ne neg neg_ negative new_empty new_full new_ones
    new_tensor new_zeros nonzero norm numel outer permute pow pow_ prod ravel reciprocal relu relu_
    remainder repeat repeat_interleave reshape reshape_as roll rot90 round round_ rsqrt rsqrt_ scatter
    scatter_ scatter_add scatter_add_ scatter_reduce select sgn short sigmoid sigmoid_ sign sin sinh size
    softmax sort split split_with_sizes sqrt sqrt_ square squeeze std stride sub sub_ subtract sum
    swapaxes swapdims t tan tanh tanh_ tensor_split tile to topk transpose tril tril_ triu triu_
    true_divide trunc type type_as unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze
    update_conv_state update_recurrent_state var view view_as where zero_
""")

_ATTRIBUTE = frozenset({"shape", "device", "T", "mT", "H", "mH", "data", "real", "imag"})
_LIBRARY = re.compile(r"transformers\.(masking_utils|modeling_utils|models\.\w+\.modeling_\w+)\.(\w+)")
_PARTS = re.compile(r"(?!_*$)[A-Za-z0-9]\w*|_\w*[A-Za-z0-9]\w*")

DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def name_of_allowlisted_function(function: Any) -> str:
    """The spelling of a call's target. Raises Unlisted."""
    if leaves.LEAF_FUNCTIONS.get(getattr(function, "__name__", "")) is function:
        return f"leaf.{function.__name__}"
    if function is getattr:
        return "getattr"
    name = getattr(function, "__name__", "")
    for prefix, listed, owner in _TABLES:
        short = name.removeprefix(f"{prefix}_")  # `torch.linalg.vector_norm` calls itself linalg_vector_norm
        if short in listed and getattr(owner, short, None) is function:
            return f"{prefix}.{short}"
    full = f"{getattr(function, '__module__', '')}.{name}"
    if _LIBRARY.fullmatch(full) and leaves.function_role(name):
        return full
    raise Unlisted(f"the function {full}")


def allowlisted_function(name: str) -> Any:
    """The target of a call by its spelling. Raises Unlisted."""
    if name == "getattr":
        return getattr
    prefix, _, suffix = name.partition(".")
    if prefix == "leaf" and suffix in leaves.LEAF_FUNCTIONS:
        return leaves.LEAF_FUNCTIONS[suffix]
    for table, listed, owner in _TABLES:
        if prefix == table and suffix in listed:
            return getattr(owner, suffix)
    library = _LIBRARY.fullmatch(name)
    function = library and unwrap_kernel_module(
        vars(sys.modules.get(name.rpartition(".")[0], types)).get(library.group(2))
    )
    if function and is_whole_library_function(original := getattr(function, "__effc_original__", function)):
        return original
    raise Unlisted(f"the function {name[:80]}")


def is_whole_library_function(function: Any) -> bool:
    """Whether something is a function of transformers that stays whole in a graph.

    Its module has been imported by whoever built the model: nothing is imported because a file names it.
    """
    return (
        isinstance(function, types.FunctionType)
        and leaves.function_role(function.__name__) is not None
        and (str(function.__module__).startswith("transformers."))
    )


def operand_count(function: Any) -> int:
    """Number of operands of a listed function of `operator`."""
    return {operator.setitem: 3}.get(function, 1 if function.__name__ in _UNARY else 2)


def checked_method_name(name: str) -> str:
    """The name of a method, if it is on the list. Raises Unlisted."""
    if name not in _METHOD:
        raise Unlisted(f"the method {name[:80]}")
    return name


def check_attribute(name: object) -> None:
    """Raises Unlisted unless it is the name of a property that `getattr` may read."""
    if name not in _ATTRIBUTE:
        raise Unlisted(f"the property {str(name)[:80]}")


def checked_path(path: str) -> str:
    """A dotted path below a module: identifiers and list positions, nothing private to Python."""
    parts = path.split(".")
    if len(path) > 400 or any(not _PARTS.fullmatch(part) or part.startswith("__") for part in parts):
        raise Unlisted(f"the path {path[:80]}")
    return path


_TABLES = (
    ("operator", _OPERATOR, operator),
    ("torch", _TORCH, torch),
    ("functional", _FUNCTIONAL, torch.nn.functional),
    ("linalg", _LINALG, torch.linalg),
    ("fft", _FFT, torch.fft),
)
