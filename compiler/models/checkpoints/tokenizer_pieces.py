"""Vocabularies of sentencepiece, tiktoken and tekken, which transformers converts.

For each piece it looks at all ways to cut it in two: a piece of a megabyte would take days.
"""

import base64
from collections.abc import Iterator
from typing import Any

from .tokenizer_checks import refuse_unbounded_charsmap
from .tokenizer_steps import Unbounded

_MAX_PIECES, _LONGEST, _MAX_CUTS = 1 << 20, 1024, 1 << 24  # the second in bytes of a piece, the third those of all
_MAX_PATTERN = 4096  # characters of an expression that cuts texts


def refuse_unbounded_sentencepiece(data: bytes) -> None:
    """Refuse a model of sentencepiece with too long pieces or an endless table: pieces are field 1 with their text in
    field 1, the table of Unicode forms is field 2 of field 3. Raises Unbounded."""
    pieces = []
    for number, part in _iterate_protobuf_fields(data):
        if number == 1 and isinstance(part, bytes):
            pieces += [
                len(text) for inner, text in _iterate_protobuf_fields(part) if inner == 1 and isinstance(text, bytes)
            ]
        elif number == 3 and isinstance(part, bytes):
            for inner, table in _iterate_protobuf_fields(part):
                if inner == 2 and table:
                    refuse_unbounded_charsmap(table if isinstance(table, bytes) else b"")
    _refuse_long_tokens(pieces)


def refuse_unbounded_tiktoken(data: bytes) -> None:
    """Check lines with a piece in base64 and its rank. Raises Unbounded, or ValueError of another form."""
    _refuse_long_tokens([_token_length_of_line(line.split()) for line in data.splitlines() if line])


def _token_length_of_line(fields: list[bytes]) -> int:
    if len(fields) != 2 or not fields[1].isdigit():
        raise Unbounded("a line of it is no piece with a rank")
    return len(base64.b64decode(fields[0], validate=True))


def refuse_unbounded_tekken(body: Any) -> None:
    """Refuse a tekken file of Mistral's without a vocabulary, or with too long pieces or pattern. Raises Unbounded, or
    another of `regular.MISFIT`."""
    if not isinstance(body, dict) or not isinstance(body.get("vocab"), list):
        raise Unbounded("it has no vocabulary")
    special = body.get("special_tokens") or []
    texts = [str(token["token_str"]).encode() for token in special]
    pattern = body.get("config", {}).get("pattern", "")
    if not isinstance(pattern, str) or len(pattern) > _MAX_PATTERN:
        raise Unbounded("the expression that cuts texts is no text, or far too long")
    _refuse_long_tokens([*map(len, texts), *(len(base64.b64decode(entry["token_bytes"])) for entry in body["vocab"])])


def _refuse_long_tokens(token_lengths: list[int]) -> None:
    if len(token_lengths) > _MAX_PIECES or max(token_lengths, default=0) > _LONGEST or sum(token_lengths) > _MAX_CUTS:
        raise Unbounded(f"it has {len(token_lengths)} pieces of up to {max(token_lengths, default=0)} bytes")


def _iterate_protobuf_fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Numbers and values of a message in the encoding of protocol buffers."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        if key & 7 == 0:
            value, at = _read_varint(data, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            length, at = _read_varint(data, at)
        else:
            length = {1: 8, 5: 4}[key & 7]
        if at + length > len(data):
            raise Unbounded("a part of it is cut")
        yield key >> 3, data[at : at + length]
        at += length


def _read_varint(data: bytes, offset: int) -> tuple[int, int]:
    """A number in groups of seven bits, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[offset]
        value, offset = value | (byte & 127) << shift, offset + 1
        if byte < 128:
            return value, offset
    raise Unbounded("a number of it has no end")
