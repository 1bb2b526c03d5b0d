"""A GGUF file read for what it is: counts, names and offsets are held against its size before they are used."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...dsl.diagnostics import Reject
from ..store.regular import check_regular
from .refusal import refused_gguf

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 8: ("Q8_0", 32, 34), 30: ("BF16", 1, 2)}  # name, block, its bytes
_MOST_KEYS, _MOST_TENSORS, _MOST_ITEMS, _MOST_HEADER = 4096, 1 << 16, 1 << 22, 1 << 28
_AGAIN = "compile it again with this effc"


@dataclass(frozen=True)
class Entry:
    """A tensor's place: `shape` as torch has it, the last axis the nearest."""

    kind: int
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class Stored:
    path: Path
    facts: dict[str, Any]
    entries: dict[str, Entry]

    def tensor(self, name: str) -> torch.Tensor:
        """float32, whatever the file has."""
        import gguf

        entry = self.entries[name]
        raw = np.memmap(self.path, np.uint8, "r", entry.start, (entry.bytes,))
        kind = _TYPES[entry.kind][0]
        if kind == "F32":
            return torch.from_numpy(raw.view(np.float32).reshape(entry.shape).copy())
        rows = raw.reshape(*entry.shape[:-1], -1)
        array = gguf.quants.dequantize(np.asarray(rows), gguf.GGMLQuantizationType(entry.kind))
        return torch.from_numpy(np.ascontiguousarray(array, np.float32).reshape(entry.shape))


class _Reader:
    """Bytes from the front of a file, never beyond its end."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count < 0 or count > len(self.data) - self.at:
            raise ValueError("it ends within its header")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: int) -> Any:
        code = _SCALARS[kind]
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        return self.take(self.number(10)).decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.number(kind)
        inner, count = self.number(4), self.number(10)
        if count > _MOST_ITEMS or depth:
            raise ValueError("an array is too long or holds arrays")
        return [self.value(inner, depth + 1) for _ in range(count)]


def read(path: Path) -> Stored:
    """Raises Reject (refused-gguf) unless the file is whole and has numbers that effc writes."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            header = file.read(_MOST_HEADER)
        return _stored(path, _Reader(header))
    except OSError as error:
        raise Reject(refused_gguf(f"{path} can't be read: {error.strerror}")) from error
    except (ValueError, KeyError, struct.error) as error:
        raise Reject(refused_gguf(f"{path} is cut or of another form: {error}", help=_AGAIN)) from error


def _stored(path: Path, reader: _Reader) -> Stored:
    if reader.take(4) != b"GGUF" or reader.number(4) not in (2, 3):
        raise ValueError("it does not begin as GGUF does")
    tensors, keys = reader.number(10), reader.number(10)
    if tensors > _MOST_TENSORS or keys > _MOST_KEYS:
        raise ValueError("it counts more tensors or keys than a model has")
    facts = {}
    for _ in range(keys):
        name = reader.text()
        facts[name] = reader.value(reader.number(4))
    found = [_described(reader) for _ in range(tensors)]
    alignment = facts.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 4096:
        raise ValueError("its alignment is no number of bytes")
    begin, size, entries = -(-reader.at // alignment) * alignment, path.stat().st_size, {}
    for name, kind, shape, offset in found:
        block, width = _TYPES[kind][1:]
        count = 1
        for axis in shape:
            count *= axis
        if not shape or shape[-1] % block or name in entries:
            raise ValueError(f"`{name}` has a shape that its numbers don't fill, or is there twice")
        held = count // block * width
        if begin + offset + held > size:
            raise ValueError(f"`{name}` lies beyond its end")
        entries[name] = Entry(kind, shape, begin + offset, held)
    return Stored(path, facts, entries)


def _described(reader: _Reader) -> tuple[str, int, tuple[int, ...], int]:
    name, axes = reader.text(), reader.number(4)
    if axes > 4:
        raise ValueError(f"`{name[:80]}` has {axes} axes")
    shape = tuple(reader.number(10) for _ in range(axes))[::-1]
    kind, offset = reader.number(4), reader.number(10)
    if kind not in _TYPES:
        raise ValueError(f"`{name[:80]}` has numbers of type {kind}, which effc does not write")
    return name, kind, shape, offset
