"""Results of finished steps, by what they were made from.

    steps/KEY.json     one finished step: the parts of its key, the edits so far, where every tensor is, notes
    blobs/ab/HASH      one tensor each, named by the hash of its content, so equal tensors are kept once
    values/KEY.json    small results: measured values of the original model
    work/KEY/          scratch of steps that have not finished: what a killed run goes on from
    models/HASH/       a model that was in memory, with the recipes that `effc.optimize` made for it
    skeletons/ …       other folders belong to the files that write them

Every file is written whole, synced and renamed; a step's file comes after its tensors. What is read is held against
its name or its seal first, and a folder that others can write to is refused.
"""

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...dsl.syntax.diagnostics import Reject
from .json_errors import reject_on_error
from .key_diff import cache_miss_reason_text
from .safe_read import refuse_irregular_file, refuse_unsafe_write_folder
from .sealed_json import (
    HASH,
    SEAL,
    cache_closed,
    cache_damaged,
    canonical_json,
    read_sealed_hash,
    read_sealed_record,
    read_self_named_record,
    refuse_writable_by_others,
    sealed_json_bytes,
)
from .temporary_folder import is_in_use

if TYPE_CHECKING:
    import torch

LARGE = 1 << 20  # bytes of a tensor from which on it is worth a file that is mapped
_DRAFT = re.compile(r"\..+\.\d+")  # as `write_atomic` names them


def canonical_json_sha256(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _is_sha256_of_key_fields(key: str, key_fields: Any) -> bool:
    """Whether `key` is the digest of a record's parts; nothing is of numbers beyond floats."""
    try:
        return canonical_json_sha256(key_fields) == key
    except (ValueError, RecursionError):
        return False


STRAY = 3600.0  # seconds after which a draft is what a killed run left: no file takes as long to write
ALIGNMENT = 64  # bytes, of every tensor that torch makes on a CPU
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)  # of a folder that can only be read


def write_atomic_if_permitted(path: Path, data: bytes) -> None:
    """`write_atomic` of what is made again where it is lost: nothing in a folder that can only be read."""
    try:
        write_atomic(path, data)
    except OSError as error:
        if error.errno not in CLOSED:
            raise


def write_atomic(path: Path, *data: "bytes | memoryview") -> None:
    """Write so that a reader sees all of it or nothing, whenever the writer dies."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.unlink(missing_ok=True)  # of a process that died and had our number, or a link that somebody left
        with open(draft, "xb") as file:
            file.writelines(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:  # what `write` and `fsync` raise names no file, and a draft is nobody's
        error.filename = str(path)
        raise
    finally:
        draft.unlink(missing_ok=True)


def fsync_path(path: Path) -> None:
    """Have the file system put a file or folder on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class CachedStep:
    """One finished step as `effc cache ls` lists it. `bytes` counts tensors that may be shared with others."""

    key: str
    parts: Mapping[str, Any]
    body: Mapping[str, Any]
    bytes: int
    used: float


