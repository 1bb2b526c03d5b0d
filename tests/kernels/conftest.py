"""Every test of a kernel runs at every level that this machine has, or an emulator of it, and names those it lacks."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from effc.kernels import levels

from tests.kernels.emulated.library import ROOT, EmulatedLibrary, build, kernels_of, missing_program

EMULATED = pytest.param("neon", marks=pytest.mark.slow, id="neon")  # `make test-arm` has built the library before


@pytest.fixture(scope="session")
def emulated_library() -> Iterator[EmulatedLibrary]:
    """The kernels for ARM, each call of which runs under qemu."""
    if program := missing_program():
        pytest.skip(f"neon: {program} is not installed, with which the kernels of ARM would run here")
    library = EmulatedLibrary(build(ROOT / "build" / "aarch64"))
    yield library
    library.close()


@pytest.fixture(params=[*(n for n in levels.NAMES if n != "neon"), levels.MODEL, EMULATED])
def level(request):
    """Kernels run at this level within the test."""
    is_emulated = request.param == "neon" and bool(levels.level_unavailability_reason("neon"))
    with kernels_of(request.getfixturevalue("emulated_library")) if is_emulated else nullcontext():
        if reason := levels.level_unavailability_reason(request.param):
            pytest.skip(f"{request.param}: {reason}")
        with levels.at_forced_level(request.param):
            yield request.param
