"""The archive of an exported program, opened by effc itself: tensors mapped, nothing unpickled.

torch's own reader unpickles sample inputs, and any weight whose entry says so. Here the names of an archive are on a
closed list, its files are stored as they are, and a weight is a row of bytes with a dtype, sizes and strides that lie
within it. Sample inputs, which programs written at 8d012cb and before have, are never read.
"""

import mmap
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.safe_read import Unlisted, parse_strict_json, require_or_unlisted
from .exported_json import parse_program_json

_PAYLOAD = re.compile(r"data/(weights/weight|constants/tensor)_\d{1,6}")
_PLAIN = frozenset(
    """
    archive_format archive_version byteorder .data/version .data/serialization_id models/model.json
    data/weights/model_weights_config.json data/constants/model_constants_config.json
    data/sample_inputs/model.pt extra/inputs.json
    """.split()
)
_SAMPLES = "data/sample_inputs/model.pt"
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}  # of torch's own numbering
_STRIDED = 7
_MAX_TEXT, _MAX_FILES = 1 << 28, 200_000
_LOCAL = struct.Struct("<4s5H3L2H")  # the header before each file of a zip archive


@dataclass(frozen=True)
class ArchiveMember:
    """Position of a file in the archive."""

    at: int
    size: int


@dataclass(frozen=True)
class Archive:
    """Content of an archive: the program as plain data of listed kinds, and its tensors, mapped from the file."""

    program: dict[str, Any]
    weights: dict[str, torch.Tensor]
    constants: dict[str, torch.Tensor]
    inputs: tuple[str, ...]


def read_checked_archive(path: Path) -> Archive:
    """Raises Unlisted on anything that a program of effc doesn't have, OSError where the file can't be read."""
    with open(path, "rb") as file:
        entries = _checked_zip_entries(path, file)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            texts = {
                name: bytes(view[e.at : e.at + e.size])
                for name, e in entries.items()
                if name in _PLAIN and name != _SAMPLES
            }
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # what is written to stays in this process
    require_or_unlisted(
        texts.get("archive_format") == b"pt2" and texts.get("byteorder") == b"little", "another kind of archive"
    )
    lacks = {
        "models/model.json",
        "data/weights/model_weights_config.json",
        "data/constants/model_constants_config.json",
        "extra/inputs.json",
    } - set(texts)
    require_or_unlisted(not lacks, f"no {next(iter(sorted(lacks)), '')}")
    weights, constants = (
        _map_tensors_of_config(texts[f"data/{kind}/model_{kind}_config.json"], f"data/{kind}/", entries, mapped)
        for kind in ("weights", "constants")
    )
    return Archive(
        parse_program_json(texts["models/model.json"]),
        weights,
        constants,
        _parse_input_names(texts["extra/inputs.json"]),
    )


def _checked_zip_entries(path: Path, file: Any) -> dict[str, ArchiveMember]:
    size = path.stat().st_size
    try:
        infos = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, UnicodeDecodeError) as error:
        raise Unlisted("a file that is no archive") from error
    require_or_unlisted(0 < len(infos) <= _MAX_FILES, "no files, or far too many")
    root = infos[0].filename.partition("/")[0] + "/"
    entries: dict[str, ArchiveMember] = {}
    for item in infos:
        name = item.filename.removeprefix(root)
        require_or_unlisted(
            item.filename.startswith(root) and (name in _PLAIN or _PAYLOAD.fullmatch(name) is not None),
            f"the file {item.filename[:80]!r}",
        )
        require_or_unlisted(name not in entries, f"the file {name} twice")
        require_or_unlisted(
            item.compress_type == zipfile.ZIP_STORED
            and item.compress_size == item.file_size
            and not item.flag_bits & 1,
            f"the file {name} packed or locked",
        )
        require_or_unlisted(
            name not in _PLAIN or item.file_size <= _MAX_TEXT, f"the file {name} of {item.file_size} bytes"
        )
        entries[name] = ArchiveMember(_data_offset(file, item.header_offset, size), item.file_size)
        require_or_unlisted(entries[name].at + item.file_size <= size, f"the file {name} beyond the archive's end")
    return entries


