"""Recipe packages: folders of recipes and data by others, pinned in `effspec.lock` by the hash of their tree.

    effc-package.toml      name, version, sentence
    recipes/NAME.effspec   modules: `use edge.tight` is `recipes/tight.effspec` of the package `edge`

A package is data alone. `effc add` copies it into the cache under its hash; `effc vendor` copies it beside the recipe,
where it is found first. Nothing is fetched but by `effc add` and `effc update`; every use compares tree and hash.
"""

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ...dsl.syntax.source import Source
from ...dsl.syntax.source_file import read_source
from ..core.json_errors import reject_on_error
from ..core.safe_read import MIB, read_regular_file, read_toml
from . import lockfile

PACKAGE_FILE = "effc-package.toml"
VENDORED = "effspec_packages"
MAX_FILES, MAX_BYTES, DEEPEST = 2000, 256 * MIB, 16
DATA = (".effspec", ".toml", ".md", ".txt", ".json", ".jsonl", ".csv", ".safetensors", ".model", "")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
_RESERVED = ("std",)

invalid_package = Fault(
    "bad-package",
    "A folder is no recipe package, or holds what a package may not.\n\n"
    "A package has an `effc-package.toml` with `name` and `version`, recipes in `recipes/`, and data beside them: "
    "ordinary files of text, JSON or safetensors, no links and no code.",
    exit="environment",
)
package_gone = Fault(
    "package-gone",
    "A package that `effspec.lock` names is not on this machine.\n\n"
    "Nothing is fetched unasked: `effc add` without a source fetches what the lock names.",
    exit="environment",
)
package_edited = Fault(
    "package-edited",
    "The files of a package are not those that `effspec.lock` pins.\n\n"
    "`effc add` fetches it again; `effc update NAME` takes what its source holds now, and pins that.",
    exit="environment",
)


@dataclass(frozen=True)
class Package:
    """A package on disk. `tree` is the sha256 over the names and contents of its files."""

    name: str
    version: str
    sentence: str
    folder: Path
    tree: str


def read_recipe_package(folder: Path) -> Package:
    """A folder as a package. Raises Reject (bad-package)."""
    with reject_on_error(
        invalid_package,
        f"{folder / PACKAGE_FILE} is no TOML that can be read",
        'it is written like `name = "edge"` and `version = "1.0"`, a line each',
    ):
        body = read_toml(folder / PACKAGE_FILE, MIB, folder)
    name, version, sentence = (body.get(key, "") for key in ("name", "version", "sentence"))
    if not (isinstance(name, str) and _NAME.fullmatch(name) and name not in _RESERVED):
        message = f"{folder / PACKAGE_FILE} has no `name` that a recipe could use"
        raise invalid_package(
            message, help="lower-case letters, digits and `_`, such as `edge`; `std` is taken"
        ).rejection()
    if not all(isinstance(text, str) and text.isprintable() for text in (version, sentence)) or not version:
        raise invalid_package(
            f"{folder / PACKAGE_FILE} has no `version`, or one or a `sentence` of unprintable letters"
        ).rejection()
    return Package(name, version, sentence, folder, checked_tree_hash(folder))


def refuse_paths_outside_package(package: Package) -> None:
    """Raises Reject (outside-package) where a recipe of a package names what lies outside it: every use refuses that,
    and whoever adds it is to know at once."""
    from ...dsl.checker.package_paths import paths_outside_package
    from ...dsl.syntax.parse import parse

    faults: list[Diagnostic] = []
    for file in checked_package_files(package.folder):
        if file.suffix == ".effspec":
            source = read_source(file)
            source = Source(source.name, source.text, root=package.folder.as_posix())
            faults += paths_outside_package(parse(source).file)
    if faults:
        raise Reject(*faults)


