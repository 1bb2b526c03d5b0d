"""Tensors to safetensors files, one in memory at a time, and back, mapped from disk.

`safetensors.torch.save_file` needs every tensor of a file at once; padded ones would be a second copy of the
weights. So the writer is our own: it asks for a tensor when its turn comes. It also starts the data, and all
tensors that can, at multiples of 64 bytes, which vector loads of mapped weights like.
Source: the format page of safetensors (huggingface/safetensors, README, "Format").
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...core.events import iterate_and_report
from .weights import INDEX, SINGLE, Weights

ALIGN = 64

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.complex64: "C64",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to write: `make` gives it, in this dtype and shape, when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @staticmethod
    def of(name: str, tensor: torch.Tensor) -> "LazyTensor":
        return LazyTensor(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write_safetensors_files(folder: Path, tensors: Iterable[LazyTensor], shard_bytes: int) -> None:
    """Write tensors to one safetensors file, or to shards and their index as transformers reads them. A tensor is never
    split."""
    shards = _split_into_shards(list(tensors), shard_bytes)
    if len(shards) == 1:
        _write_safetensors_file(folder / SINGLE, shards[0])
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_safetensors_file(folder / name, shard)
        where |= {piece.name: name for piece in shard}
    total = sum(piece.bytes for shard in shards for piece in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split_into_shards(pieces: list[LazyTensor], max_shard_bytes: int) -> list[list[LazyTensor]]:
    shards: list[list[LazyTensor]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.bytes
    return shards


def _write_safetensors_file(path: Path, pieces: list[LazyTensor]) -> None:
    pieces = sorted(pieces, key=lambda p: p.bytes % ALIGN != 0)  # stable: odd sizes last
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    at = 0
    for piece in pieces:
        header[piece.name] = {
            "dtype": _NAMES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [at, at + piece.bytes],
        }
        at += piece.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGN)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in iterate_and_report(pieces, "tensors"):
            file.write(_bytes(piece))


def _bytes(piece: LazyTensor) -> memoryview:
    tensor = piece.make().detach().cpu().contiguous()
    actual = (tensor.dtype, tuple(tensor.shape))
    assert actual == (piece.dtype, piece.shape), f"{piece.name} is {actual}, not {piece.dtype} {piece.shape}"
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def iterate_mapped_tensors(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of files whose headers were checked, mapped privately: training on it leaves the file
    alone."""
    from safetensors import safe_open

    for path in weights.files.values():
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    yield name, file.get_tensor(name)
