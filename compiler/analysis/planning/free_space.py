"""Whether disk and memory have room for what a plan says, asked before anything runs."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ....dsl.syntax.diagnostics import Fault, Reject
from ...core.fingerprint import machine_facts
from ...core.quantity import size_text

if TYPE_CHECKING:
    from .plan import Plan

too_large = Fault(
    "too-large",
    "A compile would need more memory or disk than this machine has.\n\n"
    "Said before anything runs. What steps make of weights lies on disk, in the cache and in artifacts; what they hold "
    "besides is in memory. `effc plan` says how much of both.",
    exit="resources",
)
SPARE = 1.25  # of a forecast: an estimate that is a little over is no reason to refuse


def required_bytes_by_folder(plan: "Plan", output_folder: Path, cache_folder: Path) -> dict[Path, int]:
    """Bytes that a compile writes, by the folder that is there and whose disk takes them."""
    by_folder: dict[Path, int] = {}
    missing = [stage for stage in plan.stages if not stage.cached]
    cache_bytes = sum(stage.disk_bytes for stage in missing) + max((stage.spare_bytes for stage in missing), default=0)
    for folder, amount in ((cache_folder, cache_bytes), (output_folder, sum(e.disk_bytes for e in plan.emissions))):
        existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
        by_folder[existing] = by_folder.get(existing, 0) + amount
    return by_folder


def refuse_insufficient_space_or_memory(
    plans: Sequence["Plan"],
    output_folder: Path,
    cache_folder: Path,
    free_bytes_by_folder: Mapping[Path, int] | None = None,
) -> None:
    """Raise Reject (too-large) where a disk has no room for the plans, or memory for the largest step.

    free_bytes_by_folder   bytes by folder, instead of what their disks say
    """
    by_disk: dict[int, tuple[Path, int]] = {}  # by disk
    for plan in plans:
        for folder, amount in required_bytes_by_folder(plan, output_folder, cache_folder).items():
            disk = folder.stat().st_dev
            first, before = by_disk.get(disk, (folder, 0))
            by_disk[disk] = (first, before + amount)
    faults = []
    for folder, amount in by_disk.values():
        left = (
            free_bytes_by_folder[folder]
            if free_bytes_by_folder and folder in free_bytes_by_folder
            else shutil.disk_usage(folder).free
        )
        if amount > SPARE * left:
            faults.append(
                too_large(
                    f"the compile writes about {size_text(amount)}, and {size_text(left)} are free at {folder}",
                    help="`effc cache gc` frees what is no longer used; --cache-dir and -o name folders on other disks",
                )
            )
    has, peak = machine_facts().get("memory_bytes"), max((plan.peak_bytes for plan in plans), default=0)
    if has and peak > SPARE * has:
        faults.append(
            too_large(
                f"the largest step holds about {size_text(peak)} of memory, and this machine has {size_text(has)}",
                help="a checkpoint that is computed in its own type stays on disk; fewer or shorter rows hold less",
            )
        )
    if faults:
        raise Reject(*faults)
