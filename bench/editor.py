"""How long an editor waits: from a change of a recipe to its diagnostics, in a real session with `effc lsp`.

python -m bench.editor [RECIPE...]
"""

import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPES = ("recipes/quickstart.effspec", "tests/dsl/tour.effspec")
CHANGES = 60


def load_editor_class() -> type:
    spec = importlib.util.spec_from_file_location("editor_session", ROOT / "tests/compiler/cli/editor/conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Editor


def main(recipes: list[str]) -> None:
    editor_of = load_editor_class()
    for recipe in recipes:
        text = Path(recipe).read_text()
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            editor = editor_of(Path(folder), {"plan": False})
            editor.open("bench.effspec", text)
            first = time.perf_counter() - begun
            taken = []
            for i in range(CHANGES):
                begun = time.perf_counter()
                editor.change("bench.effspec", f"{text}# {i}\n")
                taken.append(1000 * (time.perf_counter() - begun))
            editor.end()
        taken.sort()
        print(
            f"{recipe}: {text.count(chr(10))} lines, {first:.2f} s from start to the first diagnostics; a change: "
            f"median {statistics.median(taken):.0f} ms, of {CHANGES} the 95th percentile {taken[int(0.95 * CHANGES)]:.0f} ms"
        )


if __name__ == "__main__":
    main(sys.argv[1:] or [str(ROOT / r) for r in RECIPES])
