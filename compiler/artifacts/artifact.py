"""Writes an artifact folder so that it is there whole or not at all.

Files go to a hidden folder beside the destination; when everything is on disk, manifest last, one rename puts
it into place. A process that dies leaves a hidden folder without a manifest, which nothing loads and which
the next write into that place sweeps away.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISREG

from safetensors import SafetensorError

from ...dsl.syntax.diagnostics import Diagnostic, Fault
from ..core.cache import fsync_path, write_atomic
from ..core.process_start import process_start_text
from ..core.resource_errors import RAISE_FILE_LIMIT, disk_full_errno
from .card import model_card
from .manifest import CARD, MEASURES, NAME, SBOM, Manifest, artifact_hash, hash_files, readable_json_bytes, verify_files
from .sbom import cyclonedx_json

__all__ = ["NOTES", "artifact_draft", "artifact_hash", "verify_files"]

NOTES = "notes.json"  # a target may leave a list of sentences here; they move into the manifest

output_exists = Fault("output-exists", "The place where an artifact should go is taken.", exit="usage")
output_unwritable = Fault("output-unwritable", "This user can't write where an artifact should go.", exit="environment")
disk_full = Fault("disk-full", "The file system has no room, or allows no file that large.", exit="resources")

_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
_DRAFT = re.compile(r"\.(.+)\.effc-(\d+)-(\d+)(\.old)?")  # name, process, its start time


@dataclass(frozen=True)
class Draft:
    """Hidden folder beside the place of an artifact, `into`: written, and reopened and measured, before it is there."""

    folder: Path
    into: Path
    force: bool

    def publish(self, manifest: Manifest) -> Manifest:
        """Move the folder into place; the manifest with its files."""
        manifest = _write_manifest_and_card(self.folder, manifest)
        _make_files_readable(self.folder)
        _move_into_place(self.folder, self.into, self.force)
        return manifest


@contextmanager
def artifact_draft(destination: Path, overwrite: bool = False) -> Iterator[Draft]:
    """Empty draft of the artifact `destination`; nothing of it is left behind where it is not published.

    With `overwrite` an existing artifact is exchanged; a reader sees the old one or the new one.
    """
    destination = Path(os.path.abspath(destination))
    with filesystem_errors_as_diagnostics(destination):
        refuse_output_path(destination, overwrite)
        created = [folder for folder in destination.parents if not folder.exists()]  # the innermost first
        destination.parent.mkdir(parents=True, exist_ok=True)
        recover_or_remove_stale_drafts_in(destination.parent)
        folder = destination.parent / f".{destination.name}{_draft_suffix()}"
        folder.mkdir()
        try:
            yield Draft(folder, destination, overwrite)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            remove_nested_folders_while_empty(created)


def _make_files_readable(folder: Path) -> None:
    """Give files the rights that new ones have here: safetensors lets their owner alone read what it writes."""
    usual = (folder / NAME).stat().st_mode & 0o444
    for file in folder.rglob("*"):
        mode = file.lstat().st_mode
        if S_ISREG(mode) and mode & usual != usual:
            with open(file, "rb") as opened:  # by its descriptor: a sandbox refuses it by path
                os.chmod(opened.fileno() if os.chmod in os.supports_fd else file, mode & 0o777 | usual)


def remove_nested_folders_while_empty(innermost_first: list[Path]) -> None:
    """Take away what was made for an artifact that did not come to be; the first that holds something stays."""
    for folder in innermost_first:
        try:
            folder.rmdir()
        except OSError:
            return


def refuse_output_path(destination: Path, overwrite: bool, is_file: bool = False) -> None:
    """Refuse a place that is taken, or where nothing can be written: before any work. `is_file`: for one, not a
    folder."""
    refuse_unwritable_folder(destination)
    if not os.path.lexists(destination):
        return
    if not overwrite:
        raise _output_exists_diagnostic(destination).rejection()
    if is_file and destination.is_file() and not destination.is_symlink():
        return
    if not (destination / NAME).is_file() and (
        destination.is_symlink() or not destination.is_dir() or any(destination.iterdir())
    ):
        raise output_exists(
            f"{destination} exists and is no artifact, so --force does not replace it",
            help="remove it yourself, or name another folder",
        ).rejection()


def refuse_unwritable_folder(destination: Path) -> None:
    """Refuse a file or folder where nothing can be written, or created: before any work."""
    existing = next(p for p in destination.absolute().parents if os.path.lexists(p))
    reason = "" if existing.is_dir() else "it is a file, not a folder"
    if not reason and not (os.access(existing, os.W_OK | os.X_OK) and _is_writable_folder(existing)):
        reason = "this user can't write there"
    if reason:
        raise output_unwritable(
            f"{_as_spelled_in_destination(existing, destination)}: {reason}",
            help="name an output folder that you can write to",
        ).rejection()


def _is_writable_folder(existing: Path) -> bool:
    """Whether a folder can be created in one; not in those of the kernel, such as /proc, whatever their rights say.

    What a kill leaves of that goes as drafts do."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".trial-", suffix=_draft_suffix(), dir=existing))
    except OSError as error:
        return disk_full_errno(error) is not None
    return True


