"""Whether the code of a federation's folder is what effc writes: Flower imports all that it finds there."""

import re
import tempfile
from pathlib import Path

from ....dsl.syntax.diagnostics import Fault
from .app import PACKAGE, write_flower_app
from .declaration import Declaration

foreign_code = Fault(
    "foreign-code",
    "A federation was to be deployed with code that effc did not write.\n\n"
    "Flower runs the Python files of the folder, on the server and on every node. effc's own say where "
    "federation.json lies and no more; others may do anything. `--trust-remote-code` runs them.",
    exit="environment",
)
_START = f"{PACKAGE}/__init__.py"
_DOCSTRING = re.compile(rb'"""The Flower App of the federation [\w. -]{0,200}\."""\n')
_CODE = re.compile(r"\.(py[a-z]?|so[.\d]*|pth|dll|dylib)$|^setup\.cfg$|^hatch\.toml$", re.I)


def refuse_foreign_code(folder: Path, declaration: Declaration) -> None:
    """Raises Reject (foreign-code) for code, or what says how it is built, other than `write_flower_app` makes of the
    declaration."""
    with tempfile.TemporaryDirectory() as scratch:
        write_flower_app(declaration, "", Path(scratch))
        expected = {
            name: Path(scratch, name).read_bytes()
            for name in (*_executable_file_paths(Path(scratch)), "pyproject.toml")
        }
    present = {*_executable_file_paths(folder), "pyproject.toml"}
    for name in sorted(present | expected.keys()):
        file = folder / name
        content = file.read_bytes() if file.is_file() and not file.is_symlink() else None
        if content is None or (
            not _DOCSTRING.fullmatch(content)
            if name == _START
            else _with_current_import_paths(content) != expected.get(name)
        ):
            raise foreign_code(
                f"{file} is {'not there' if content is None else 'not what effc writes'}",
                help="compile the federation again; --trust-remote-code runs it as it is",
            ).rejection()


def _with_current_import_paths(code: bytes) -> bytes:
    """Code as this version writes it: 0.1 had its Flower part at another path."""
    return code.replace(b"effc.compiler.federation", b"effc.compiler.apps.federation")


def _executable_file_paths(folder: Path) -> set[str]:
    """All that Python or a build would run, in caches and hidden folders, too."""
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if _CODE.search(f.name)}
