"""The repository's folder `kernels` does not stand in front of Hugging Face's package of that name."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_transformers_finds_its_kernels_also_from_the_root_of_the_repository():
    code = "import kernels, effc.kernels, transformers.integrations.hub_kernels; print(kernels.__file__)\nprint(effc.kernels.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=250)
    theirs, ours = map(Path, run.stdout.split())
    assert theirs != ROOT / "kernels" / "__init__.py" and ours.parent.name == "kernels" and theirs != ours
