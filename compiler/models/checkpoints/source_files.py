"""Files that decide a model, held against what they were when they were hashed.

Weights are mapped from disk: whoever writes such a file while it is compiled changes the numbers that steps compute
from, and a result would be kept under the hash of other bytes.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from ....dsl.syntax.diagnostics import Fault
from ...core.cache import canonical_json_sha256
from ...core.hashes import cached_file_hash, sha256_of_file

model_changed = Fault(
    "model-changed",
    "A file of a model was written, exchanged or removed while the model was compiled.\n\n"
    "Weights are mapped from disk, so what was computed meanwhile may be of neither the old file nor the new one. "
    "Nothing of the step that ran is kept, and no artifact is put into place; results of steps before it hold.",
    exit="environment",
)

Fact = tuple[int, int, int, int]  # size, mtime and ctime in ns, inode


class SourceFiles:
    """Files by path, each as it was before it was hashed. A look at them all costs a `stat` each."""

    def __init__(self, cache_dir: Path):
        self.cache_dir = cache_dir
        self.facts: dict[Path, Fact] = {}
        self._hashes: dict[Path, str] = {}
        self._broken: Path | None = None  # one that changed stays so: what was computed meanwhile is of no use

    def hash(self, path: Path) -> str:
        """sha256 of a file, which is looked at from now on."""
        fact = _stat_fact(path)
        content = cached_file_hash(path, self.cache_dir)
        self.facts.setdefault(path, fact)
        if self._hashes.setdefault(path, content) != content:
            self._broken = path
        return content

    def hash_all(self, files: Mapping[str, Path]) -> str:
        """One hash over several files: their names and contents, not where they lie."""
        return canonical_json_sha256({name: self.hash(path) for name, path in files.items()})

    def is_touched(self) -> bool:
        """Whether a file may have changed."""
        return any(not path.exists() or _stat_fact(path) != fact for path, fact in self.facts.items())

    def refuse_changed_files(self) -> None:
        """Raises Reject (model-changed) where a file is no longer what was hashed.

        One that was touched is read again, past what is remembered by its times, which a copy may have kept.
        """
        for path, fact in self.facts.items():
            try:
                current = _stat_fact(path)
                if self._broken is None and current != fact and sha256_of_file(path) != self._hashes[path]:
                    self._broken = path
            except (FileNotFoundError, NotADirectoryError):
                self._broken = self._broken or path
                continue
            self.facts[path] = current
        if self._broken is not None:
            verb = "changed" if self._broken.exists() else "was removed"
            raise model_changed(
                f"{self._broken} {verb} while it was compiled", help="compile again once nothing writes to it"
            ).rejection()


def _stat_fact(path: Path) -> Fact:
    fact = os.stat(path)
    return fact.st_size, fact.st_mtime_ns, fact.st_ctime_ns, fact.st_ino


def link_root_of(folder: Path) -> Path:
    """Root that links of a model folder may not leave: the folder, or the hub's cache of that model."""
    cached = folder.parent.name == "snapshots" and (folder.parents[1] / "blobs").is_dir()
    return folder.parents[1] if cached else folder
