"""A plan and its weights on disk: `plan.json`, and `weights.bin`, which is read without parsing.

`weights.bin` is 64 bytes of header, then the entries one after another where the plan's table says: packed
linear layers as their kernels read them, vectors and tables as they are. Sizes and headers are checked whenever
it is opened, packed layers by their own checksums unless files are to be believed, all by the manifest's hashes
where those are asked for.
"""

import hashlib
import json
import mmap
import os
import struct
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....dsl.syntax.diagnostics import Fault, Reject
from ....dsl.syntax.json_types import from_json
from ....kernels.native import KernelError
from ...core.events import iterate_and_report
from ...core.json_errors import reject_on_error
from ...core.memory import is_too_large_to_copy
from ...core.safe_read import MANIFEST, read_json, refuse_irregular_file

if TYPE_CHECKING:
    from torch import Tensor

    from .plan import Plan

native_damaged = Fault(
    "native-damaged",
    "The files of a native artifact do not hold together: one was cut, changed or exchanged, or is of another "
    "version or byte order.\n\n"
    "The engine reads weights without looking at each, so sizes, headers, the plan and packed weights are "
    "checked before it starts.",
    exit="environment",
)

PLAN, WEIGHTS = "plan.json", "weights.bin"
VERSION = 1
ALIGN, PAGE = 64, 4096
PIECE = 4 << 20  # bytes under one hash
_MAGIC, _ORDER, _HEADER = b"effcwts\0", 0x01020304, struct.Struct("=8sIIq")
_WIDTH = {"packed": 1, "f32": 4, "bf16": 2}
_MAX_BYTES = 1 << 48  # bytes of a file, numbers of a shape: larger ones are no sizes
_REMEDY = "copy the artifact again, or compile again"


@dataclass(frozen=True)
class NativePlanFile:
    """Parsed `plan.json`.

    plan      what the engine runs
    entries   name -> {"at", "bytes", "kind", "shape", "sha256"}; the last a list, a hash for each of `pieces`
    facts     version, byte order, instruction set, and of the model: class, numbers in its weights, dtype
    """

    plan: Mapping[str, Any]
    entries: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, Any]


