"""Content of a safetensors file, read from its header alone: names, dtypes, shapes, places.

Pure Python and strict: every byte of the file is accounted for before anything maps it, so a truncated or
patched file is refused here with its numbers instead of far away.
Source: the format page of safetensors (huggingface/safetensors, README, "Format").
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....dsl.syntax.diagnostics import Diagnostic, Fault
from ...core.json_errors import describe_json_error
from ...core.safe_read import refuse_irregular_file

damaged_weights = Fault(
    "damaged-weights",
    "A weights file is cut, patched or not of its format.\n\n"
    "Its header must be whole and describe every byte of the file. Interrupted downloads and Git LFS pointers "
    "are the usual causes: fetch the file again.",
    exit="environment",
)

LIMIT = 100_000_000  # bytes of header that readers of the format accept
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorSlot:
    """Position of a tensor: bytes `start` to `end` after the header."""

    dtype: str  # as the format spells it: "BF16"
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    path: Path
    slots: Mapping[str, TensorSlot]
    metadata: Mapping[str, str]
    begin: int  # offset of the first tensor byte in the file


def read_safetensors_header(path: Path) -> Header:
    """The header of a file, or `Reject`: its length, its JSON, and that tensors cover the file exactly."""
    refuse_irregular_file(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(8)
        if LFS.startswith(first) and len(first) == 8:
            raise _header_error(
                path, f"is a Git LFS pointer of {size} bytes, not weights", help="run `git lfs pull` in its folder"
            ).rejection()
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > size - 8:
            raise _header_error(
                path,
                f"is cut: its header alone needs {length + 8} bytes, the file has {size}"
                if len(first) == 8
                else f"is cut: {size} bytes",
            ).rejection()
        if length > LIMIT:
            raise _header_error(path, f"states a header of {length} bytes; the format allows {LIMIT}").rejection()
        body = _parse_header_json(path, file.read(length))
    metadata = body.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _header_error(path, "has metadata other than text").rejection()
    slots = {name: _parse_tensor_entry(path, name, entry) for name, entry in body.items()}
    _refuse_gaps_and_overlaps(path, slots, size - 8 - length)
    return Header(path, slots, metadata, 8 + length)


def _parse_header_json(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        body = json.loads(text.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise _header_error(path, f"has a header that is not JSON: {describe_json_error(error)}").rejection() from error
    if not isinstance(body, dict):
        raise _header_error(path, "has a header that is not a JSON object").rejection()
    return body


_AXES = 64  # that torch has


def _is_integer(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _AXES and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _parse_tensor_entry(path: Path, name: str, entry: Any) -> TensorSlot:
    """One entry, checked for itself: `{"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}`."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _header_error(path, f"describes `{name}` by other fields than dtype, shape and data_offsets").rejection()
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _header_error(path, f"gives `{name}` a dtype that the format does not have").rejection()
    if not _is_integer(shape) or not _is_integer(offsets) or len(offsets) != 2:
        raise _header_error(path, f"gives `{name}` a shape or place that is not whole numbers").rejection()
    slot = TensorSlot(dtype, tuple(shape), *offsets)
    bits = slot.count * BITS[dtype]
    if bits % 8 or slot.end - slot.start != bits // 8:
        raise _header_error(
            path, f"gives `{name}` {slot.end - slot.start} bytes; {dtype} of shape {shape} takes {_bytes_text(bits)}"
        ).rejection()
    return slot


def _bytes_text(bits: int) -> str:
    """Also of more than any float can be: a shape has up to 64 axes."""
    return f"{bits / 8:g}" if bits < 1 << 64 else "more than any file has"


def _refuse_gaps_and_overlaps(path: Path, slots: Mapping[str, TensorSlot], size: int) -> None:
    """Tensors follow each other without holes or overlaps and end where the file ends."""
    reached = 0
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].end)):
        if slot.start != reached:
            raise _header_error(path, f"has `{name}` at byte {slot.start} where byte {reached} is next").rejection()
        reached = slot.end
    if reached > size:
        raise _header_error(path, f"is cut: its tensors need {reached} bytes, {size} are there").rejection()
    if reached < size:
        raise _header_error(path, f"has {size - reached} bytes after its last tensor").rejection()


def _header_error(path: Path, fact: str, help: str = "fetch the file again") -> Diagnostic:
    return damaged_weights(f"{path} {fact}", help=help)
