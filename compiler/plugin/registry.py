"""A name is a path: the folders of passes, targets, metrics, data and model sources.

`Registry` lists files of effc and of installed packages of plug-ins, reads headers without importing (for `check`) and
imports one file when it is used.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from ...dsl.checker.recipe import Invocation
from ...dsl.checker.values import MetricRef
from ...dsl.checker.vocabulary import Vocabulary, Word
from ...dsl.syntax.diagnostics import Diagnostic
from .plugin_packages import invalid_plugin, plugin_folders

# kind -> folders of its files, below effc's packages
SHELVES = {
    "pass": ("passes",),
    "target": ("compiler/targets", "compiler/apps/federation/targets", "compiler/apps/rttc/targets"),
    "metric": ("compiler/evaluation/metrics",),
    "data": ("compiler/inputs/data",),
    "model": ("compiler/inputs/sources",),
}


class Plugins(Mapping[str, Word]):
    """Words of one kind by dotted name, which is the path below one of its folders; a header is read at first use.

    modules   name -> the module that defines it
    """

    def __init__(self, kind: str, folders: Mapping[str, Path]):
        self.kind, self.read = kind, dict[str, Word]()
        files = [(package, root, f) for package, root in folders.items() for f in sorted(root.rglob("*.py"))]
        names = [(".".join(f.relative_to(root).with_suffix("").parts), package, f) for package, root, f in files]
        public = [entry for entry in sorted(names) if not any(p.startswith("_") for p in entry[0].split("."))]
        self.paths: dict[str, Path] = {}
        self.modules: dict[str, str] = {}
        for name, package, file in public:
            if name in self.paths:
                raise invalid_plugin(
                    f"the {kind} `{name}` is in {self.paths[name]} and in {file}",
                    help="a package names its plug-ins below a folder of its own name, such as `acme.halve`",
                ).rejection()
            self.paths[name], self.modules[name] = file, f"{package}.{name}"

    def __getitem__(self, name: str) -> Word:
        if name not in self.read:
            from .header import read_plugin_header

            try:
                self.read[name] = read_plugin_header(
                    self.kind, name, self.paths[name], self.modules[name].partition(".")[0]
                )
            except (AssertionError, SyntaxError, ValueError, TypeError, RecursionError) as error:
                if self.modules[name].startswith("effc."):
                    raise  # a mistake of effc
                raise _unreadable_header_diagnostic(self.kind, name, self.paths[name], error).rejection() from error
        return self.read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


class Registry:
    """All shelves. `make` turns a checked invocation into the object its file defines."""

    @cached_property
    def vocabulary(self) -> Vocabulary:
        roots = {
            kind: {**_package_source_folders(folders), **plugin_folders(kind)} for kind, folders in SHELVES.items()
        }
        return Vocabulary({kind: Plugins(kind, folders) for kind, folders in roots.items()})

    def import_plugin_class(self, kind: str, name: str) -> type:
        """The class of a word; imports its file. A metric `decode.p50` lives in evaluation/metrics/decode/p50.py."""
        from .interfaces import Plugin as Base

        words = self.vocabulary.words(kind)
        assert isinstance(words, Plugins)
        module = _import_or_reject(kind, name, words.modules[name])
        defined = [
            v
            for v in vars(module).values()
            if isinstance(v, type) and issubclass(v, Base) and v.__module__ == module.__name__
        ]
        assert len(defined) == 1, f"{module.__name__} defines {len(defined)} words, not one"
        return defined[0]

    def describes_artifacts(self, target: str) -> bool:
        """Whether a target writes of artifacts, and none itself."""
        word = self.vocabulary.word("target", target)
        return bool(word and word.facts.get("describes_artifacts"))

    def make(self, kind: str, call: Invocation) -> Any:
        return self.import_plugin_class(kind, call.word)(**call.args)

    def metric(self, ref: MetricRef) -> Any:
        return self.import_plugin_class("metric", ref.name)(**dict(ref.args))


def _import_or_reject(kind: str, name: str, module: str) -> ModuleType:
    """Module of a plug-in. Raises Reject (bad-plugin) where a package's code can't be imported."""
    if module.startswith("effc."):
        return import_module(module)
    try:
        return import_module(module)
    except Exception as error:  # whatever the code of a package raises
        raise invalid_plugin(
            f"the {kind} `{name}` can't be imported from {module}: {type(error).__name__}: {error}",
            help="--debug shows where; install another version of its package",
        ).rejection() from error


def _unreadable_header_diagnostic(kind: str, name: str, file: Path, error: Exception) -> Diagnostic:
    return invalid_plugin(
        f"the header of the {kind} `{name}` can't be read: {error}",
        help=f"a header is literal, since {file.name} is not imported to check a recipe; docs/plugins.md shows one",
    )


def _package_source_folders(folders: Sequence[str]) -> dict[str, Path]:
    """Package -> folder on disk. An editable install has several roots of a package; one of them has the sources."""
    roots = {}
    for folder in folders:
        top, *inner = folder.split("/")
        spec = find_spec(f"effc.{top}")
        assert spec and spec.submodule_search_locations, f"effc.{top} is not installed"
        candidates = [Path(p).joinpath(*inner) for p in spec.submodule_search_locations]
        package = ".".join(("effc", top, *inner))
        roots[package] = next((c for c in candidates if any(c.glob("*.py"))), candidates[0])
    return roots
