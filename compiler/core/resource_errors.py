"""Errors of a machine that has no more memory or no room for a file, raised by Python or by a library."""

import errno
import re

_NO_MEMORY = ("can't allocate memory", "not enough memory", "CUDA out of memory")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # libraries in Rust, such as safetensors, set no errno

RAISE_FILE_LIMIT = "raise the limit on the size of a file (`ulimit -f unlimited`)"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a library ran out of memory, by its class or its words."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or any(text in str(error) for text in _NO_MEMORY)


def disk_full_errno(error: BaseException) -> int | None:
    """`ENOSPC`, `EDQUOT` or `EFBIG` of a write that had no room for its bytes; None for any other error."""
    code = getattr(error, "errno", None)
    if code is None and (match := _RUST_ERROR.search(str(error))):
        code = int(match[1])
    return code if code in _DISK_FULL else None
