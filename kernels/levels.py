"""Which instruction sets this machine can run, as the native library sees it."""

import ctypes
from functools import cache
from pathlib import Path

NAMES = ("portable", "avx2", "avx512")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where the package was installed without them."""
    from . import __path__ as folders  # an editable install has two: site-packages with the library, the checkout

    for folder in folders:
        for path in sorted(Path(folder).glob("libeffc_kernels.*")):
            return ctypes.CDLL(str(path))
    return None


def level() -> str:
    """The highest level of this processor and operating system, one of `NAMES`."""
    lib = library()
    return "portable" if lib is None else NAMES[lib.effc_level()]
