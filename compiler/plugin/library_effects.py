"""Measured effects of the library's recipes, from a file that `bench/recipes.py` writes."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..core.quantity import change_text, count_text, measurement_text
from ..core.safe_read import read_json
from .recipe_library import LibraryFile, library_folders

FILE = "effects.json"
FORMAT = 1
MAX_FILE_BYTES = 1 << 20  # bytes of the file
RANDOM = "random weights: this says that it runs, and nothing of quality"
NO_EFFECT = "it compiles; what it gives shows where it is run"
_DOC = re.compile(r'^""".*?"""', re.S | re.M)
_COMMENT = re.compile(r"^\s*#.*$", re.M)


class MetricValue(NamedTuple):
    """A metric of something that was compiled, and the original's where it was measured."""

    unit: str
    original: float | None
    compiled: float


Points = dict[str, dict[str, MetricValue]]  # a point of a front, "" of what is no front -> metric -> its value


@dataclass(frozen=True)
class Effect:
    """Effect of one recipe on one model.

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

    @property
    def model(self) -> str:
        return f"{self.on} in place of {self.stands_for}" if self.stands_for else self.on

    def text(self) -> str:
        """`tiny-llama: params 1.84 M -> 1.55 M (-15.4 %), ...`; of a front how far its choices reach."""
        parts = [
            (name, _front_range_line(points) if set(points) != {""} else _metric_changes_line(points[""]))
            for name, points in self._distinct_results()
        ]
        summary = "; ".join(f"{name}: {line}" if len(parts) > 1 else line for name, line in parts) or NO_EFFECT
        return f"{self.model}: {summary}" + (f" ({RANDOM})" if self.random else "")

    def table(self) -> str:
        """Table with every choice of a front, or a line for each metric of other results."""
        lines = [self.model + (f" ({RANDOM})" if self.random else "")]
        for name, points in self._distinct_results():
            named = [name] if len(self._distinct_results()) > 1 or set(points) != {""} else [""]
            cells = _front_table_rows(points, *named) if set(points) != {""} else _metric_table_rows(points[""], *named)
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        return "\n".join(lines if self.rows else [*lines, f"  {NO_EFFECT}"])

    def _distinct_results(self) -> list[tuple[str, Points]]:
        """Artifacts with their points, each once: a front and the family that it was chosen from say the same."""
        by_artifact: dict[str, Points] = {}
        for artifact, metric, unit, original, compiled in self.rows:
            metric, _, point = metric.partition(" of ")
            if not point:
                artifact, _, point = artifact.partition("/")
            values = by_artifact.setdefault(artifact, {}).setdefault(point, {})
            values.setdefault(metric, MetricValue(unit, original, compiled))
        distinct: list[tuple[str, Points]] = []
        for name, points in by_artifact.items():
            if not any(_are_equal_fronts(points, other) for _, other in distinct):
                distinct.append((name, points))
        return distinct


def _are_equal_fronts(points: Points, other: Points) -> bool:
    return _front_table_rows(points, "") == _front_table_rows(other, "") and set(points) != {""}


def _metric_changes_line(values: Mapping[str, MetricValue]) -> str:
    """`params 1.84 M -> 1.55 M (-15.4 %), ...`."""
    parts = []
    for metric, (unit, original, compiled) in values.items():
        if original is None:
            parts.append(f"{metric} {measurement_text(compiled, unit)}")
        else:
            before, after = (measurement_text(value, unit) for value in (original, compiled))
            parts.append(f"{metric} {before} -> {after} ({change_text(original, compiled)})")
    return ", ".join(parts)


def _front_range_line(points: Points) -> str:
    """`4 choices: params 428.4 k to 1.84 M (was 1.84 M), ...`."""
    by_metric: dict[str, list[MetricValue]] = {}
    for values in points.values():
        for metric, value in values.items():
            by_metric.setdefault(metric, []).append(value)
    parts = []
    for metric, each in by_metric.items():
        extremes = dict.fromkeys(measurement_text(end(v.compiled for v in each), each[0].unit) for end in (min, max))
        known = [f" (was {measurement_text(v.original, v.unit)})" for v in each if v.original is not None]
        parts.append(f"{metric} {' to '.join(extremes)}{known[0] if known else ''}")
    return f"{count_text(len(points), 'choice')}: {', '.join(parts)}"


def _front_table_rows(points: Points, name: str) -> list[list[str]]:
    """A line for each point: its name and its numbers; the original's before them."""
    metrics = list(dict.fromkeys(metric for values in points.values() for metric in values))
    first = {
        metric: measurement_text(v.original, v.unit)
        for values in points.values()
        for metric, v in values.items()
        if v.original is not None
    }
    lines = [["original", *(first.get(metric, "") for metric in metrics)]]
    for point, values in points.items():
        numbers = (measurement_text(values[m].compiled, values[m].unit) if m in values else "" for m in metrics)
        lines.append([point, *numbers])
    return [[name, *metrics], *(lines if first else lines[1:])]


