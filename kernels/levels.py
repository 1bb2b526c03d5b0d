"""Level of instruction sets of the kernels: the machine's highest, or that of `EFFC_ISA`."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

FAMILIES = {  # of processors: the levels that each runs, lowest first
    "x86-64": ("portable", "avx2", "avx512", "avx512_bf16", "amx"),
    "ARM": ("portable", "neon"),
}
NAMES = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family))
MODEL = "amx_model"  # the AMX sources over tile instructions in plain C++; only `at_forced_level`, for tests
CODES = {name: code for code, name in enumerate((*FAMILIES["x86-64"], MODEL, "neon"))}
NEEDS = {
    "portable": "any processor",
    "avx2": "AVX2, FMA and BMI2",
    "avx512": "AVX-512 F, BW, VL and VBMI2",
    "avx512_bf16": "AVX-512 BF16 and VNNI",
    "amx": "AMX tiles with bfloat16 and int8, and the system's permission to use them",
    "neon": "NEON with dot products of bytes (`asimddp`)",
}


class NoSuchLevel(ValueError):
    """`EFFC_ISA` names a level that does not exist, or that this machine or build lacks."""


@cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they were not installed, or before their sources changed."""
    from . import __path__ as folders  # an editable install has two, and the library lies in one

    named = os.environ.get("EFFC_KERNELS")  # a build of one's own, as the sanitizer tests make
    beside = (p for folder in folders for p in sorted(Path(folder).glob("libeffc_kernels.*")))
    paths = [Path(named)] if named else beside
    loaded = (ctypes.CDLL(str(path)) for path in paths)
    return next((lib for lib in loaded if hasattr(lib, "effc_built")), None)


def runs_kernels_of_level(machine_level: str, kernel_level: str) -> bool:
    """Whether a processor of `machine_level` runs the kernels of `kernel_level`."""
    return any(
        kernel_level in family[: family.index(machine_level) + 1]
        for family in FAMILIES.values()
        if machine_level in family
    )


def active_level() -> str:
    """The level that kernels run at now, one of `NAMES`."""
    if _forced:
        return _forced[-1]
    return resolve_level(os.environ.get("EFFC_ISA", ""))


def active_level_code() -> int:
    """`level` as the library counts."""
    return CODES[active_level()]


def available_levels() -> tuple[str, ...]:
    """The levels that can run here, lowest first."""
    return tuple(name for name in NAMES if not level_unavailability_reason(name))


def level_unavailability_reason(name: str) -> str:
    """Why a level can't run here, as a sentence; "" where it can."""
    lib = load_library()
    if lib is None:
        reason = "the kernels are not compiled, or by an older effc; install it again"
        return "" if name == "portable" else reason
    if name == MODEL:
        return "" if lib.effc_built(CODES[name]) else "this build has no model of AMX"
    if not runs_kernels_of_level([*CODES][lib.effc_machine_level()], name):
        return f"this machine lacks {NEEDS[name]}"
    if not lib.effc_built(CODES[name]):
        return f"the compiler of this build did not know {NEEDS[name]}"
    return ""


@cache
def resolve_level(name: str) -> str:
    """The level for a value of `EFFC_ISA`; the highest for "" and "native"."""
    if name in ("", "native"):
        return available_levels()[-1]
    if name not in NAMES:
        raise NoSuchLevel(f"EFFC_ISA is {name}, and the levels are {', '.join(NAMES)}")
    reason = level_unavailability_reason(name)
    if reason:
        raise NoSuchLevel(f"EFFC_ISA is {name}: {reason}; the levels here are {', '.join(available_levels())}")
    return name


def active_level_and_reason() -> str:
    """Active level and its reason, for people."""
    current = active_level()
    if os.environ.get("EFFC_ISA", "") not in ("", "native"):
        return f"level {current}, as EFFC_ISA says; the highest here is {available_levels()[-1]}"
    family = FAMILIES["ARM" if platform.machine() in ("aarch64", "arm64") else "x86-64"]
    above = family[family.index(current) + 1 :] if current in family else ()
    return f"level {current}" + (
        f"; not {above[0]}: {level_unavailability_reason(above[0])}" if above else ", the highest"
    )


_forced: list[str] = []


@contextmanager
def at_forced_level(name: str) -> Iterator[None]:
    """Run kernels at a level that is available, or at `MODEL`, within a block: for tests and comparisons."""
    assert not level_unavailability_reason(name), f"{name}: {level_unavailability_reason(name)}"
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