def checked_tree_hash(folder: Path) -> str:
    """sha256 over the names and contents of a package's files. Raises Reject (bad-package) on what is no data."""
    hasher, size = hashlib.sha256(), 0
    for number, file in enumerate(checked_package_files(folder)):
        size += file.stat().st_size
        if number >= MAX_FILES or size > MAX_BYTES:
            raise too_large_diagnostic(str(folder)).rejection()
        name = file.relative_to(folder).as_posix()
        content = hashlib.sha256(read_regular_file(file, MAX_BYTES, folder)).hexdigest()
        hasher.update(f"{name}\0{content}\n".encode(errors="surrogateescape"))
    return hasher.hexdigest()


def too_large_diagnostic(label: str) -> Diagnostic:
    return invalid_package(f"{label} has more than {MAX_FILES} files or {MAX_BYTES >> 20} MiB")


def checked_package_files(folder: Path, depth: int = 0) -> Iterator[Path]:
    """Files of a package in order; those whose names begin with a dot are no part of it."""
    if depth > DEEPEST:
        raise invalid_package(f"{folder} lies more than {DEEPEST} folders deep in a package").rejection()
    for path in sorted(folder.iterdir()):
        mode = path.lstat().st_mode
        if path.name.startswith("."):
            continue
        if stat.S_ISDIR(mode):
            yield from checked_package_files(path, depth + 1)
        elif not stat.S_ISREG(mode):
            raise invalid_package(
                f"{path} is a link or no ordinary file", help="a package holds plain files"
            ).rejection()
        elif path.suffix not in DATA:
            raise invalid_package(f"{path} is no data: a package holds none of `{path.suffix}`").rejection()
        else:
            yield path


def copy_package(package: Package, destination: Path) -> None:
    """Copy a package's files; whole or not at all. One that is there already with this tree stays."""
    if destination.is_dir() and checked_tree_hash(destination) == package.tree:
        return
    draft = destination.with_name(f".{destination.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        for file in checked_package_files(package.folder):
            target = draft / file.relative_to(package.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(read_regular_file(file, MAX_BYTES, package.folder))
        if checked_tree_hash(draft) != package.tree:
            raise package_edited(f"{package.folder} changed while it was copied", help="add it again").rejection()
        shutil.rmtree(destination, ignore_errors=True)
        os.replace(draft, destination)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def cached_package_folder(cache: Path, tree_hash: str) -> Path:
    return cache / "packages" / tree_hash


def read_package_module(name: str, project: Path, cache: Path) -> Source | None:
    """The file that `use PACKAGE.NAME` means in a recipe of the folder `project`; None of no package."""
    package, _, module_name = name.partition(".")
    facts = lockfile.read_package_lock(project)["packages"].get(package) if (project / lockfile.NAME).exists() else None
    if facts is None or not module_name:
        return None
    root = verified_package_folder(package, facts, project, cache)
    file = root / "recipes" / f"{module_name.replace('.', '/')}.effspec"
    if not file.is_file():
        return None
    source = read_source(file)
    return Source(source.name, source.text, root=root.as_posix())


def verified_package_folder(
    name: str, facts: lockfile.Facts, project: Path, cache: Path, *, vendored: bool = True
) -> Path:
    """Folder of a locked package. Raises Reject where they are gone or are others.

    vendored   look beside the recipes first
    """
    tree = facts.get("tree", "")
    if not re.fullmatch(r"[0-9a-f]{64}", tree) or not _NAME.fullmatch(name):
        raise lockfile.broken_lock(f"the lock pins no tree of `{name}`", help="add the package again").rejection()
    beside = project / VENDORED / name
    candidates = [*([beside] if vendored else []), cached_package_folder(cache, tree)]
    root = next((p for p in candidates if p.is_dir()), None)
    if root is None:
        raise package_gone(
            f"the package `{name}` is not here", help="`effc add` fetches what the lock names"
        ).rejection()
    if checked_tree_hash(root) != tree:
        remedy = "`effc add` fetches it" + (", and `effc vendor` then copies it here" if root == beside else "")
        raise package_edited(f"{root} is not the `{name}` that effspec.lock pins", help=remedy).rejection()
    return root
