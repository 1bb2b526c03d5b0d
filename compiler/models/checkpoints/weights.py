"""The safetensors files that are a folder's weights, by their headers, without torch."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ....dsl.syntax.diagnostics import Fault
from ...core.json_errors import describe_json_error
from ...core.safe_read import MALFORMED, MANIFEST, read_json
from .safetensors_header import FLOATS, Header, TensorSlot, damaged_weights, read_safetensors_header

no_model = Fault("no-model", "A model source points at something that holds no model.", exit="environment")
pickle_weights = Fault(
    "pickle-weights",
    "A model has its weights only as a pickle, which runs code when it is read.\n\n"
    "effc reads safetensors and GGUF. Take a revision of the model with safetensors, or convert the file once, "
    "in a place of its own, if you trust its author.",
    exit="environment",
)
missing_shard = Fault(
    "missing-shard", "The index of a sharded checkpoint names files that are not there.", exit="environment"
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Weights:
    """The safetensors files of a folder and their headers, by file name."""

    files: Mapping[str, Path]
    headers: Mapping[str, Header]

    @property
    def slots(self) -> dict[str, TensorSlot]:
        return {name: slot for header in self.headers.values() for name, slot in header.slots.items()}

    @property
    def count(self) -> int:
        """Numbers in all tensors."""
        return sum(slot.count for slot in self.slots.values())

    @property
    def bytes(self) -> int:
        return sum(slot.end - slot.start for slot in self.slots.values())

    @property
    def dtype(self) -> str:
        """The float type that most bytes are in."""
        count: Counter[str] = Counter()
        for slot in self.slots.values():
            count[slot.dtype] += slot.end - slot.start
        return FLOATS.get(count.most_common(1)[0][0], "") if count else ""


def read_weight_headers(folder: Path, label: str) -> Weights:
    """Headers of the safetensors files, or `Reject` saying what lies there instead.

    These alone are a folder's weights: they are hashed, locked and, by `mapped`, loaded. One file counts before an
    index, as in transformers.
    """
    if (folder / SINGLE).is_file():
        return Weights({SINGLE: folder / SINGLE}, {SINGLE: read_safetensors_header(folder / SINGLE)})
    if (folder / INDEX).is_file():
        return _read_sharded_headers(folder, label)
    pickles = sorted(f.name for pattern in PICKLES for f in folder.glob(pattern))
    if pickles:
        raise pickle_weights(
            f"{label}: the weights are only there as {', '.join(pickles[:3])}",
            help="take a revision with model.safetensors, or load the model once with "
            "transformers where you trust it and `save_pretrained` it",
        ).rejection()
    if shards := sorted(f.name for f in folder.glob("model-*-of-*.safetensors")):
        raise no_model(
            f"{label}: {folder} has {len(shards)} shards and no {INDEX}", help="fetch the index of the shards"
        ).rejection()
    raise no_model(
        f"{label}: there is no {SINGLE} in {folder}",
        help=missing_weights_hint(folder)
        if any(folder.glob("*.gguf"))
        else 'fetch the weights; config.json alone is read with config("config.json"), which makes random ones',
    ).rejection()


def _read_sharded_headers(folder: Path, label: str) -> Weights:
    index = folder / INDEX
    try:
        read = read_json(index, MANIFEST)
    except MALFORMED as error:
        raise damaged_weights(
            f"{index} is no index of shards", help="fetch it again", note=describe_json_error(error)
        ).rejection() from error
    weight_map = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(weight_map, dict):
        reason = "its `weight_map`, which says which file a tensor is in, is no object"
        raise damaged_weights(f"{index} is no index of shards: {reason}", help="fetch it again").rejection()
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise damaged_weights(f"{index} names no file for `{tensor}`", help="fetch it again").rejection()
    names = sorted(set(weight_map.values()))
    if not all(n and Path(n).name == n for n in names):
        raise damaged_weights(f"{index} names files outside its folder", help="fetch it again").rejection()
    absent = [n for n in names if not (folder / n).is_file()]
    if absent:
        raise missing_shard(
            f"{label}: {len(absent)} of {len(names)} shards are not there: {', '.join(absent[:3])}",
            help=f"fetch them into {folder}",
        ).rejection()
    headers = {n: read_safetensors_header(folder / n) for n in names}
    unindexed = [t for t, n in weight_map.items() if t not in headers[n].slots]
    if unindexed:
        raise missing_shard(
            f"{label}: `{unindexed[0]}` is not in {weight_map[unindexed[0]]}, where the index puts it",
            help="fetch the index and the shards of one revision",
        ).rejection()
    first: dict[str, str] = {}
    for name in names:
        for tensor in headers[name].slots:
            if tensor in first:
                raise damaged_weights(
                    f"{label}: `{tensor}` is in {first[tensor]} and again in {name}",
                    help="fetch the index and the shards of one revision",
                ).rejection()
            first[tensor] = name
    return Weights({INDEX: index, **{n: folder / n for n in names}}, headers)


def missing_weights_hint(folder: Path) -> str:
    if not os.path.isdir(folder):
        return "take a folder that `save_pretrained` wrote"
    if any(folder.glob("*.gguf")):
        return f'a GGUF file is read with gguf("{next(folder.glob("*.gguf")).name}")'
    inner = next(folder.glob("*/config.json"), None)
    return f"one lies in {inner.parent}" if inner else "take a folder that `save_pretrained` wrote"
