"""`effspec.lock`, the file: TOML beside a recipe, written by effc and compared by people in diffs.

format = 1
[recipes."slim.effspec"]    a line for all that decides the artifact: analysis/planning/lock.py
[packages.NAME]             where a package came from and the hash of its tree: plugin/recipe_packages.py
"""

import json
from collections.abc import Mapping
from pathlib import Path

from ...dsl.syntax.diagnostics import Fault, Reject
from ..core.cache import write_atomic
from ..core.safe_read import MIB, read_toml

NAME = "effspec.lock"
FORMAT = 1
TABLES = ("recipes", "packages")
_HEAD = "# Written by `effc lock` and `effc add`: what a recipe depends on. Keep it under version control.\n"

broken_lock = Fault("broken-lock", "The file `effspec.lock` is not one that effc writes.", exit="usage")

Facts = Mapping[str, str]
Lock = dict[str, dict[str, dict[str, str]]]  # table -> recipe or package -> line -> value


def read_package_lock(folder: Path) -> Lock:
    """The lock in a folder, empty where there is none. Raises Reject (broken-lock, odd-file)."""
    file = folder / NAME
    try:
        body = read_toml(file, 16 * MIB)
    except FileNotFoundError:
        return {table: {} for table in TABLES}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)[:120]
        raise Reject(broken_lock(f"{file} is no TOML that can be read: {reason}", help=_REMEDY)) from error
    number = body.pop("format", None)
    if type(number) is not int or number != FORMAT:
        raise Reject(broken_lock(f"{file} is of format {number}, this effc reads {FORMAT}", help=_REMEDY))
    if not all(_is_table(body.get(table, {})) for table in TABLES) or set(body) - set(TABLES):
        raise Reject(broken_lock(f"{file} holds something else than lines of text in tables", help=_REMEDY))
    return {table: body.get(table, {}) for table in TABLES}


_REMEDY = "write it again with `effc lock RECIPE`, or restore it from version control"


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(facts, dict) and all(isinstance(text, str) and text.isprintable() for text in facts.values())
        for facts in value.values()
    )


def write_package_lock(folder: Path, lock: Lock) -> Path:
    """Write a lock whole; the same content gives the same bytes."""
    lines = [_HEAD, f"format = {FORMAT}\n"]
    for table in TABLES:
        for name, facts in sorted(lock.get(table, {}).items()):
            lines.append(f"\n[{table}.{_text(name)}]\n")
            lines += [f"{_text(key)} = {_text(value)}\n" for key, value in facts.items()]
    write_atomic(folder / NAME, "".join(lines).encode())
    return folder / NAME


def _text(value: str) -> str:
    """A basic string of TOML: JSON's escapes are among its own, but for those of lone surrogates."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
