"""Results of finished steps, by what they were made from.

    steps/KEY.json     one finished step: the parts of its key, the edits so far, where every tensor is, notes
    blobs/ab/HASH      one tensor each, named by the hash of its content, so equal tensors are kept once
    values/KEY.json    small results: measured values of the original model
    work/KEY/          scratch of steps that have not finished: what a killed run goes on from
    skeletons/ …       other folders belong to the files that write them

Every file is written whole, synced and renamed; a step's file comes after its tensors.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...dsl.diagnostics import Fault, Reject

if TYPE_CHECKING:
    import torch

cache_damaged = Fault("cache-damaged", "A file of the cache does not hold what its name says.", exit="environment")


_DRAFT = re.compile(r"\..+\.\d+")    # as `write_whole` names them


def canonical(value: Any) -> str:
    """JSON with one spelling per value: what hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()


STRAY = 3600.0      # seconds after which a draft is what a killed run left: no file takes as long to write


def write_whole(path: Path, data: bytes) -> None:
    """Write so that a reader sees all of it or nothing, whenever the writer dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(draft, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@dataclass(frozen=True)
class Entry:
    """One finished step as `effc cache ls` lists it. `bytes` counts tensors that may be shared with others."""

    key: str
    parts: Mapping[str, Any]
    body: Mapping[str, Any]
    bytes: int
    used: float


def default_cache() -> Path:
    """EFFC_CACHE_DIR, or the user's cache folder."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("EFFC_CACHE_DIR") or user_cache_path("effc"))


class Cache:
    def __init__(self, folder: Path):
        self.folder = folder

    def work(self, key: str) -> Path:
        return self.folder / "work" / key

    # -- steps ------------------------------------------------------------------------------------------------
    def has(self, key: str) -> bool:
        return self.step(key) is not None

    def step(self, key: str) -> dict | None:
        """A finished step, or None; one whose tensors are not all there counts as unfinished."""
        path = self.folder / "steps" / f"{key}.json"
        try:
            body = json.loads(path.read_bytes())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        if all(self.blob(h).is_file() for h in body["tensors"].values() if h):
            os.utime(path)
            return body
        return None

    def finish(self, key: str, parts: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        """Record a step whose tensors are stored; its scratch is no longer needed."""
        record = {"key": key, "parts": parts, **body}
        write_whole(self.folder / "steps" / f"{key}.json", canonical(record).encode())
        shutil.rmtree(self.work(key), ignore_errors=True)

    # -- tensors ----------------------------------------------------------------------------------------------
    def blob(self, name: str) -> Path:
        return self.folder / "blobs" / name[:2] / name

    def store(self, tensor: "torch.Tensor") -> str:
        """Keep a tensor; its name is the hash of dtype, shape and content."""
        from safetensors.torch import save

        name = tensor_hash(tensor)
        path = self.blob(name)
        if not path.is_file():
            write_whole(path, save({"t": tensor.detach().cpu().contiguous()}))
        return name

    def fetch(self, name: str) -> "torch.Tensor":
        """A stored tensor, mapped from disk."""
        from safetensors import SafetensorError, safe_open

        path = self.blob(name)
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor("t")
        except (SafetensorError, OSError, KeyError) as error:
            raise Reject(cache_damaged(f"{path} can't be read: {error}",
                                       help="run `effc cache verify --delete`, then compile again")) from error

    # -- small values -----------------------------------------------------------------------------------------
    def value(self, parts: Mapping[str, Any]) -> Any:
        """A small value by the parts of its key, or None."""
        try:
            return json.loads((self.folder / "values" / f"{digest(parts)}.json").read_bytes())["value"]
        except (FileNotFoundError, json.JSONDecodeError, KeyError):
            return None

    def keep(self, parts: Mapping[str, Any], value: Any) -> None:
        write_whole(self.folder / "values" / f"{digest(parts)}.json",
                    canonical({"parts": parts, "value": value}).encode())

    # -- care -------------------------------------------------------------------------------------------------
    def entries(self) -> list[Entry]:
        """Finished steps, last used first."""
        found = []
        for path in (self.folder / "steps").glob("*.json"):
            try:
                body = json.loads(path.read_bytes())
            except json.JSONDecodeError:
                continue
            blobs = [self.blob(h) for h in set(body["tensors"].values()) if h]
            size = sum(b.stat().st_size for b in blobs if b.is_file())
            found.append(Entry(path.stem, body["parts"], body, size, path.stat().st_mtime))
        return sorted(found, key=lambda e: -e.used)

    def why(self, parts: Mapping[str, Any]) -> str:
        """Why a step with these parts is not in the cache: the first part that differs from its nearest kin."""
        kin = [e for e in self.entries() if e.parts.get("step", {}).get("word") == parts["step"]["word"]]
        if not kin:
            return f"no result of {parts['step']['word']} is kept"
        nearest = max(kin, key=lambda e: sum(e.parts.get(k) == v for k, v in parts.items()))
        for name, value in parts.items():
            if nearest.parts.get(name) != value:
                return f"{name} differs: {_short(nearest.parts.get(name))} then, {_short(value)} now"
        return "kept, but some of its tensors are gone"

    def damaged(self) -> Iterator[tuple[Path, str]]:
        """Every file that does not hold what its name says, with the reason."""
        for path in sorted((self.folder / "blobs").glob("*/*")):
            try:
                sound = tensor_hash(self.fetch(path.name)) == path.name
            except Reject:
                sound = False
            if not sound:
                yield path, "the tensor's hash is another one"
        for path in sorted((self.folder / "steps").glob("*.json")):
            if self.step(path.stem) is None:
                yield path, "not JSON, or tensors that it names are gone"

    def collect(self, *, keep_seconds: float) -> int:
        """Drop steps and scratch not used for so long, and tensors that no step names; bytes freed."""
        freed, horizon = 0, time.time() - keep_seconds
        for entry in self.entries():
            if entry.used <= horizon:
                freed += _drop(self.folder / "steps" / f"{entry.key}.json")
        named = {h for e in self.entries() for h in e.body["tensors"].values()}
        for path in (self.folder / "blobs").glob("*/*"):
            if path.name not in named and path.stat().st_mtime <= horizon:
                freed += _drop(path)
        for path in (self.folder / "work").glob("*"):
            if path.stat().st_mtime <= horizon:
                freed += sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                shutil.rmtree(path, ignore_errors=True)
        return freed + self.sweep()

    def sweep(self) -> int:
        """Drop the drafts that killed runs left in any folder of the cache; bytes freed."""
        horizon, freed = time.time() - STRAY, 0
        for folder, _, names in os.walk(self.folder):          # which minds no folder that vanishes
            for path in (Path(folder, name) for name in names if _DRAFT.fullmatch(name)):
                if _written(path) < horizon:
                    freed += _drop(path)
        return freed


def _written(path: Path) -> float:
    """When a file was last written, in seconds since the epoch; never where another run has just dropped it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _drop(path: Path) -> int:
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:        # another run collects, too
        return 0
    return size


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else canonical(value)
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"


def tensor_hash(tensor: "torch.Tensor") -> str:
    """sha256 over dtype, shape and bytes of a tensor."""
    import torch

    flat = tensor.detach().cpu().contiguous()
    head = f"{flat.dtype} {tuple(flat.shape)} ".encode()
    found = hashlib.sha256(head)
    if flat.numel():
        found.update(memoryview(flat.view(-1).view(torch.uint8).numpy()))
    return found.hexdigest()
