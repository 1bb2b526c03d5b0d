"""Number of processors that this process can use."""

import math
import os
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Number of cores in its affinity, at most its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cgroup_cpu_limit())))


def cgroup_cpu_limit(cgroup_root: Path = GROUPS) -> float:
    """Processors' worth of time that the control groups of a container allow, infinite where nothing bounds it.

    Of both versions of the interface: docs.kernel.org/admin-guide/cgroup-v2.html, /scheduler/sched-bwc.html.
    """
    for paths in (
        (cgroup_root / "cpu.max",),
        (cgroup_root / "cpu/cpu.cfs_quota_us", cgroup_root / "cpu/cpu.cfs_period_us"),
    ):
        try:
            allowed, period = " ".join(file.read_text() for file in paths).split()
            if int(allowed) > 0 and int(period) > 0:  # the first version says -1 where there is no bound
                return int(allowed) / int(period)
        except (OSError, ValueError):  # absent, or "max"
            continue
    return math.inf
