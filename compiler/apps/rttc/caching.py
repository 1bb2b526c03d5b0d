"""Caches of earlier queries: lists of samples and adapted states, looked up by similarity of the query.

A folder of `index.json` and one safetensors file an entry. Everything in it was made by one base model, embedder,
knowledge base and shape of adapter; where one of them is another now, the folder is emptied. What can't be written
(a full disk) is forgotten, and answers go on.
"""

import json
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ....dsl.syntax.diagnostics import Reject
from ...core.cache import write_atomic
from ...core.safe_read import MALFORMED, MANIFEST, read_json, refuse_irregular_file

FORMAT, _INDEX = 1, "index.json"
Eviction = Literal["lfu", "lru"]


@dataclass
class SemanticCacheEntry:
    """`used` counts hits, `touched` is the turn of the last one, `made` that of its birth."""

    number: int
    vector: Tensor
    tensors: Mapping[str, Tensor]
    used: int
    touched: int
    born: int

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.vector, *self.tensors.values()))


class StateCache:
    """States by the unit vector of the query that made them; all methods may be called from any thread.

    identity    of all that the states depend on
    min_cosine  cosine from which a query takes another's state; above 1 nothing does, -1 takes the nearest
    max_bytes   that the states may hold together; one that is larger alone is not kept
    eviction    "lfu": the least often used goes, the oldest of equals; "lru": the one not used for longest
    folder      None keeps nothing over a restart
    """

    def __init__(
        self, identity: str, min_cosine: float, max_bytes: int, eviction: Eviction = "lfu", folder: Path | None = None
    ):
        self.identity, self.threshold, self.max_bytes, self.eviction = identity, min_cosine, max_bytes, eviction
        self._folder, self._lock = folder, threading.RLock()
        self._entries: dict[int, SemanticCacheEntry] = {}
        self._counter = 0
        self._version = ""
        self.hits = self.misses = self.evictions = self.unsaved = 0
        if folder is not None:
            self._restore_entries_and_delete_others(folder)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def n_bytes(self) -> int:
        """Bytes of all states."""
        with self._lock:
            return sum(entry.bytes for entry in self._entries.values())

    def find_nearest(self, vector: Tensor) -> Mapping[str, Tensor] | None:
        """The state of the nearest query, where it is near enough."""
        with self._lock:
            self._counter += 1
            entries = list(self._entries.values())
            if entries:
                scores = torch.stack([entry.vector for entry in entries]) @ vector
                best = int(scores.argmax())
                if float(scores[best]) >= self.threshold:
                    entries[best].used += 1
                    entries[best].touched = self._counter
                    self.hits += 1
                    return entries[best].tensors
            self.misses += 1
            return None

    def has_near_state(self, vector: Tensor) -> bool:
        """Whether `find_nearest` would give a state; counts nothing."""
        with self._lock:
            return any(float(entry.vector @ vector) >= self.threshold for entry in self._entries.values())

    def put(self, vector: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Keep a state, copied; those that are worth least make room."""
        with self._lock:
            self._counter += 1
            number = max(self._entries, default=0) + 1
            entry = SemanticCacheEntry(
                number,
                vector.detach().clone(),
                {n: t.detach().clone() for n, t in tensors.items()},
                0,
                self._counter,
                self._counter,
            )
            if entry.bytes > self.max_bytes:
                return
            while self._entries and self.n_bytes + entry.bytes > self.max_bytes:
                self._drop(min(self._entries.values(), key=self._eviction_rank))
                self.evictions += 1
            self._entries[number] = entry
            self._write_entry(entry)

    def drop_other_versions(self, version: str) -> None:
        """Belong to a version of the knowledge base: what another one left is dropped, also by an earlier process."""
        with self._lock:
            if version == self._version:
                return
            for entry in list(self._entries.values()):
                self._drop(entry)
            self._version = version
            self._write_index()

    def flush(self) -> None:
        """Write the counts of use, which `find` keeps in memory."""
        with self._lock:
            self._write_index()

    def _eviction_rank(self, entry: SemanticCacheEntry) -> tuple[int, int]:
        return (entry.used, entry.born) if self.eviction == "lfu" else (entry.touched, entry.born)

    def _drop(self, entry: SemanticCacheEntry) -> None:
        del self._entries[entry.number]
        if self._folder is not None:
            with suppress(OSError):  # what stays is in no index, and is removed by the next process
                self._file(entry.number).unlink(missing_ok=True)

    def _write_entry(self, entry: SemanticCacheEntry) -> None:
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            state = {f"state.{name}": tensor.contiguous() for name, tensor in entry.tensors.items()}
            save_file({"vector": entry.vector, **state}, self._file(entry.number))
        except (OSError, SafetensorError):
            self.unsaved += 1
        self._write_index()

    def _write_index(self) -> None:
        if self._folder is None:
            return
        rows = {str(e.number): [e.used, e.touched, e.born] for e in self._entries.values()}
        body = {"format": FORMAT, "identity": self.identity, "turn": self._counter}
        body |= {"version": self._version, "entries": rows}
        try:
            write_atomic(self._folder / _INDEX, json.dumps(body).encode())
        except OSError:
            self.unsaved += 1

    def _restore_entries_and_delete_others(self, folder: Path) -> None:
        """Load what an earlier process left, where it fits; the rest is removed."""
        try:
            body = read_json(folder / _INDEX, MANIFEST)
            fits = body["format"] == FORMAT and body["identity"] == self.identity
            rows = {int(number): tuple(map(int, row)) for number, row in body["entries"].items()} if fits else {}
            self._counter = int(body["turn"]) if fits else 0
            self._version = str(body.get("version", "")) if fits else ""
        except (OSError, Reject, *MALFORMED):
            rows = {}
        for number, (used, touched, born) in sorted(rows.items()):
            try:
                refuse_irregular_file(self._file(number))
                tensors = load_file(self._file(number))
                vector = tensors.pop("vector")
                state = {name.removeprefix("state."): tensor for name, tensor in tensors.items()}
                self._entries[number] = SemanticCacheEntry(number, vector, state, used, touched, born)
            except (OSError, KeyError, SafetensorError, Reject):
                continue
        for file in folder.glob("entry-*.safetensors"):
            if file not in {self._file(number) for number in self._entries}:
                with suppress(OSError):
                    file.unlink(missing_ok=True)
        while self.n_bytes > self.max_bytes:
            self._drop(min(self._entries.values(), key=self._eviction_rank))

    def _file(self, entry_index: int) -> Path:
        assert self._folder is not None, "a cache in memory has no files"
        return self._folder / f"entry-{entry_index:08}.safetensors"
