"""The kernels built so that AddressSanitizer and UBSan watch them, and what a process needs to load them."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PORTABLE = "-DEFFC_LEVELS="  # one level alone, which has every reader: a minute and a half of a processor, not twenty
CAN = bool(shutil.which("cmake") and shutil.which("c++"))


def built(folder: Path, *options: str) -> Path:
    """The library, built in a folder of which what is there already is used."""
    build = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DEFFC_SANITIZE=ON", *options]
    ready = subprocess.run(build, capture_output=True, text=True)
    assert ready.returncode == 0, ready.stderr[-2000:]
    made = subprocess.run(["cmake", "--build", str(folder), "-j", "2"], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-2000:]
    return folder / "libeffc_kernels.so"


def environment(library: Path) -> dict[str, str]:
    """The sanitizers' own libraries have to be loaded before anything else."""
    return {
        **os.environ,
        "EFFC_KERNELS": str(library),
        "LD_PRELOAD": f"{_runtime('libasan.so')} {_runtime('libubsan.so')}",
        # Stand-ins for stack frames lie at multiples of 32 bytes: an aligned store of 64 into one ends the process.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONMALLOC": "malloc",
    }


def _runtime(name: str) -> str:
    """A sanitizer's library as the compiler knows it."""
    return subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