def _as_spelled_in_destination(folder: Path, destination: Path) -> Path:
    """A folder above an artifact as the artifact's path spells it, where it does."""
    return next((p for p in destination.parents if p.absolute() == folder), folder)


def _output_exists_diagnostic(destination: Path) -> Diagnostic:
    return output_exists(f"{destination} exists", help="name another folder, or pass --force to replace it")


def _write_manifest_and_card(draft: Path, manifest: Manifest) -> Manifest:
    """Hash what was built, then write measures and card, then the manifest."""
    notes = draft / NOTES
    if notes.is_file():
        manifest = replace(manifest, notes=(*manifest.notes, *json.loads(notes.read_bytes())))
        notes.unlink()
    manifest = replace(manifest, files=hash_files(draft))
    (draft / MEASURES).write_bytes(readable_json_bytes(manifest.measures_json()))
    (draft / SBOM).write_bytes(cyclonedx_json(manifest))
    if not (draft / CARD).exists():
        (draft / CARD).write_text(model_card(manifest), encoding="utf-8")
    for file in draft.rglob("*"):
        fsync_path(file)
    write_atomic(
        draft / NAME, readable_json_bytes(manifest.to_json())
    )  # so that even in a draft a manifest tells of the rest
    fsync_path(draft)
    return manifest


def _move_into_place(draft: Path, destination: Path, overwrite: bool) -> None:
    """Rename into place; an old one goes aside first, and comes back if the second rename can't be done."""
    old = draft.with_name(draft.name + ".old")
    if os.path.lexists(destination):
        if not overwrite:  # came to be while we built
            raise _output_exists_diagnostic(destination).rejection()
        _swap_folders(draft, destination, old)
    else:
        os.rename(draft, destination)
    fsync_path(destination.parent)
    shutil.rmtree(old, ignore_errors=True)


def _swap_folders(draft: Path, destination: Path, backup: Path) -> None:
    """Swap in one step where the kernel can (Linux: renameat2), else in two."""
    import ctypes

    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if swap and swap(-100, os.fsencode(draft), -100, os.fsencode(destination), 2) == 0:  # AT_FDCWD, RENAME_EXCHANGE
        os.rename(draft, backup)
        return
    os.rename(destination, backup)
    try:
        os.rename(draft, destination)
    except OSError:
        os.rename(backup, destination)
        raise


def recover_or_remove_stale_drafts_in(parent: Path) -> None:
    """Remove drafts of processes that are gone; bring back what was aside when its writer died."""
    for path in parent.iterdir():
        match = _DRAFT.fullmatch(path.name)
        if not match or _process_start_digits(int(match[2])) == match[3]:
            continue
        if match[4] and not os.path.lexists(parent / match[1]):
            os.rename(path, parent / match[1])
        else:
            shutil.rmtree(path, ignore_errors=True)


def _draft_suffix() -> str:
    """End of the names of drafts that this process writes."""
    return f".effc-{os.getpid()}-{_process_start_digits(os.getpid())}"


def _process_start_digits(pid: int) -> str:
    """Start of a process as the name of a draft has it; "" when it is gone."""
    return re.sub(r"\D", "", process_start_text(pid))


@contextmanager
def filesystem_errors_as_diagnostics(destination: Path) -> Iterator[None]:
    """Turn errors of the file system into diagnostics."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if (code := disk_full_errno(error)) is not None:
            free = shutil.disk_usage(next(p for p in destination.parents if p.exists())).free
            remedy = RAISE_FILE_LIMIT if code == errno.EFBIG else "make room"
            raise disk_full(
                f"{destination} could not be written whole: {os.strerror(code)}, {free} bytes are free there",
                help=f"{remedy}, or name a folder on another disk; nothing was left behind",
            ).rejection() from error
        if isinstance(error, OSError) and error.errno in _CLOSED:
            raise output_unwritable(
                f"{error.filename or destination}: {error.strerror}", help="name an output folder that you can write to"
            ).rejection() from error
        raise