def write_plan(plan: "Plan", folder: Path, facts: Mapping[str, Any]) -> None:
    """Weights one at a time, the plan last: without it nothing loads."""
    entries, at = {}, ALIGN
    with open(folder / WEIGHTS, "wb") as file:
        for name, entry in iterate_and_report(plan.live_weight_entries().items(), "packed tensors"):
            try:
                raw = _bytes(entry.make())
            except KernelError as error:
                raise KernelError(f"{name}: {error}") from error
            at = -(-at // _align(len(raw))) * _align(len(raw))
            file.seek(at)
            file.write(raw)
            entries[name] = {
                "at": at,
                "bytes": len(raw),
                "kind": entry.kind,
                "shape": list(entry.shape),
                "sha256": [hashlib.sha256(piece).hexdigest() for piece in pieces(raw)],
            }
            at += len(raw)
        size = -(-at // PAGE) * PAGE
        file.truncate(size)
        file.seek(0)
        file.write(_HEADER.pack(_MAGIC, _ORDER, VERSION, size))
        if is_too_large_to_copy(size) and hasattr(os, "posix_fadvise"):
            # It will be mapped. As it was written the system caches it in small pages, as it is read again in huge
            # ones, where it can: kernels then read it a third faster.
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    body = {
        "facts": {"version": VERSION, "byte_order": sys.byteorder, **facts},
        "plan": plan.to_json(),
        "entries": entries,
    }
    text = json.dumps(body, indent=1, allow_nan=False)
    (folder / PLAN).write_text(text + "\n", encoding="utf-8")


def pieces(raw: memoryview) -> list[memoryview]:
    """Parts of a weight that have a hash each, so that threads share the work on a large one."""
    return [raw[at : at + PIECE] for at in range(0, len(raw), PIECE)]


def _align(count: int) -> int:
    return PAGE if count >= PAGE else ALIGN


def _bytes(tensor: "Tensor") -> memoryview:
    """Bytes of a tensor, without a copy."""
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")


# -- reading -------------------------------------------------------------------------------------------------


def read_plan(folder: Path) -> NativePlanFile:
    """The plan and the table, with the sizes of the weights' file checked against it."""
    file = folder / PLAN
    with reject_on_error(native_damaged, f"{file} is no JSON that can be read", _REMEDY):
        body = read_json(file, MANIFEST)
    with reject_on_error(native_damaged, f"{file} lacks a field or has one of another form", _REMEDY):
        stored = from_json(body, NativePlanFile)
        version, order = stored.facts["version"], stored.facts["byte_order"]
    if version != VERSION:
        raise _damaged(
            folder / PLAN,
            f"was written in format {version!r}, and this effc reads {VERSION}",
            help="load it with the effc that wrote it, or compile again",
        )
    if order != sys.byteorder:
        raise _damaged(
            folder / PLAN,
            f"was written on a machine of {order}-endian byte order, and this one is {sys.byteorder}-endian",
            help="compile on a machine of this kind",
        )
    if problem := _isa_problem(stored.facts.get("isa", "portable")):
        raise _damaged(file, f"is for another processor: {problem}", help="compile on a machine of this kind")
    size = _checked_weights_size(folder / WEIGHTS)
    for name, entry in stored.entries.items():
        if problem := _entry_problem(entry, size):
            raise _damaged(file, f"has an entry `{name}` {problem}")
    return stored


def _isa_problem(isa: Any) -> str:
    """Missing features of this machine for an instruction set; "" where it has them."""
    from ....kernels import levels

    if not isinstance(isa, str) or isa not in levels.NAMES:
        return f"it asks for the instruction set {isa!r:.40}, which this effc does not know"
    return levels.level_unavailability_reason(isa)


def _checked_weights_size(file: Path) -> int:
    """The size of the weights' file, as it is and as its header says."""
    with reject_on_error(native_damaged, f"{file} can't be read", _REMEDY):
        refuse_irregular_file(file)
        size = file.stat().st_size
        with open(file, "rb") as stream:
            head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size or head[:8] != _MAGIC:
        raise _damaged(file, "does not begin as the weights of a native artifact do")
    _, order, version, bytes = _HEADER.unpack(head)
    if order != _ORDER:
        raise _damaged(file, "was written on a machine of the other byte order")
    if version != VERSION:
        raise _damaged(file, f"was written in format {version}, and this effc reads {VERSION}")
    if bytes != size:
        raise _damaged(file, f"has {size} bytes, and its header says {bytes}")
    return size


def _entry_problem(entry: Mapping[str, Any], size: int) -> str:
    """Error of an entry of the table; "" where it is valid."""
    if not {"at", "bytes", "kind", "shape"} <= entry.keys():
        return "of another form"
    at, count, kind, shape = (entry[key] for key in ("at", "bytes", "kind", "shape"))
    if not isinstance(kind, str) or kind not in _WIDTH:
        return f"of the unknown kind {kind!r:.40}"
    if not isinstance(shape, list) or not shape or not all(_is_size(n) for n in shape):
        return f"with the shape {shape!r:.60}"
    if not _is_size(count) or type(at) is not int or at < ALIGN or at % ALIGN or at + count > size:
        return f"that leaves the {size} bytes of {WEIGHTS}"
    numbers = 1
    for n in shape:
        numbers *= n
    if numbers > _MAX_BYTES or (kind != "packed" and numbers * _WIDTH[kind] != count):
        return f"whose {count} bytes are not {shape} numbers of kind {kind}"
    return ""


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < _MAX_BYTES


def _damaged(file: Path, problem: str, help: str = _REMEDY) -> Reject:
    return native_damaged(f"{file} {problem}", help=help).rejection()


def load_weights(
    folder: Path, plan_file: NativePlanFile, *, mapped: bool | None = False, threads: int = 1
) -> dict[str, "Tensor"]:
    """The weights by name; `mapped` leaves them on disk, else they are read to where memory is fastest.

    None maps a file of more than a quarter of the memory: its copy would take seconds, and room that the cache of
    the file system needs to hold it. A mapped file is as fast as a copy where the system caches files in huge pages
    (Linux 6.16 with ext4, for one), and in small ones costs a quarter of the bandwidth.
    """
    import torch

    file, size = folder / WEIGHTS, (folder / WEIGHTS).stat().st_size
    if mapped is None:
        mapped = is_too_large_to_copy(size)
    if mapped:
        blob = torch.frombuffer(_map_file(file, size), dtype=torch.uint8)
    else:
        from ....kernels.packed import allocate_zero_bytes

        blob = allocate_zero_bytes(size)
        _read_into_buffer(blob.numpy().data, file, threads)
    kinds = {"packed": torch.uint8, "f32": torch.float32, "bf16": torch.bfloat16}
    result = {}
    for name, entry in plan_file.entries.items():
        part = blob[entry["at"] : entry["at"] + entry["bytes"]]
        numbers = part.view(kinds[entry["kind"]])
        result[name] = part if entry["kind"] == "packed" else numbers.view(entry["shape"])
    return result


def _map_file(file: Path, size: int) -> mmap.mmap:
    """A private view of a file, which the system is asked to cache in huge pages."""
    with open(file, "rb") as stream:
        view = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            view.madvise(mmap.MADV_HUGEPAGE)
    return view


def _read_into_buffer(buffer: memoryview, file: Path, threads: int) -> None:
    """Read a file into memory, each thread a part of it."""
    each = -(-len(buffer) // threads)

    def part(start: int) -> None:
        at, end = start, min(start + each, len(buffer))
        with open(file, "rb", buffering=0) as stream:
            stream.seek(at)
            while at < end:
                count = stream.readinto(buffer[at:end])
                if not count:
                    raise _damaged(file, f"ends after {at} of {len(buffer)} bytes")
                at += count

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, range(0, len(buffer), each)))
