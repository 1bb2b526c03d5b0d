"""Files of a training run: folders of tensors, and a manifest that names the valid ones.

    training.json       how far the run is and which folders belong to it; written last, whole
    state-40/           weights and optimizer after step 40
    best-20/            the best weights so far, those after step 20

Whatever the manifest doesn't name was being written, or was replaced, when the run was killed.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...core.cache import canonical_json, fsync_path, write_atomic
from ...models.checkpoints.tensor_files import LazyTensor, iterate_mapped_tensors, write_safetensors_files
from ...models.checkpoints.weights import read_weight_headers

MANIFEST = "training.json"


class RunCheckpoints:
    """`identity` tells runs apart: a manifest of another one is not read."""

    def __init__(self, folder: Path, identity: str):
        self.folder, self.identity = folder, identity

    def read_checkpoint_and_clean_up(self) -> dict[str, Any] | None:
        """Run of the last manifest, or None; folders that it doesn't name are removed."""
        try:
            body = json.loads((self.folder / MANIFEST).read_bytes())
        except (FileNotFoundError, json.JSONDecodeError):
            body = {}
        known = body.get("identity") == self.identity and all((self.folder / name).is_dir() for name in body["folders"])
        self._remove_other_folders(body["folders"] if known else [])
        return body["run"] if known else None

    def load_tensors(self, folder_name: str) -> dict[str, Tensor]:
        """Tensors of a folder, mapped from disk."""
        return dict(iterate_mapped_tensors(read_weight_headers(self.folder / folder_name, folder_name)))

    def write_tensors(self, folder_name: str, tensors: Mapping[str, Tensor]) -> None:
        """A folder of tensors, there whole or not at all; it counts once the manifest names it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        final, draft = self.folder / folder_name, self.folder / f".{folder_name}.{os.getpid()}"
        draft.mkdir()
        write_safetensors_files(
            draft, [LazyTensor.of(key, tensor) for key, tensor in tensors.items()], shard_bytes=1 << 62
        )
        for path in (*draft.iterdir(), draft):
            fsync_path(path)
        shutil.rmtree(final, ignore_errors=True)  # left by a run that was killed before it could name it
        os.replace(draft, final)

    def write_manifest_and_prune_folders(self, run_json: Mapping[str, Any], folder_names: list[str]) -> None:
        """Let these folders count, and remove the others."""
        body = {"identity": self.identity, "folders": folder_names, "run": run_json}
        write_atomic(self.folder / MANIFEST, canonical_json(body).encode())
        self._remove_other_folders(folder_names)

    def _remove_other_folders(self, listed_folder_names: list[str]) -> None:
        for path in self.folder.glob("*"):
            if (
                path.is_dir()
                and path.name.removeprefix(".").startswith(("state-", "best-"))
                and path.name not in listed_folder_names
            ):
                shutil.rmtree(path, ignore_errors=True)
