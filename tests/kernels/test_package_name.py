"""The repository's folder `kernels` does not stand in front of Hugging Face's package of that name."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def printed_from_the_root(code, path=""):
    environment = {**os.environ, "PYTHONPATH": str(path)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_an_installed_package_is_imported_and_ours_keeps_its_own_name(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from .layer import NAME")
    (tmp_path / "kernels" / "layer.py").write_text("NAME = 'theirs'")
    code = "import kernels, kernels.layer, effc.kernels; print(kernels.NAME, effc.kernels.__file__)"
    assert printed_from_the_root(code, tmp_path) == ["theirs", str(ROOT / "kernels" / "__init__.py")]


def test_transformers_loads_its_models_from_the_root_with_the_package_and_without():
    assert printed_from_the_root("from transformers import LlamaConfig; print(LlamaConfig.model_type)") == ["llama"]
