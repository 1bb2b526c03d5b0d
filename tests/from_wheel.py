"""What a user meets who installs the wheel: `python tests/from_wheel.py EFFC` in an environment of its own.

EFFC is the `effc` of an environment that holds the wheel and what it asks for, nothing of the repository. The README's
recipe is compiled in an empty folder, its artifact answers and loads, and the package says what its types are.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def recipe() -> str:
    """The first recipe of the README."""
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```")[1::2]
    return next(block for block in blocks if block.lstrip().startswith("effspec 1")).lstrip()


def tracked() -> list[str]:
    """What the repository has in the folders that are installed: tables of the grammar, pages and recipes as well."""
    told = ["git", "ls-files", "compiler", "passes", "dsl", "kernels", "recipes"]
    return subprocess.run(told, cwd=ROOT, text=True, capture_output=True, check=True).stdout.split()


def main(effc: str) -> None:
    python = str(Path(effc).with_name("python"))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "r.effspec").write_text(recipe(), encoding="utf-8")
        environment = {**os.environ, "EFFC_CACHE_DIR": str(Path(folder) / "cache"), "PYTHONPATH": ""}

        def run(*command: str) -> str:
            done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
            assert done.returncode == 0, f"{' '.join(command)} gave {done.returncode}:\n{done.stdout}{done.stderr}"
            return done.stdout

        where = Path(run(python, "-c", "import effc; print(effc.__file__)").strip())
        assert ROOT not in where.parents or "site-packages" in where.parts, f"{where} is not the wheel's"
        assert (where.parent / "py.typed").is_file(), "the wheel has no py.typed"
        run(python, "-c", "import effc.plugin, effc.callbacks")
        lost = [name for name in tracked() if not (where.parent / name).is_file()]
        assert not lost, f"the wheel lacks {', '.join(lost)}"
        run(effc, "doctor")
        run(effc, "check", "r.effspec")
        run(effc, "plan", "r.effspec")
        run(effc, "compile", "r.effspec", "--threads", "1", "--no-progress")
        assert run(effc, "run", "out/tiny-llama-small", "--prompt", "And it came", "--max-new-tokens", "8").strip()
        code = (
            "import effc, torch; m = effc.load('out/tiny-llama-small'); "
            "print(m(input_ids=torch.arange(8)[None]).logits.shape[1])"
        )
        assert run(python, "-c", code).strip() == "8"
        levels = run(python, "-c", "from effc.kernels import levels; print(*levels.available_levels())").split()
        assert len(levels) > 0 and levels[0] == "portable"
    print(f"the wheel works: {where.parent}, kernels at {levels[-1]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
