"""Every test of a kernel runs at every level that this machine has or an emulator of another one, and names others."""

from collections.abc import Iterator

import pytest
from effc.kernels import levels, native

from tests.kernels.emulated.library import ROOT, EmulatedLibrary, build, missing_program

EMULATED = pytest.param("neon", marks=pytest.mark.slow, id="neon")


@pytest.fixture(scope="session")
def emulated_library() -> Iterator[EmulatedLibrary]:
    """The kernels for ARM, each call of which runs under qemu."""
    if program := missing_program():
        pytest.skip(f"neon: {program} is not installed, which would run the kernels of ARM here")
    library = EmulatedLibrary(build(ROOT / "build" / "aarch64"))
    yield library
    library.close()


@pytest.fixture(params=[*(n for n in levels.NAMES if n != "neon"), levels.MODEL, EMULATED])
def level(request, monkeypatch):
    """Kernels run at this level within the test."""
    if request.param == "neon" and levels.unavailable_reason("neon"):
        library = request.getfixturevalue("emulated_library")
        monkeypatch.setattr(levels, "load_library", lambda: library)
        native.library_function.cache_clear()
    if reason := levels.unavailable_reason(request.param):
        pytest.skip(f"{request.param}: {reason}")
    with levels.at_forced_level(request.param):
        yield request.param
    native.library_function.cache_clear()
