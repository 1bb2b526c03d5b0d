"""Records from JSON, JSON lines, CSV and TSV files: dicts by field name."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ...dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ...dsl.syntax.nearest import nearest_name_help
from ..core.json_errors import reject_on_error
from ..core.safe_read import parse_strict_json
from .windows import read_text

invalid_record = Fault("bad-record", "A line of a data file is not a record, or a field of it holds something else.")
no_field = Fault("no-field", "A data file has no field of the name that a recipe gives.")

Record = dict[str, Any]
T = TypeVar("T")
R = TypeVar("R")
LISTED = 10  # faults of one file that are told
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_records(path: Path) -> list[Record]:
    """All records of a .jsonl, .json (a list), .csv or .tsv file, at least one."""
    text = read_text(path)
    if delimiter := _DELIMITERS.get(path.suffix):
        records: list[Any] = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    elif path.suffix == ".json":
        records = _parse_json_or_reject(text, str(path))
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        records = parse_each(lines, lambda entry: _parse_json_or_reject(entry[1], f"line {entry[0]} of {path}"))
    if not isinstance(records, list) or not records:
        raise invalid_record(f"{path} holds no records", help="one JSON object a line, or one list of them").rejection()
    malformed = [number for number, record in enumerate(records, start=1) if not isinstance(record, dict)]
    if malformed:
        raise Reject(*(invalid_record(f"record {number} of {path} is not an object") for number in malformed[:LISTED]))
    return records


def parse_each(items: Iterable[T], parse: Callable[[T], R]) -> list[R]:
    """Results of `parse` for each item. Raises Reject with the faults of all of them, the first `LISTED` and a
    count."""
    results: list[R] = []
    faults: list[Diagnostic] = []
    for item in items:
        try:
            results.append(parse(item))
        except Reject as rejection:
            faults += rejection.diagnostics
    if len(faults) > LISTED:
        more = f"there are {len(faults) - LISTED} more like these"
        faults = [*faults[: LISTED - 1], replace(faults[LISTED - 1], note=more)]
    if faults:
        raise Reject(*faults)
    return results


def _parse_json_or_reject(text: str, name: str) -> Any:
    with reject_on_error(invalid_record, f"{name} is not JSON"):
        return parse_strict_json(text)


def require_field(records: Iterable[Record], field: str, path: str | Path) -> None:
    """Reject a field that some record lacks, with the nearest one that it has."""
    lacking = [(number, record) for number, record in enumerate(records, start=1) if field not in record]
    if lacking:
        number, record = lacking[0]
        also = f", nor have {len(lacking) - 1} others" if len(lacking) > 1 else ""
        message = f"record {number} of {path} has no field `{field}`{also}"
        raise no_field(message, help=nearest_name_help(field, record, "it has")).rejection()


def require_fields(records: Sequence[Record], fields: Iterable[str], path: str | Path) -> None:
    """Reject all fields that some record lacks, at once."""
    parse_each(fields, lambda name: require_field(records, name, path))


def field_text(record: Record, field: str, line_number: int, path: str | Path) -> str:
    """The text of a field; numbers count as text."""
    value = record[field]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise invalid_record(f"`{field}` of record {line_number} of {path} is not text").rejection()
    return str(value)


def drop_or_refuse_too_long(
    items: Sequence[T], sizes: Sequence[int], max_tokens: int, policy: str, too_long: Fault, noun: str
) -> list[T]:
    """Items that fit into a row of so many tokens; Reject where others may not be dropped, or none is left."""
    short = [item for item, size in zip(items, sizes, strict=True) if size <= max_tokens]
    if len(short) < len(items) and (policy == "refuse" or not short):
        raise too_long(
            f"{len(items) - len(short)} of {len(items)} {noun} exceed {max_tokens} tokens, the longest {max(sizes)}",
            help=f"`length: {max(sizes)}`" + (", or `longer: drop`" if short else ""),
        ).rejection()
    return short