def _data_offset(file: Any, offset: int, archive_size: int) -> int:
    """Offset of a file's bytes: after its local header, which alone states its length."""
    require_or_unlisted(0 <= offset <= archive_size - _LOCAL.size, "a file beyond the archive's end")
    file.seek(offset)
    head = _LOCAL.unpack(file.read(_LOCAL.size))
    require_or_unlisted(head[0] == b"PK\x03\x04", "a file without a header")
    return offset + _LOCAL.size + head[-2] + head[-1]


def _parse_input_names(text: bytes) -> tuple[str, ...]:
    try:
        names = parse_strict_json(text)
    except (ValueError, RecursionError) as error:
        raise Unlisted("names of inputs that are not JSON") from error
    require_or_unlisted(
        isinstance(names, list) and all(isinstance(n, str) and n.isidentifier() for n in names), "odd names of inputs"
    )
    return tuple(names)


def _map_tensors_of_config(
    config_json: bytes, folder: str, entries: dict[str, ArchiveMember], buffer: mmap.mmap
) -> dict[str, torch.Tensor]:
    try:
        table = parse_strict_json(config_json)["config"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Unlisted("a table of tensors of another form") from error
    rows: dict[Any, torch.Tensor] = {}
    return {name: _map_tensor(name, meta, folder, entries, buffer, rows) for name, meta in table}


def _map_tensor(
    name: str,
    meta: Any,
    folder: str,
    entries: dict[str, ArchiveMember],
    buffer: mmap.mmap,
    rows: dict[Any, torch.Tensor],
) -> torch.Tensor:
    """A tensor over its file's bytes; those that share a file share memory, and those that are tied are one.

    rows   what was read already: bytes of a file by its name, tensors by all that is said of them
    """
    try:
        member, layout = f"{folder}{meta['path_name']}", meta["tensor_meta"]
        dtype = _DTYPES[layout["dtype"]]
        sizes, strides = ([item["as_int"] for item in layout[key]] for key in ("sizes", "strides"))
        offset, device = layout["storage_offset"]["as_int"], layout["device"]["type"]
        is_plain = meta["use_pickle"] is False and layout["layout"] == _STRIDED and device == "cpu"
    except (KeyError, TypeError) as error:
        raise Unlisted(f"a tensor {name[:80]} of another form") from error
    require_or_unlisted(
        is_plain and _PAYLOAD.fullmatch(member) is not None and member in entries,
        f"a tensor {name[:80]} of another form",
    )
    numbers = [*sizes, *strides, offset]
    require_or_unlisted(
        len(sizes) == len(strides) <= 16 and all(type(n) is int and 0 <= n < 1 << 48 for n in numbers),
        f"a tensor {name[:80]} of an odd shape",
    )
    entry, width = entries[member], dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    require_or_unlisted(
        entry.size % width == 0 and (0 in sizes or last < entry.size // width), f"a tensor {name[:80]} beyond its file"
    )
    if 0 in sizes:
        return torch.empty(sizes, dtype=dtype)
    row = rows.get(member)
    if row is None:
        row = rows[member] = torch.frombuffer(buffer, dtype=torch.uint8, count=entry.size, offset=entry.at)
    if entry.at % width:
        row = rows[member] = row.clone()  # torch reads numbers from where they are aligned
    trained = bool(layout.get("requires_grad")) and dtype.is_floating_point
    learned = meta.get("is_param") is True
    key = (member, dtype, *sizes, *strides, offset, learned, trained)
    if key not in rows:
        tensor = row.view(dtype).as_strided(sizes, strides, offset)
        rows[key] = torch.nn.Parameter(tensor, requires_grad=trained) if learned else tensor
    return rows[key]
