"""Device and threads that passes, scores and measures run on, with the same bits every time, and its memory."""

import os
import warnings
from dataclasses import replace

from ...dsl.syntax.diagnostics import Diagnostic, Fault
from .memory import reuse_budget_bytes
from .options import OptionError, checked_device_name
from .quantity import size_text
from .settings import Settings

unknown_device = Fault("unknown-device", "`--device` names no kind of device that torch knows.", exit="usage")
device_missing = Fault(
    "device-missing",
    "The device given with `--device` is not there, or this torch was built without it.\n\n"
    "Leave `--device` out to use the CPU; `--device auto` takes an accelerator where there is one.",
    exit="environment",
)
device_full = Fault(
    "device-full",
    "A device has no room for a model, or for one row that it is given.\n\n"
    "A model lies on the device as a whole. `--device cpu`, the default, reads weights from disk as they are needed.",
    exit="resources",
)


def refuse_unusable_device(device: str) -> None:
    """Reject a device that torch does not know or can't use here.

    Passes, scores and measures run there; artifacts are written and verified on the CPU.
    """
    if device == "cpu":
        return
    import torch

    try:
        device = checked_device_name(device)
    except OptionError as error:
        raise unknown_device(f"torch knows no device `{device}`", help=error.remedy).rejection() from error
    try:  # torch says it by class as it likes: built without it, no code or module for it
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        first = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise device_missing(
            f"there is no device `{device}` here: {first}", help="leave the device out to use the CPU"
        ).rejection() from error


def set_torch_threads_and_fill_settings(settings: Settings) -> Settings:
    """Settings with a number of threads, which torch is set to: it is decided once and is part of every key, as results
    depend on how many threads add up."""
    import torch

    from ...kernels.cores import usable_cores

    count = 1 if settings.workers else min(torch.get_num_threads(), usable_cores())  # each worker has one
    settings = replace(settings, threads=settings.threads or count)
    torch.set_num_threads(settings.threads or count)
    _use_deterministic_algorithms(settings.device)
    return settings


def _use_deterministic_algorithms(device: str) -> None:
    """Make torch use deterministic algorithms on a device where it has them."""
    if device == "cpu":
        return
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.filterwarnings("ignore", message=".* does not have a deterministic implementation")  # nothing to be done
    torch.backends.cudnn.benchmark = False


def free_device_bytes(device: str) -> int | None:
    """Bytes of a device that nobody holds, where it says."""
    import torch

    mem_get_info = getattr(torch.get_device_module(device), "mem_get_info", None)
    return int(mem_get_info(torch.device(device))[0]) if mem_get_info else None


def memory_budget_bytes_on(device: str, max_memory_bytes: int | None) -> int:
    """Bytes as `bytes_for`, on a device: at most half of its free memory, and at most what the CPU would get."""
    free = None if device == "cpu" else free_device_bytes(device)
    limit = reuse_budget_bytes(max_memory_bytes)
    return limit if free is None else min(limit, free // 2)


def empty_device_cache(device: str) -> None:
    """Give back what torch keeps of a device's memory for later."""
    import torch

    empty = getattr(torch.get_device_module(device), "empty_cache", None)
    if empty is not None:
        empty()


def out_of_device_memory_diagnostic(device: str, label: str) -> Diagnostic:
    """Diagnostic for a device that is out of memory."""
    left = free_device_bytes(device)
    had = "" if left is None else f": {size_text(left)} are left"
    return device_full(
        f"{label} takes more memory than {device} has{had}",
        help="compile with --device cpu, which reads weights from disk as they are needed, or give shorter rows",
    )
