"""The kernels' own tests over a build that AddressSanitizer and UBSan watch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "test_packed.py",
    "test_linear.py",
    "test_attention.py",
    "test_scan.py",
    "test_engine.py",
    "test_engine_input.py",
    "test_engine_states.py",
    "test_engine_mixtures.py",
    "test_sampling.py",
)


def runtime(name: str) -> str:
    """A sanitizer's library as the compiler knows it; it has to be loaded before anything else."""
    return subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("c++"), reason="cmake and a C++ compiler build it")
def test_no_kernel_leaves_its_memory_or_does_what_is_undefined(tmp_path):
    build = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DEFFC_SANITIZE=ON"]
    assert subprocess.run(build, capture_output=True).returncode == 0
    made = subprocess.run(["cmake", "--build", str(tmp_path), "-j", "2"], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-2000:]
    env = {
        **os.environ,
        "EFFC_KERNELS": str(tmp_path / "libeffc_kernels.so"),
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not export and not compiled and not opcheck and not agreement",
        *(str(Path(__file__).parent / f) for f in FILES),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
