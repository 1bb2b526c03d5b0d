"""The kernels' own tests over a build that AddressSanitizer and UBSan watch."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.sanitized import CAN, ROOT, built, environment

FILES = (
    "test_packed.py",
    "test_linear.py",
    "test_attention.py",
    "test_scan.py",
    "test_engine.py",
    "test_engine_input.py",
    "test_engine_states.py",
    "test_engine_mixtures.py",
    "test_engine_sources.py",
    "test_sampling.py",
)


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not CAN, reason="cmake and a C++ compiler build it")
def test_no_kernel_leaves_its_memory_or_does_what_is_undefined(tmp_path):
    env = environment(built(tmp_path))
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
