"""The header of any GGUF: keys and the table of tensors, counts held against the file before they are believed."""

import struct
from pathlib import Path
from typing import Any

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_MAX_KEYS, _MAX_TENSORS, _MAX_ITEMS, MAX_HEADER = 4096, 1 << 16, 1 << 22, 1 << 28


class Reader:
    """Bytes from the front of a file, never beyond its end."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take_bytes(self, count: int) -> bytes:
        if count < 0 or count > len(self.data) - self.at:
            raise ValueError("it ends within its header")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, value_type: int) -> Any:
        code = _SCALARS[value_type]
        return struct.unpack(f"<{code}", self.take_bytes(struct.calcsize(code)))[0]

    def text(self) -> str:
        return self.take_bytes(self.number(10)).decode("utf-8")

    def read_value(self, value_type: int, depth: int = 0) -> Any:
        if value_type == _TEXT:
            return self.text()
        if value_type != _ARRAY:
            return self.number(value_type)
        inner, count = self.number(4), self.number(10)
        if count > _MAX_ITEMS or depth:
            raise ValueError("an array is too long or holds arrays")
        return [self.read_value(inner, depth + 1) for _ in range(count)]


def check_gguf_header(path: Path) -> None:
    """Raises ValueError or LookupError where a header of any GGUF counts more than its file holds.

    Other readers believe what a file says, and count to 2**63.
    """
    with path.open("rb") as file:
        read_gguf_header(Reader(file.read(MAX_HEADER)))


def read_gguf_header(reader: Reader) -> tuple[dict[str, Any], list[tuple[str, int, tuple[int, ...], int]]]:
    if reader.take_bytes(4) != b"GGUF" or reader.number(4) not in (2, 3):
        raise ValueError("it does not begin as GGUF does")
    tensors, keys = reader.number(10), reader.number(10)
    if tensors > _MAX_TENSORS or keys > _MAX_KEYS:
        raise ValueError("it counts more tensors or keys than a model has")
    facts = {}
    for _ in range(keys):
        name = reader.text()
        facts[name] = reader.read_value(reader.number(4))
    return facts, [_read_tensor_info(reader) for _ in range(tensors)]


def _read_tensor_info(reader: Reader) -> tuple[str, int, tuple[int, ...], int]:
    name, axes = reader.text(), reader.number(4)
    if axes > 4:
        raise ValueError(f"`{name[:80]}` has {axes} axes")
    shape = tuple(reader.number(10) for _ in range(axes))[::-1]
    kind, offset = reader.number(4), reader.number(10)
    return name, kind, shape, offset
