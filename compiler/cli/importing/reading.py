"""YAML and JSON of other tools, within bounds: no tags, no anchors, no key twice, nothing deep.

An anchor that is used ten times in ten lists of which each holds the last is a billion values in a hundred bytes;
recipes have no use for anchors, so they are refused.
"""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from ....dsl.syntax.diagnostics import Fault
from ....dsl.syntax.source import Source, Span
from ...core.json_errors import reject_on_error
from ...core.safe_read import parse_strict_json, read_regular_file

MAX_FILE_BYTES = 256 << 10  # bytes
DEEPEST = 40
_DEEP = f"is nested deeper than {DEEPEST} levels"
_LARGEST = 10**300  # no fraction is as large, and arithmetic of both would break

unreadable_import = Fault(
    "unreadable-import",
    "A file given to `effc import` is not YAML or JSON that effc reads.\n\n"
    "Anchors, tags and keys that stand twice are refused, and so is what is nested deeper than forty levels or larger "
    "than 256 KiB: recipes have no use for them.",
    exit="usage",
)


class ForeignFile(NamedTuple):
    content: Any  # plain lists, objects, texts, numbers
    source: Source


def parse_json_or_yaml_file(path: Path) -> ForeignFile:
    """The content of a file, and its text. Raises Reject."""
    with reject_on_error(unreadable_import, f"{path} is no text that can be read"):
        text = read_regular_file(path, MAX_FILE_BYTES).decode("utf-8-sig")
    source = Source(str(path), text)
    value = _json(source) if path.suffix.lower() == ".json" else _parse_yaml(source)
    _refuse_non_plain(value, source, 0)
    return ForeignFile(value, source)


def _json(source: Source) -> Any:
    try:
        return parse_strict_json(source.text)
    except (ValueError, RecursionError) as error:
        reason = str(getattr(error, "msg", error)).lower()
        raise unreadable_import(
            f"this is no JSON: {reason}", _span_at(source, getattr(error, "pos", 0))
        ).rejection() from error


def _parse_yaml(source: Source) -> Any:
    import yaml

    try:
        depth = 0
        for number, event in enumerate(yaml.parse(source.text, Loader=yaml.SafeLoader)):
            anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
            # Before the rest is read: of every level the scanner looks at all above it.
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if anchor or tag or number > 50_000 or depth > DEEPEST:
                problem = "an anchor or its use" if anchor else "a tag" if tag else "too many values"
                problem = _DEEP if depth > DEEPEST else f"has {problem}"
                raise unreadable_import(f"this {problem}", _span_at(source, event.start_mark.index)).rejection()
        return yaml.load(source.text, Loader=_loader_refusing_duplicates(yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = str(getattr(error, "problem", "") or "it does not parse")
        raise unreadable_import(
            f"this is no YAML: {reason[:120]}", _span_at(source, mark.index if mark else 0)
        ).rejection() from error
    except (ValueError, RecursionError) as error:  # a date that is none; brackets without end
        raise unreadable_import(f"{source.name} holds what no recipe does").rejection() from error


def _loader_refusing_duplicates(loader: Any) -> Any:
    """A loader that refuses a key that stands twice, which YAML's own overwrites in silence."""

    class Once(loader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
            repeats = Counter(keys).most_common(1)
            if repeats and repeats[0][1] > 1:
                raise unreadable_import(f"the key `{repeats[0][0][:80]}` stands twice").rejection()
            return super().construct_mapping(node, deep)

    return Once


def _refuse_non_plain(value: Any, source: Source, depth: int) -> None:
    if depth > DEEPEST:
        raise unreadable_import(f"{source.name} {_DEEP}").rejection()
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise unreadable_import(f"{source.name} has a key that is no text").rejection()
        for inner in value.values():
            _refuse_non_plain(inner, source, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _refuse_non_plain(inner, source, depth + 1)
    elif type(value) is int and abs(value) >= _LARGEST:
        raise unreadable_import(f"{source.name} holds a number of more than 300 digits").rejection()
    elif not (value is None or isinstance(value, (str, int, float, bool))):
        raise unreadable_import(f"{source.name} holds a {type(value).__name__}, which no recipe does").rejection()


def _span_at(source: Source, offset: int) -> Span:
    offset = min(offset, max(len(source.text) - 1, 0))
    return Span(source, offset, min(offset + 1, len(source.text)))
