"""The recipes that an editor has open, and what they have in common: words, models, files on disk."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

from pygls import uris
from pygls.exceptions import JsonRpcInvalidParams

from ....dsl.checker.recipe import Recipe
from ....dsl.checker.skeleton import Skeleton
from ....dsl.checker.vocabulary import Vocabulary
from ....dsl.syntax import ast
from ....dsl.syntax.diagnostics import Diagnostic, Reject
from ....dsl.syntax.parse import parse, read_source
from ....dsl.syntax.source import Source
from ...core.cache import default_cache_folder
from ...core.settings import Settings
from ...driver.api import unseen_model
from ...plugin.registry import Registry
from .models import EditorSession, Models
from .positions import Lines


@dataclass(frozen=True)
class Reading:
    """A recipe at one moment: its text, and what `effc check` says of it."""

    path: Path
    source: Source
    diagnostics: tuple[Diagnostic, ...] = ()
    recipes: tuple[Recipe, ...] = ()
    skeletons: tuple[Skeleton, ...] = ()

    @cached_property
    def lines(self) -> Lines:
        return Lines(self.source.text)

    @cached_property
    def file(self) -> ast.File:
        return parse(self.source).file


@dataclass
class OpenDocuments:
    """Open documents by resolved path. A model's structure is looked up once, until a file is saved."""

    texts: dict[Path, str] = field(default_factory=dict)
    readings: dict[Path, Reading] = field(default_factory=dict)
    registry: Registry = field(default_factory=Registry)
    origins: dict = field(default_factory=dict)
    models: Models = field(default_factory=Models)
    stale: set[Path] = field(default_factory=set)  # texts that have changed since they were read

    @property
    def vocabulary(self) -> Vocabulary:
        return self.registry.vocabulary

    def session(self, path: Path) -> EditorSession:
        """As `effc check` would read the file, with the texts that are open in place of those on disk. Offline."""
        settings = Settings(cache_dir=default_cache_folder(), offline=True)
        return EditorSession(
            path, settings, registry=self.registry, origins=self.origins, texts=self.texts, models=self.models
        )

    def open_and_check(self, path: Path, text: str) -> Reading:
        """Take a text that is open, and read it."""
        self.texts[path] = text
        return self.check_open_text(path)

    def current_reading(self, path: Path) -> Reading:
        """An open text as it is now."""
        return self.check_open_text(path) if path in self.stale or path not in self.readings else self.readings[path]

    def check_open_text(self, path: Path) -> Reading:
        """Check a text that is open. Models that a torn recipe no longer tells of are those that it had before."""
        self.stale.discard(path)
        before = self.readings.get(path)
        source, session = Source(str(path), self.texts[path]), self.session(path)
        try:
            checked = session.check()
            diagnostics, recipes = checked.diagnostics, checked.recipes
        except Reject as rejection:
            diagnostics, recipes = rejection.diagnostics, ()
        diagnostics = tuple(d for d in diagnostics if d.fault is not unseen_model or d.span not in session.awaited)
        skeletons = tuple(session.skeletons) or (before.skeletons if before else ())
        self.readings[path] = Reading(path, source, diagnostics, recipes, skeletons)
        return self.readings[path]

    def check_closed_file(self, path: Path) -> Reading:
        """Check a file that is not open, as it lies on disk now; nothing of it is kept. Raises Reject."""
        self.texts[path] = read_source(path).text
        try:
            return self.check_open_text(path)
        finally:
            self.close(path)

    def close(self, path: Path) -> None:
        self.texts.pop(path, None)
        self.readings.pop(path, None)

    def forget_models(self) -> None:
        """Files have changed on disk: models are looked up again."""
        self.origins.clear()
        self.models.forget()

    def parse_any_file(self, path: Path) -> Reading | None:
        """A file that need not be open, without its diagnostics; None where it can't be read."""
        if path in self.texts:
            return self.current_reading(path)
        try:
            return Reading(path, read_source(path))
        except Reject:
            return None

    def module_path(self, module_name: str, using_file: Path) -> Path | None:
        """The file of a module that the file `using_file` uses."""
        try:
            source = self.session(using_file).read_library_module(module_name)
        except Reject:
            return None
        return None if source is None or source.foreign else Path(source.name).resolve()


def path_of(uri: str) -> Path:
    """The file of a document; one that was never saved is named after its address."""
    if "\0" in unquote(uri):
        raise JsonRpcInvalidParams("an address with a zero byte is none of a file")
    fs_path = uris.to_fs_path(uri) if uri.startswith("file:") else None
    return Path(fs_path or Path.cwd() / f"{uri.rpartition('/')[2].rpartition(':')[2] or 'untitled'}.effspec").resolve()
