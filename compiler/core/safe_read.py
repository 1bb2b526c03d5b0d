"""Files of folders that may come from anybody: regular ones alone, of a size that their kind can have."""

import json
import os
import re
import stat
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ...dsl.syntax.diagnostics import Fault

irregular_file = Fault(
    "odd-file",
    "A file of a model, an artifact or a cache is no ordinary file, leads out of its folder, or is far too large.\n\n"
    "Such folders may come from anybody: a link to a device would be read without end, and a pipe waits for ever.",
    exit="environment",
)

MIB = 1 << 20
CONFIG, MANIFEST, TOKENIZER = 16 * MIB, 256 * MIB, 512 * MIB  # bytes: the largest that a file of the kind has
_SPARSE = 1 << 34  # bytes above which a file of holes, which costs nothing to send, takes minutes to be hashed
DATA = 1 << 36  # bytes of a text that somebody learns from
_DEEPEST = 100  # of lists and objects in JSON: what effc and transformers write has a tenth of it
# What it raises to take data apart that is of another form than was thought.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # that half of a pair may be, as JSON writes it
_PARTS = 500  # dots of a line of TOML
_DIGITS = 300  # of a whole number
_HELP = "name an ordinary file; if it came with a folder, fetch that again from somebody whom you trust"


class Unlisted(ValueError):
    """Something that is on no list of what effc's own graphs and programs have; the text says what."""


def require_or_unlisted(condition: bool, content: str) -> None:
    """Raises Unlisted with the content where a condition does not hold."""
    if not condition:
        raise Unlisted(content)


def read_regular_file(path: Path, max_bytes: int, root: Path | None = None) -> bytes:
    """The bytes of a regular file of at most `max_bytes` bytes. Raises OSError as `open` does, and Reject (odd-file).

    root   a folder that links may not lead out of
    """
    refuse_irregular_file(path, max_bytes, root)
    with open_regular(path) as file:
        data = file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)
    if len(data) > max_bytes:
        raise irregular_file(f"{path} has more than {max_bytes} bytes", help=_HELP).rejection()
    return data


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """A file opened without waiting for anybody. Raises Reject (odd-file) where that opened no regular one."""
    with open(path, "rb", opener=_open_nonblocking) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # exchanged since it was looked at
            raise irregular_file(f"{path} is no ordinary file", help=_HELP).rejection()
        yield file


def refuse_unsafe_write_folder(folder: Path) -> None:
    """Raises Reject (odd-file) for a folder that we are about to write to which is a link, or holds a link, a pipe, a
    file with a second name or one of another user: whoever left it there would have us write elsewhere.

    A folder that does not exist yet is none of these.
    """
    for path in (folder, *folder.rglob("*")):
        try:
            fact = path.lstat()
        except FileNotFoundError:  # processes that still run take away what they are done with
            continue
        if not (stat.S_ISDIR(fact.st_mode) or stat.S_ISREG(fact.st_mode)):
            raise irregular_file(f"{path} is a link, or no ordinary file", help="remove it").rejection()
        if stat.S_ISREG(fact.st_mode) and fact.st_nlink > 1:
            raise irregular_file(
                f"{path} is a file that has another name, too", help="remove it, or copy it"
            ).rejection()
        if hasattr(os, "geteuid") and fact.st_uid != os.geteuid():
            raise irregular_file(
                f"{path} belongs to another user", help="remove it, or take a folder of your own"
            ).rejection()


def read_json(path: Path, max_bytes: int, root: Path | None = None) -> Any:
    """The JSON of a regular file, as `read_regular_file` and `parse_strict_json` read it."""
    return parse_strict_json(read_regular_file(path, max_bytes, root))


def parse_strict_json(data: bytes | str) -> Any:
    """JSON that has one meaning: raises ValueError for a name that stands twice in an object, deep nesting, and whole
    numbers of more than 300 digits, too: no fraction is as large, so that arithmetic of both would break. So does half
    of a surrogate pair, which no UTF-8 holds.

    Readers differ in which of two they take, so that one could check what another uses.
    """
    text = data if isinstance(data, str) else data.decode()
    try:
        parsed = json.loads(text, object_pairs_hook=_dict_without_duplicate_keys, parse_int=_parse_short_int)
        if _SURROGATE.search(text):
            _refuse_lone_surrogates(parsed)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    level = [parsed]
    for _ in range(_DEEPEST):
        level = [item for value in level for item in _values_of_container(value)]
        if not level:
            return parsed
    raise ValueError("it is nested too deep")


def read_toml(path: Path, max_bytes: int, root: Path | None = None) -> dict[str, Any]:
    """The TOML of a regular file. Raises ValueError for what is none, and for keys of hundreds of parts, too: tomllib
    takes the square of their number of steps."""
    text = read_regular_file(path, max_bytes, root).decode()
    if any(line.count(".") > _PARTS for line in text.split("\n")):
        raise ValueError("a key has too many parts")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _refuse_lone_surrogates(parsed: Any) -> None:
    try:
        json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a string holds half of a surrogate pair, which UTF-8 cannot hold") from error


def _parse_short_int(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _dict_without_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"`{names.most_common(1)[0][0][:80]}` stands twice in one object")
    return fields


def _values_of_container(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def refuse_irregular_file(path: Path, max_bytes: int | None = None, root: Path | None = None) -> None:
    """Raises Reject (odd-file) unless a file is one that `read_regular_file` would read, OSError where there is
    none."""
    fact = path.stat()
    if stat.S_ISDIR(fact.st_mode):
        raise IsADirectoryError(21, "Is a directory", str(path))
    if not stat.S_ISREG(fact.st_mode):
        raise irregular_file(f"{path} is no ordinary file", help=_HELP).rejection()
    if root is not None and not path.resolve().is_relative_to(root.resolve()):
        raise irregular_file(f"{path} is a link that leads out of {root}", help=_HELP).rejection()
    if fact.st_size > _SPARSE and getattr(fact, "st_blocks", fact.st_size) * 512 < fact.st_size >> 6:
        raise irregular_file(
            f"{path} has {fact.st_size} bytes, of which its disk holds next to none", help=_HELP
        ).rejection()
    if max_bytes is not None and fact.st_size > max_bytes:
        raise irregular_file(f"{path} has {fact.st_size} bytes, more than such a file can have", help=_HELP).rejection()


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
