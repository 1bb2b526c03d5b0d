"""The machine on which something was measured. Torch is asked only if it runs already."""

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_LIBRARIES = ("torch", "transformers")


def machine_facts() -> dict[str, Any]:
    """Plain JSON, the same on every call within a process.

    cpu, isa (level of our kernels), cores (physical), cpus (that this process may use), threads (of torch),
    memory_bytes, os, python, torch, transformers; a fact that the system doesn't tell is left out
    """
    from .environment import cpu_model_name, python_version

    facts = {
        "cpu": cpu_model_name(),
        "isa": _cpu_instruction_level(),
        "cores": _read_physical_core_count(),
        "cpus": usable_cpu_count(),
        "threads": _torch_thread_count(),
        "memory_bytes": total_memory_bytes(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": python_version(),
        **library_versions(),
    }
    return {name: value for name, value in facts.items() if value is not None}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide results, and of effc."""
    result = {}
    for name in (*_LIBRARIES, "effc"):
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return result


def _cpu_instruction_level() -> str:
    from ...kernels.levels import active_level

    return active_level()


def usable_cpu_count() -> int:
    """Number of processors that this process may use."""
    from ...kernels.cores import usable_cores

    return usable_cores()


def _read_physical_core_count() -> int | None:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return None
    blocks = [
        dict(_parse_key_and_value(line) for line in block.splitlines() if ":" in line)
        for block in info.read_text(errors="replace").split("\n\n")
        if block.strip()
    ]
    return len({(b.get("physical id", "0"), b.get("core id", b.get("processor"))) for b in blocks}) or None


def _parse_key_and_value(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()


def _torch_thread_count() -> int | None:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else None


def total_memory_bytes() -> int | None:
    """Bytes that this machine has, where it says so."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
