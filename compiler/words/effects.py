"""What recipes of the library gave where they were measured, from a file that `tests/bench/recipes.py` writes."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..report.quantity import change, measured
from ..store.regular import read_json
from .library import Shipped, folders

FILE = "effects.json"
FORMAT = 1
MOST = 1 << 20  # bytes of the file
RANDOM = "random weights: this says that it runs, and nothing of quality"
_DOC = re.compile(r'^""".*?"""', re.S | re.M)
_COMMENT = re.compile(r"^\s*#.*$", re.M)


@dataclass(frozen=True)
class Effect:
    """What one recipe gave on one model.

    on        the model; `stands_for` what the recipe names, where that is not at hand
    random    whether its weights were drawn
    machine   number of the machine's facts in the file
    seconds   of the compile, of a cache that was empty
    rows      [artifact or point of a front, metric, unit, original or None, compiled]: none where a compile computes no
              result, as of federations
    """

    on: str
    machine: int
    seed: int
    seconds: float
    stands_for: str = ""
    random: bool = False
    rows: tuple[tuple[str, str, str, float | None, float], ...] = ()

    def text(self) -> str:
        """`tiny-llama: params 1.84 M -> 1.55 M (-15.4 %), ...`."""
        of: dict[str, list[str]] = {}
        for artifact, metric, unit, original, compiled in self.rows:
            now = measured(compiled, unit)
            text = now if original is None else f"{measured(original, unit)} -> {now}"
            moved = "" if original is None else change(original, compiled)
            of.setdefault(artifact, []).append(f"{metric} {text}" + (f" ({moved})" if moved else ""))
        told = [", ".join(parts) for parts in of.values()]
        if len(of) > 1:
            told = [f"{name}: {parts}" for name, parts in zip(of, told, strict=True)]
        what = "; ".join(told) or "it compiles; what it gives shows where it is run"
        model = f"{self.on} in place of {self.stands_for}" if self.stands_for else self.on
        return f"{model}: {what}" + (f" ({RANDOM})" if self.random else "")


@dataclass
class Effects:
    """The file. Keys of `kept` are names of recipes; `of` is what the recipe said when it was measured."""

    machines: list[Mapping[str, Any]] = field(default_factory=list)
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def read(file: Path | None = None) -> "Effects":
        file = file or place()
        if not file.exists():
            return Effects()
        body = read_json(file, MOST)
        return Effects(body["machines"], body["recipes"])

    def of(self, recipe: Shipped) -> tuple[Effect, ...]:
        """What is known of a recipe as it is now: nothing where it was changed since."""
        found = self.kept.get(short(recipe))
        if found is None or found["of"] != meaning(recipe):
            return ()
        return tuple(Effect(**row | {"rows": tuple(map(tuple, row["rows"]))}) for row in found["effects"])

    def add(self, recipe: Shipped, effect: Effect) -> None:
        """Keep an effect, in the place of an older one on the same model."""
        others = [e for e in self.of(recipe) if e.on != effect.on]
        rows = [asdict(e) for e in sorted([*others, effect], key=lambda e: (not e.on.startswith("tiny"), e.on))]
        self.kept[short(recipe)] = {"of": meaning(recipe), "effects": rows}

    def machine(self, facts: Mapping[str, Any]) -> int:
        if facts not in self.machines:
            self.machines.append(facts)
        return self.machines.index(facts)

    def where(self, effect: Effect) -> str:
        """The machine and the versions, in a line."""
        facts = self.machines[effect.machine]
        threads = f"{facts['threads']} thread" + ("s" if facts["threads"] != 1 else "")
        shared = ", which others used as well" if facts.get("shared") else ""
        versions = f"torch {facts['torch']}, transformers {facts['transformers']}"
        return f"{facts['cpu']} ({facts['isa']}{shared}), {threads}, {versions}, seed {effect.seed}"


def place() -> Path:
    """Beside the recipes, in the folder that has them."""
    return folders()[0] / FILE


def short(recipe: Shipped) -> str:
    return recipe.name.removesuffix(".effspec")


def meaning(recipe: Shipped) -> str:
    """A hash of what a recipe says, without its docstring, comments and spaces: those change no result."""
    text = _COMMENT.sub("", _DOC.sub("", recipe.text, count=1))
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]