def default_cache_folder() -> Path:
    """EFFC_CACHE_DIR, or the user's cache folder."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("EFFC_CACHE_DIR") or user_cache_path("effc"))


class Cache:
    def __init__(self, folder: Path):
        """Raises Reject (cache-open) where others can write to the folder."""
        refuse_writable_by_others(folder)
        self.folder = folder

    def scratch_folder(self, step_key: str) -> Path:
        return self.folder / "work" / step_key

    def make_checked_scratch(self, step_key: str) -> Path:
        """The folder of a step that is about to run. Raises Reject (cache-closed) where it can't be made, and
        (odd-file) where links lie there: what a step keeps would be written to somebody else's files."""
        if (self.folder / "work").is_symlink():
            refuse_unsafe_write_folder(self.folder / "work")
        if os.path.lexists(self.scratch_folder(step_key)):
            refuse_unsafe_write_folder(self.scratch_folder(step_key))
        try:
            self.scratch_folder(step_key).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno not in CLOSED:
                raise
            raise cache_closed(
                f"a step is not in the cache, and {self.folder} can only be read",
                help="give a folder that you can write to by --cache-dir",
            ).rejection() from error
        return self.scratch_folder(step_key)

    # -- steps ------------------------------------------------------------------------------------------------
    def is_step_complete(self, step_key: str) -> bool:
        return self.read_complete_step(step_key) is not None

    def read_complete_step(self, step_key: str) -> dict | None:
        """A finished step, or None; one whose tensors are not all there counts as unfinished.

        Sets the time of last use, by which old steps are deleted.
        """
        path = self.folder / "steps" / f"{step_key}.json"
        body = self._read_checked_step_record(path)
        if body is None or not all(self.tensor_path(h).is_file() for h in body["tensors"].values() if h):
            return None
        if not all(self.is_step_complete(needed) for needed in body.get("needs", ())):
            return None
        with suppress(OSError):  # a cache that can only be read
            os.utime(path)
        return body

    def _read_checked_step_record(self, path: Path) -> dict | None:
        """A step's record, None where it has no seal; Reject (cache-damaged) one that was changed or is none."""
        body = read_sealed_record(path, self.folder)
        if body is None:
            return None
        self._refuse_invalid_step_record(path, body)
        return body if SEAL in body else None  # of before there were seals: computed again

    @staticmethod
    def _refuse_invalid_step_record(path: Path, body: Mapping[str, Any]) -> None:
        tables = all(isinstance(body.get(name), dict) for name in ("parts", "tensors", "borrowed", "edits", "notes"))
        matches_key = not HASH.fullmatch(path.stem) or (tables and _is_sha256_of_key_fields(path.stem, body["parts"]))
        needs = body.get("needs", [])
        listed = isinstance(needs, list) and path.stem not in needs and all(isinstance(key, str) for key in needs)
        if (
            not tables
            or not matches_key
            or not listed
            or body.get("key") != path.stem
            or not all(h is None or (isinstance(h, str) and HASH.fullmatch(h)) for h in body["tensors"].values())
        ):
            raise cache_damaged(
                f"{path} is no record of a finished step", help="run `effc cache verify --delete`, then compile again"
            ).rejection()

    def write_step_record(self, step_key: str, key_fields: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        """Record a step whose tensors are stored; its scratch is no longer needed."""
        record = {"key": step_key, "parts": key_fields, **body}
        write_atomic(self.folder / "steps" / f"{step_key}.json", sealed_json_bytes(record))
        shutil.rmtree(self.scratch_folder(step_key), ignore_errors=True)

    # -- tensors ----------------------------------------------------------------------------------------------
    def tensor_path(self, tensor_hash: str) -> Path:
        return self.folder / "blobs" / tensor_hash[:2] / tensor_hash

    def store_tensor(self, tensor: "torch.Tensor") -> str:
        """Keep a tensor; its name is the hash of dtype, shape and content."""
        from safetensors.torch import save

        name = tensor_hash(tensor)
        path = self.tensor_path(name)
        if not path.is_file():
            write_atomic(path, *_split_and_pad_safetensors_header(save({"t": tensor.detach().cpu().contiguous()})))
        return name

    def load_verified_tensor(self, expected_hash: str) -> "torch.Tensor":
        """A stored tensor, mapped from disk; Reject (cache-damaged) where its hash is another than its name."""
        from safetensors import safe_open

        path = self.tensor_path(expected_hash)
        with reject_on_error(
            cache_damaged, f"{path} can't be read", "run `effc cache verify --delete`, then compile again"
        ):
            refuse_irregular_file(path, root=self.folder)
            with safe_open(path, "pt") as file:
                tensor = file.get_tensor("t")
        if tensor_hash(tensor) != expected_hash:
            raise cache_damaged(
                f"{path} holds another tensor than its name says",
                help="run `effc cache verify --delete`, then compile again",
            ).rejection()
        return tensor

    def map_stored_tensor(self, tensor_hash: str) -> "torch.Tensor":
        """A tensor that was stored just now, mapped privately: not hashed again."""
        from safetensors import safe_open

        with safe_open(self.tensor_path(tensor_hash), "pt") as file:
            return file.get_tensor("t")

    # -- small values -----------------------------------------------------------------------------------------
    def read_value(self, key_fields: Mapping[str, Any]) -> Any:
        """A small value by the parts of its key, or None; Reject (cache-damaged) where either was changed."""
        body = self._read_checked_value_record(self.folder / "values" / f"{canonical_json_sha256(key_fields)}.json")
        return None if body is None else body["value"]

    def _read_checked_value_record(self, path: Path) -> dict | None:
        body = read_sealed_record(path, self.folder)
        if body is None or SEAL not in body:  # of before there were seals: measured again
            return None
        if not {"parts", "value"} <= set(body) or canonical_json_sha256(body["parts"]) != path.stem:
            raise cache_damaged(
                f"{path} is the value of something else than its name says",
                help="run `effc cache verify --delete`, then compile again",
            ).rejection()
        return body

    def store_value(self, key_fields: Mapping[str, Any], value: Any) -> None:
        write_atomic_if_permitted(
            self.folder / "values" / f"{canonical_json_sha256(key_fields)}.json",
            sealed_json_bytes({"parts": key_fields, "value": value}),
        )

    # -- care -------------------------------------------------------------------------------------------------
    def finished_steps(self) -> list[CachedStep]:
        """Finished steps, last used first."""
        entries = []
        for path in (self.folder / "steps").glob("*.json"):
            try:
                body = self._read_checked_step_record(path)
            except Reject:  # `damaged` says so
                continue
            if body is None:
                continue
            blobs = [self.tensor_path(h) for h in set(body["tensors"].values()) if h]
            size = sum(b.stat().st_size for b in blobs if b.is_file())
            entries.append(CachedStep(path.stem, body["parts"], body, size, path.stat().st_mtime))
        return sorted(entries, key=lambda e: -e.used)

    def num_unreadable_steps(self) -> int:
        """Number of records of steps that `entries` leaves out."""
        return sum(1 for _ in (self.folder / "steps").glob("*.json")) - len(self.finished_steps())

    def cache_miss_reason(self, key_fields: Mapping[str, Any]) -> str:
        """Why a step with these parts is not in the cache: the first part that differs from its nearest kin."""
        return cache_miss_reason_text(self._key_fields_of_steps(), key_fields)

    def _key_fields_of_steps(self) -> list[Mapping[str, Any]]:
        """Parts of finished steps, last used first; a plan asks for each of its steps, so a record is read once."""
        dated = []
        for path in (self.folder / "steps").glob("*.json"):
            with suppress(OSError):  # another process frees what is no longer used
                dated.append((path.stat().st_mtime_ns, path))
        known = (_key_fields_of_step(path, changed) for changed, path in sorted(dated, reverse=True))
        return [parts for parts in known if parts is not None]

    def damaged_files_with_faults(self) -> Iterator[tuple[Path, str]]:
        """Yield every file that does not hold what its name says, with the reason."""
        for path in sorted((self.folder / "blobs").glob("*/*")):
            if not HASH.fullmatch(path.name) and not _DRAFT.fullmatch(path.name):
                yield path, "no name of a tensor"
            elif not _DRAFT.fullmatch(path.name):
                yield from _path_and_fault_if_rejected(path, partial(self.load_verified_tensor, path.name))
        for path in sorted((self.folder / "steps").glob("*.json")):
            refusals = list(_path_and_fault_if_rejected(path, partial(self._read_checked_step_record, path)))
            yield from refusals
            if not refusals and self._read_checked_step_record(path) is None:
                yield path, "written before steps had seals, and no longer used"
            elif not refusals and self.read_complete_step(path.stem) is None:
                yield path, "tensors that it names are gone"
        for path in sorted((self.folder / "values").glob("*.json")):
            yield from _path_and_fault_if_rejected(path, partial(self._read_checked_value_record, path))
        for path in sorted((*self.folder.glob("skeletons/*.json"), *self.folder.glob("gguf/*.json"))):
            yield from _path_and_fault_if_rejected(path, partial(read_self_named_record, path, self.folder))
        for path in sorted((self.folder / "hashes").glob("*/*")):
            if not _DRAFT.fullmatch(path.name):
                yield from _path_and_fault_if_rejected(path, partial(read_sealed_hash, path, self.folder))

    def evict_unused_and_count_bytes(self, *, keep_seconds: float) -> int:
        """Drop steps, scratch and saved models not used for so long, and tensors that no step names; bytes freed."""
        freed, horizon = 0, time.time() - keep_seconds
        for entry in self.finished_steps():
            if entry.used <= horizon:
                freed += _unlink_and_return_size(self.folder / "steps" / f"{entry.key}.json")
        named = {h for e in self.finished_steps() for h in e.body["tensors"].values()}
        for path in (self.folder / "blobs").glob("*/*"):
            if path.name not in named and path.stat().st_mtime <= horizon:
                freed += _unlink_and_return_size(path)
        for path in (*self.folder.glob("work/*"), *self.folder.glob("models/*")):
            if path.stat().st_mtime <= horizon and not is_in_use(path):
                freed += sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                shutil.rmtree(path, ignore_errors=True)
        return freed + self.delete_stale_drafts_and_count_bytes()

    def delete_stale_drafts_and_count_bytes(self) -> int:
        """Drop the drafts that killed runs left in any folder of the cache; bytes freed."""
        horizon, freed = time.time() - STRAY, 0
        for folder, _, names in os.walk(self.folder):  # which minds no folder that vanishes
            for path in (Path(folder, name) for name in names if _DRAFT.fullmatch(name)):
                if _mtime_or_infinity(path) < horizon:
                    freed += _unlink_and_return_size(path)
        return freed


def _path_and_fault_if_rejected(path: Path, read_file: Callable[[], Any]) -> Iterator[tuple[Path, str]]:
    """The path and the reason where a file is refused."""
    try:
        read_file()
    except Reject as reject:
        yield path, reject.diagnostics[0].message.removeprefix(f"{path} ")


def _mtime_or_infinity(path: Path) -> float:
    """When a file was last written, in seconds since the epoch; never where another run has just dropped it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _unlink_and_return_size(path: Path) -> int:
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:  # another run collects, too
        return 0
    return size


def _split_and_pad_safetensors_header(file: bytes) -> tuple[bytes, memoryview]:
    """A safetensors file whose header is filled up, so that mapped numbers lie where torch would put new ones.

    What a matrix product rounds depends on that on some processors: a step would give other bits after its input came
    from the cache than after it was made.
    """
    end = 8 + int.from_bytes(file[:8], "little")
    padding = -end % ALIGNMENT
    return (end - 8 + padding).to_bytes(8, "little") + file[8:end] + b" " * padding, memoryview(file)[end:]


def tensor_hash(tensor: "torch.Tensor") -> str:
    """sha256 over dtype, shape and bytes of a tensor."""
    import torch

    flat = tensor.detach().cpu().contiguous()
    head = f"{flat.dtype} {tuple(flat.shape)} ".encode()
    hasher = hashlib.sha256(head)
    if flat.numel():
        hasher.update(flat.view(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


@lru_cache(maxsize=1 << 14)
def _key_fields_of_step(record_path: Path, _mtime_ns: int) -> Mapping[str, Any] | None:
    """Parts of a finished step by its record as it was at a time, None of one that is damaged or has no seal."""
    try:
        body = Cache(record_path.parents[1])._read_checked_step_record(record_path)
    except Reject:
        return None
    return None if body is None else body["parts"]
