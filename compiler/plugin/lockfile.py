"""`effspec.lock`, the file: TOML beside a recipe, written by effc and compared by people in diffs.

format = 1
[recipes."slim.effspec"]    a line for all that decides the artifact: analysis/planning/lock.py
[packages.NAME]             where a package came from and the hash of its tree: plugin/recipe_packages.py
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...dsl.syntax.diagnostics import Fault
from ..core.cache import write_atomic
from ..core.safe_read import MIB, read_toml

NAME = "effspec.lock"
FORMAT = 1
TABLES = ("recipes", "packages")
_HEAD = "# Written by `effc lock` and `effc add`: what a recipe depends on. Keep it under version control.\n"

broken_lock = Fault("broken-lock", "The file `effspec.lock` is not one that effc writes.", exit="usage")

Facts = Mapping[str, str]
Lock = dict[str, dict[str, dict[str, Any]]]  # table -> recipe or package -> line -> value; of packages texts


def read_package_lock(folder: Path) -> Lock:
    """The lock in a folder, empty where there is none. Raises Reject (broken-lock, odd-file)."""
    file = folder / NAME
    try:
        body = read_toml(file, 16 * MIB)
    except FileNotFoundError:
        return {table: {} for table in TABLES}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)[:120]
        raise broken_lock(f"{file} is no TOML that can be read: {reason}", help=_REMEDY).rejection() from error
    number = body.pop("format", None)
    if type(number) is not int or number != FORMAT:
        raise broken_lock(f"{file} is of format {number}, this effc reads {FORMAT}", help=_REMEDY).rejection()
    if not all(_is_table(body.get(table, {}), table) for table in TABLES) or set(body) - set(TABLES):
        raise broken_lock(f"{file} holds something else than lines in tables", help=_REMEDY).rejection()
    return {table: body.get(table, {}) for table in TABLES}


_REMEDY = "write it again with `effc lock RECIPE`, or restore it from version control"


def _is_table(value: object, table: str) -> bool:
    return isinstance(value, dict) and all(
        isinstance(facts, dict)
        and all(_is_toml_value(fact) and (table == "recipes" or isinstance(fact, str)) for fact in facts.values())
        for facts in value.values()
    )


def _is_toml_value(value: object) -> bool:
    """Whether a value of TOML is one that `effc lock` writes: of an argument, or a text."""
    if isinstance(value, dict):
        return all(_is_toml_value(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return all(map(_is_toml_value, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) or (isinstance(value, str) and value.isprintable())


def write_package_lock(folder: Path, lock: Lock) -> Path:
    """Write a lock whole; the same content gives the same bytes."""
    lines = [_HEAD, f"format = {FORMAT}\n"]
    for table in TABLES:
        for name, facts in sorted(lock.get(table, {}).items()):
            lines.append(f"\n[{table}.{_toml_string(name)}]\n")
            lines += [f"{_toml_string(key)} = {_toml_value(value)}\n" for key, value in facts.items()]
    write_atomic(folder / NAME, "".join(lines).encode())
    return folder / NAME


def can_be_toml(value: Any) -> bool:
    """Whether TOML has a value: it has no null."""
    if isinstance(value, (dict, list)):
        return all(map(can_be_toml, value.values() if isinstance(value, dict) else value))
    return value is not None


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        pairs = ", ".join(f"{_toml_string(key)} = {_toml_value(part)}" for key, part in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    return _toml_string(value) if isinstance(value, str) else json.dumps(value)


def _toml_string(value: str) -> str:
    """A basic string of TOML: JSON's escapes are among its own, but for those of lone surrogates."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