def _metric_table_rows(values: Mapping[str, MetricValue], name: str) -> list[list[str]]:
    """A line for each metric: the original's, the compiled one's, how far they are apart."""
    rows = [[name, "original", "compiled", ""]]
    for metric, (unit, original, compiled) in values.items():
        before = ["", ""] if original is None else [measurement_text(original, unit), change_text(original, compiled)]
        rows.append([metric, before[0], measurement_text(compiled, unit), before[1]])
    return rows


@dataclass
class Effects:
    """The file. Keys of `stored` are names of recipes; `of` is what the recipe said when it was measured."""

    machines: list[Mapping[str, Any]] = field(default_factory=list)
    stored: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def read(file: Path | None = None) -> "Effects":
        file = file or effects_path()
        if not file.exists():
            return Effects()
        body = read_json(file, MAX_FILE_BYTES)
        return Effects(body["machines"], body["recipes"])

    def effects_of_recipe(self, recipe: LibraryFile) -> tuple[Effect, ...]:
        """Effects of a recipe in its current text; none where it was changed since."""
        entry = self.stored.get(short_name(recipe))
        if entry is None or entry["of"] != recipe_text_hash(recipe):
            return ()
        return tuple(Effect(**row | {"rows": tuple(map(tuple, row["rows"]))}) for row in entry["effects"])

    def add(self, recipe: LibraryFile, effect: Effect) -> None:
        """Keep an effect, in the place of an older one on the same model."""
        remaining = [e for e in self.effects_of_recipe(recipe) if e.on != effect.on]
        rows = [asdict(e) for e in sorted([*remaining, effect], key=lambda e: (not e.on.startswith("tiny"), e.on))]
        self.stored[short_name(recipe)] = {"of": recipe_text_hash(recipe), "effects": rows}

    def get_or_add_machine_index(self, facts: Mapping[str, Any]) -> int:
        """Index of a machine in the file, which gets it where it has not."""
        if facts not in self.machines:
            self.machines.append(facts)
        return self.machines.index(facts)

    def machine_and_versions_text(self, effect: Effect) -> str:
        """The machine and the versions, in a line."""
        facts = self.machines[effect.machine]
        threads = f"{facts['threads']} thread" + ("s" if facts["threads"] != 1 else "")
        shared = ", which others used as well" if facts.get("shared") else ""
        versions = f"torch {facts['torch']}, transformers {facts['transformers']}"
        return f"{facts['cpu']} ({facts['isa']}{shared}), {threads}, {versions}, seed {effect.seed}"


def effects_path() -> Path:
    """Beside the recipes, in the folder that has them."""
    return library_folders()[0] / FILE


def short_name(recipe: LibraryFile) -> str:
    return recipe.name.removesuffix(".effspec")


def recipe_text_hash(recipe: LibraryFile) -> str:
    """A hash of what a recipe says, without its docstring, comments and spaces: those change no result."""
    text = _COMMENT.sub("", _DOC.sub("", recipe.text, count=1))
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]
