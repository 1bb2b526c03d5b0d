"""A GGUF file read for what it is: counts, names and offsets are held against its size before they are used."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...core.json_errors import FILE_ERRORS, reject_on_error
from ...core.safe_read import refuse_irregular_file
from ...models.checkpoints.gguf_header import MAX_HEADER, Reader, read_gguf_header
from .number_types import TYPES
from .refusal import rejected_gguf

_TYPES = {kind.number: (name, kind) for name, kind in TYPES.items()}
_REMEDY = "compile it again with this effc"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place: `shape` as torch has it, the last axis the nearest."""

    kind: int
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class GgufFile:
    path: Path
    facts: dict[str, Any]
    entries: dict[str, TensorInfo]

    def read_tensor(self, name: str) -> torch.Tensor:
        """float32, whatever the file has."""
        import gguf

        entry = self.entries[name]
        raw = np.memmap(self.path, np.uint8, "r", entry.start, (entry.bytes,))
        if _TYPES[entry.kind][0] == "f32":
            return torch.from_numpy(raw.view(np.float32).reshape(entry.shape).copy())
        rows = raw.reshape(*entry.shape[:-1], -1)
        array = gguf.quants.dequantize(np.asarray(rows), gguf.GGMLQuantizationType(entry.kind))
        return torch.from_numpy(np.ascontiguousarray(array, np.float32).reshape(entry.shape))


def read_gguf(path: Path) -> GgufFile:
    """Raises Reject (refused-gguf) unless the file is whole and has numbers that effc writes."""
    with reject_on_error(
        rejected_gguf, f"{path} is cut or of another form", _REMEDY, error_types=(struct.error, *FILE_ERRORS)
    ):
        refuse_irregular_file(path)
        with path.open("rb") as file:
            header = file.read(MAX_HEADER)
        return _parse_header(path, Reader(header))


def _parse_header(path: Path, reader: Reader) -> GgufFile:
    facts, table = read_gguf_header(reader)
    alignment = facts.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 4096:
        raise ValueError("its alignment is no number of bytes")
    begin, size, entries = -(-reader.at // alignment) * alignment, path.stat().st_size, {}
    for name, kind, shape, offset in table:
        if kind not in _TYPES:
            raise ValueError(f"`{name[:80]}` has numbers of type {kind}, which effc does not write")
        number_type = _TYPES[kind][1]
        count = 1
        for axis in shape:
            count *= axis
        if not shape or shape[-1] % number_type.block or name in entries:
            raise ValueError(f"`{name}` has a shape that its numbers don't fill, or is there twice")
        n_bytes = count // number_type.block * number_type.bytes
        if begin + offset + n_bytes > size:
            raise ValueError(f"`{name}` lies beyond its end")
        entries[name] = TensorInfo(kind, shape, begin + offset, n_bytes)
    return GgufFile(path, facts, entries)
