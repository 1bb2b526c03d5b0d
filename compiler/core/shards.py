"""Tensors that a long pass has made, unit by unit: files that are there whole or not at all."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


class Shards:
    """Tensors by the name of what they belong to. A second run of the same step reads what the first had made.

    The folder is the step's own (`ctx.workdir`), whose name holds all that decides the result.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def get_or_compute_tensors(self, shard_name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of `shard_name`, made once; on disk before they are returned."""
        file = self.folder / f"{hashlib.sha256(shard_name.encode()).hexdigest()[:24]}.safetensors"
        if file.exists():
            return load_file(file)
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in compute().items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}")
        save_file(tensors, draft, {"of": shard_name})
        with open(draft, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(draft, file)
        return tensors
