"""Grammars, in llguidance's dialect of Lark, of JSON between two literals: alone, or in the midst of free text.

Literals that are tokens by themselves are written as such: the library lets no added token of the form `<...>` match
text, and models that have one for a literal write no other spelling of it.
Source: llguidance's `StructTag`, which knows no tokens but special ones, and lets none of the others into free text.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as `json.dumps` writes it


@dataclass(frozen=True)
class Tag:
    """JSON of a schema behind `prefix` and before `suffix`, all of it between `start` and `end`."""

    prefix: str
    schema: Mapping[str, Any]
    suffix: str
    start: str = ""
    end: str = ""

    def rule(self, tokens: Mapping[str, int]) -> str:
        """Right side of its rule, from behind `start` on."""
        body = json.dumps({**self.schema, "x-guidance": _SPACED})
        return f"{json.dumps(self.prefix)} %json {body} {_literal(self.suffix, self.end, tokens)}"


def tag_grammar(tags: Sequence[Tag]) -> str:
    """Grammar of one of the tags, and nothing else. None of them has a `start`."""
    assert not any(tag.start for tag in tags), "a tag by itself needs no start"
    rules = [f"tag_{i}: {tag.rule({})}" for i, tag in enumerate(tags)]
    return "\n".join(["%llguidance {}", f"start: {_tag_alternatives(tags)}", *rules])


def tagged_text_grammar(
    tags: Sequence[Tag], tokens: Mapping[str, int], special_ids: Collection[int], parallel: bool
) -> str:
    """Grammar of free text with tags in it, all of them with one `start`.

    tokens       ids of the literals that are tokens
    parallel     whether more than one tag may stand in it
    special_ids  tokens that match no text, and may stand in it all the same: those that end a text are none of them
    """
    (start,) = {tag.start for tag in tags}
    if start in tokens:
        begin, repetition = tokens[start], "*" if parallel else "?"
        ids = ",".join(map(str, sorted({*special_ids} - {begin})))
        lines = [f"start: text (({_tag_alternatives(tags)}) text){repetition}"]
        lines += [f"text: (REST <[{ids}]>)* REST" if ids else "text: REST", _text_without_terminal(start)]
        rules = [f"tag_{i}: <[{begin}]> {tag.rule(tokens)}" for i, tag in enumerate(tags)]
        return "\n".join(["%llguidance {}", *lines, *rules])
    ids = ",".join(map(str, sorted(special_ids)))
    before, behind = ("special* ", f"(REST <[{ids}]>)* ") if ids else ("", "")
    if not parallel:
        lines = [f"start: {before}(({_tag_alternatives(tags)}) rest | TEXT)", f"rest: {behind}REST"]
        lines += [_text_without_terminal(start)]
    else:
        lines = [f"start: ({_tag_alternatives(tags)}{' | special' if ids else ''})* TEXT"]
    lines += [f"special: TEXT <[{ids}]>"] if ids else []
    for i, tag in enumerate(tags):  # lazy: free text ends where a tag starts
        lines += [f"start_{i}[lazy]: TEXT {json.dumps(start)}", f"tag_{i}: start_{i} {tag.rule(tokens)}"]
    return "\n".join(["%llguidance {}", *lines, r"TEXT: /(.|\n)*/"])


def _text_without_terminal(start: str) -> str:
    """Terminal of text in which a tag does not begin, however it is spelled."""
    return rf"REST: /(.|\n)*/ & ~/(.|\n)*{re.escape(start)}(.|\n)*/"


def _tag_alternatives(tags: Sequence[Tag]) -> str:
    return " | ".join(f"tag_{i}" for i in range(len(tags)))


def _literal(text: str, end: str, tokens: Mapping[str, int]) -> str:
    if end in tokens:
        return f"{json.dumps(text)} <[{tokens[end]}]>"
    return json.dumps(text + end)
