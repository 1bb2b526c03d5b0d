"""Read recipe files."""

import codecs
import os
import stat
from pathlib import Path

from .diagnostics import Diagnostic, Fault
from .source import Source, Span

no_recipe = Fault("no-recipe", "The recipe file does not exist.", exit="usage")
recipe_is_folder = Fault("recipe-is-folder", "A folder is given where a recipe file is expected.", exit="usage")
unreadable_recipe = Fault("unreadable-recipe", "The system does not let effc read the recipe file.", exit="usage")
binary_recipe = Fault("binary-recipe", "The recipe file holds bytes that no text has.")
not_utf_8 = Fault("not-utf-8", "The recipe file is text in an encoding other than UTF-8.")
recipe_too_large = Fault("recipe-too-large", "The recipe file is larger than a recipe may be.")

LIMIT = 128 * 1024  # bytes of a recipe


def read_source(path: str | Path) -> Source:
    """The text of a recipe file, its line ends as they are and without byte order mark. Raises Reject."""
    file = Path(path)
    try:
        with open(file, "rb", opener=_open_without_blocking) as opened:
            fact = os.fstat(opened.fileno())
            if not (stat.S_ISREG(fact.st_mode) or stat.S_ISDIR(fact.st_mode)):
                raise unreadable_recipe(
                    f"`{path}` is {_irregular_kind(fact.st_mode)}, not a file",
                    help="save the recipe in a file, and give its path",
                ).rejection()
            data = opened.read(LIMIT + 1)
        size = len(data) if len(data) <= LIMIT else fact.st_size
    except FileNotFoundError:
        raise no_recipe(f"there is no file `{path}`", help=_similar_path_remedy(file)).rejection() from None
    except IsADirectoryError:
        inside = sorted(p.name for p in file.glob("*.effspec"))[:3]
        raise recipe_is_folder(
            f"`{path}` is a folder",
            help="it holds " + ", ".join(f"`{name}`" for name in inside)
            if inside
            else "give the path of an `.effspec` file",
        ).rejection() from None
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise unreadable_recipe(f"`{path}` cannot be read: {reason}").rejection() from None
    if b"\0" in data[:8192] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):  # the marks of UTF-16
        raise binary_recipe(f"`{path}` is a binary file", help="a recipe is text in UTF-8").rejection()
    if len(data) > LIMIT:
        raise too_large_diagnostic(str(path), size).rejection()
    try:
        return Source(str(path), data.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8_diagnostic(str(path), data, error).rejection() from None


def _open_without_blocking(path: str, flags: int) -> int:
    """A pipe is opened at once, where a plain `open` waits until somebody writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _irregular_kind(mode: int) -> str:
    known = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISDIR, "a folder"))
    return next((name for is_kind, name in known if is_kind(mode)), "a device")


def irregular_kind_of_path(path: Path) -> str:
    """Kind of a path that is no regular file, as `a pipe`; "" for a file, and where nothing exists."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return ""
    return "" if stat.S_ISREG(mode) else _irregular_kind(mode)


def too_large_diagnostic(name: str, size: int) -> Diagnostic:
    return recipe_too_large(
        f"`{name}` has {size:,} bytes; a recipe has at most {LIMIT:,}",
        help="read long lists from files that the recipe names",
    )


def _not_utf8_diagnostic(name: str, data: bytes, error: UnicodeDecodeError) -> Diagnostic:
    text = data.removeprefix(codecs.BOM_UTF8)
    good = Source(name, text[: error.start].decode("utf-8"))
    line, column = good.position(len(good.text))
    return not_utf_8(
        f"byte {len(data) - len(text) + error.start + 1:,} of `{name}` (line {line}, column {column}) is not UTF-8",
        Span(Source(name, text.decode("utf-8", errors="replace")), len(good.text), len(good.text) + 1),
        help="save the file as UTF-8",
    )


def _similar_path_remedy(file: Path) -> str:
    """A remedy for a path that leads nowhere."""
    from difflib import get_close_matches

    try:
        stems = [p.stem for p in file.parent.glob("*.effspec") if p.is_file()][:500]
    except OSError:
        stems = []
    close = get_close_matches(file.stem, stems, n=1)  # without the ending, which all of them share
    return f"did you mean `{file.parent / close[0]}.effspec`?" if close else ""
