"""A name is a path: the shelves of passes, targets, metrics, data and model sources.

`Shelf` lists files, reads headers without importing (for `check`) and imports one file when it is used.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from ...dsl.recipe import Invocation
from ...dsl.values import MetricRef
from ...dsl.vocabulary import Vocabulary, Word

# kind -> (package below effc, folder below the repository's root)
SHELVES = {
    "pass": "passes",
    "target": "compiler/targets",
    "metric": "compiler/metrics",
    "data": "compiler/data",
    "model": "compiler/sources",
}


class Words(Mapping[str, Word]):
    """The words of one shelf by dotted name; a header is read when it is asked for."""

    def __init__(self, kind: str, folder: Path):
        self.kind, self.folder = kind, folder
        self.read: dict[str, Word] = {}

    @cached_property
    def paths(self) -> dict[str, Path]:
        files = sorted(self.folder.rglob("*.py")) if self.folder.is_dir() else []
        named = {".".join(f.relative_to(self.folder).with_suffix("").parts): f for f in files}
        return {name: f for name, f in named.items() if not any(p.startswith("_") for p in name.split("."))}

    def __getitem__(self, name: str) -> Word:
        if name not in self.read:
            from .header import read_header

            self.read[name] = read_header(self.kind, name, self.paths[name])
        return self.read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


class Shelf:
    """All shelves. `make` turns a checked invocation into the object its file defines."""

    @cached_property
    def vocabulary(self) -> Vocabulary:
        from importlib.util import find_spec

        by_kind = {}
        for kind, where in SHELVES.items():
            package, *rest = where.split("/")
            spec = find_spec(f"effc.{package}")
            assert spec and spec.submodule_search_locations, f"effc.{package} is not installed"
            roots = [Path(p).joinpath(*rest) for p in spec.submodule_search_locations]
            by_kind[kind] = Words(kind, next((r for r in roots if any(r.glob("*.py"))), roots[0]))
        return Vocabulary(by_kind)

    def load(self, kind: str, name: str) -> type:
        """The class of a word; imports its file. A metric `decode.p50` lives in metrics/decode/p50.py."""
        from .kinds import Word as Base

        module = import_module(f"effc.{SHELVES[kind].replace('/', '.')}.{name}")
        found = [
            v
            for v in vars(module).values()
            if isinstance(v, type) and issubclass(v, Base) and v.__module__ == module.__name__
        ]
        assert len(found) == 1, f"{module.__name__} defines {len(found)} words, not one"
        return found[0]

    def is_about(self, target: str) -> bool:
        """Whether a target writes of artifacts, and none itself."""
        word = self.vocabulary.word("target", target)
        return bool(word and word.facts.get("about"))

    def make(self, kind: str, call: Invocation) -> Any:
        return self.load(kind, call.word)(**call.args)

    def metric(self, ref: MetricRef) -> Any:
        return self.load("metric", ref.name)(**dict(ref.args))
