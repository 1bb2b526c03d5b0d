"""Calls into the compiled kernels, and what their answers mean."""

import ctypes
from collections.abc import Callable
from functools import cache

from . import levels

# What a function answers: the names of `Status` in levels.h, from 1 on in its order.
SENTENCES = {
    "no_memory": "there is no memory for the kernel's working space",
    "short": "it is shorter than the header of a packed weight",
    "magic": "it does not begin as a packed weight does",
    "order": "it was packed on a machine of the other byte order",
    "version": "it was packed by another version of effc",
    "kind": "it is packed for another kernel",
    "sizes": "its sizes are not those of this layer, or no sizes of a layer",
    "cut": "it is longer or shorter than its header says",
    "sections": "its sections are not where its sizes put them",
    "hash": "its contents do not match their checksum",
    "offsets": "its offsets leave the stream or go backwards",
    "counts": "its masks do not agree with the values that follow",
    "not_finite": "a weight is NaN or infinite",
    "arguments": "the arguments do not fit the packed weight",
    "too_long": "it has more inputs than this kernel's sums can hold",
    "busy": "another thread is running it",
    "cancelled": "it was cancelled",
    "no_threads": "the system starts no more threads",
    "no_way_back": "the model keeps a state of all its tokens, which can't be cut back to fewer; only 0 and all are "
    "possible",
}

# Products of packed weights, as `EFFC_LINEARS` in `packed.h` has them: a kernel's place, from 1, is its kind.
LINEAR = (
    "dense_linear",
    "sparse_linear",
    "dense_linear_int8",
    "sparse_linear_int8",
    "block_sparse_linear",
    "dense_linear_int4",
    "dense_linear_int8_int16",
)
_p, _i, _q, _u = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32
_LINEAR = (_i, _p, _q, _q, _q, _p, _q, _q, _i, _p, _i, _p, _i)
_ATTENTION = (_i, *[_p] * 6, *[_q] * 8, ctypes.c_float, _i, _i)
_ROWS = (_p, _q, _q)  # a tensor, elements from batch to batch and from position to position
_ROW = (_p, _q)
ARGUMENTS = {
    "check": (_p, _q, _u, _q, _i),
    "pack_begin": (_p,),
    "pack_end": (_p, _q, _u),
    "pack": (_i, _p, _p, _q, _i, _p, _p, _p, _i),
    "unpack_linear": (_i, _p, _q, _q, _q, _p, _i),
    "pack_tokens": (_i, _p, _p, _q, _q, _q, _q, _q, _p, _q, _p, _q, _i, _i),
    "dense_attention": _ATTENTION,
    "sparse_attention": _ATTENTION,
    "read": (_i, _p, _q, _i),
    "watch_mapped_files": (),
    **dict.fromkeys(LINEAR, _LINEAR),
    "engine_layout": (),
    "engine_create": (_p, _p),
    "engine_free": (_p,),
    "engine_run": (_p, _q, _p, _p, _q, _p, _p, _p),
    "engine_add_adapter": (_p, _i, _p, _p),
    "engine_remove_adapter": (_p, _i),
    "engine_encode": (_p, _q, _p, _p),
    "engine_forget": (_p, _q, _q),
    "engine_length": (_p, _q, _p),
    "engine_source": (_p, _q, _p),
    "engine_cancel": (_p,),
    "engine_profile": (_p, _p, _i),
    "sample": (_i, _p, _q, _p, _q, ctypes.c_float, _q, ctypes.c_float, ctypes.c_float, _p, _p),
    "fit_grids": (_i, *[_p] * 5, *[_q] * 4, ctypes.c_float, _i, _i),
    "row_product": (_i, *_ROW, *[_p] * 3, *[_q] * 3, _i, _i),
    "causal_conv": (_i, *_ROWS, *[_p] * 5, *[_q] * 4, _i, _i, _i),
    "causal_conv_step": (_i, *_ROW, *[_p] * 4, *[_q] * 4, _i, _i),
    "gated_norm": (_i, *_ROW * 2, *[_p] * 2, *[_q] * 3, ctypes.c_float, _i, _i),
    "selective_scan": (_i, *_ROWS * 2, _q, *_ROWS * 3, *[_p] * 6, *[_q] * 4, _i, _i, _i),
    "selective_step": (_i, *_ROW * 5, *[_p] * 5, *[_q] * 3, _i, _i, _i, _i),
    "selective_scan_backward": (_i, *[_p] * 21, *[_q] * 4, _i, _i),
    "ssd_scan_backward": (_i, *[_p] * 19, *[_q] * 6, ctypes.c_float, ctypes.c_float, _i, _i),
    "ssd_scan": (_i, *_ROWS * 4, *[_p] * 6, *[_q] * 6, ctypes.c_float, ctypes.c_float, _i, _i, _i),
    "delta_rule": (_i, *_ROWS * 5, *[_p] * 2, *[_q] * 6, _i, _i),
    "ssd_step": (_i, *_ROW * 4, *[_p] * 5, *[_q] * 5, _i, _i, _i, _i),
}


class KernelError(ValueError):
    """Data that a kernel can't work with; the message is a sentence for the user."""


@cache
def library_function(name: str) -> Callable[..., int]:
    lib = levels.load_library()
    if lib is None:
        raise KernelError("effc is here without its compiled kernels; install a wheel for this platform")
    c_function = getattr(lib, f"effc_{name}")
    c_function.argtypes, c_function.restype = ARGUMENTS[name], _i
    return c_function


def message_of_status(status: int) -> str:
    """Message of a status other than 0."""
    return tuple(SENTENCES.values())[status - 1]


def error_of_status(status: int, label: str = "the packed weight") -> KernelError:
    """The error that a status other than 0 is raised as."""
    return KernelError(f"{label} can't be used: {message_of_status(status)}")


def call_or_raise(name: str, *arguments, label: str = "the packed weight") -> None:
    """Call an exported function; raise what it answers, unless that is 0."""
    status = library_function(name)(*arguments)
    if status:
        raise error_of_status(status, label)


def report_truncated_mapped_files() -> None:
    """Have this process say why it ends where a mapped file is cut; for processes that are ours alone."""
    if hasattr(levels.load_library(), "effc_watch_mapped_files"):  # a build of one's own may be older
        call_or_raise("watch_mapped_files")
