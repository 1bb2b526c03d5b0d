"""A folder with a plan, opened: the engine at work in it, ready to compute."""

import json
from pathlib import Path
from typing import Any

from ...dsl.diagnostics import Reject
from ...kernels.native import KernelError
from .model import NativeModel
from .stored import native_damaged, read, tensors

SEQUENCES = 16           # open at once, unless asked for otherwise; each reserves room, none takes it before it grows


def open_native(folder: Path, *, threads: int | None = None, sequences: int = SEQUENCES, mapped: bool = False,
                deep: bool = False) -> NativeModel:
    """The model of a folder that the target `native` wrote.

    threads     that compute; as many as torch has by default
    sequences   that can be open at once
    mapped      leave weights on disk, mapped: opens at once and shares memory, computes more slowly
    deep        look at every packed weight, as `effc test` does, not only at sizes and headers
    """
    import torch

    from ...kernels.engine import Engine

    stored = read(folder)
    weights = tensors(folder, stored, mapped=mapped)
    try:
        engine = Engine(stored.plan, weights, threads=threads or torch.get_num_threads(), sequences=sequences,
                        copy=False, deep=deep)
    except KernelError as error:
        raise Reject(native_damaged(f"{folder}: {error}", help="copy the artifact again, or compile again")) from error
    model = NativeModel(engine, stored.plan, weights, stored.facts, sequences, _generation(folder))
    model.name_or_path = model.config._name_or_path = str(folder)
    return model.eval()


def _generation(folder: Path) -> dict[str, Any]:
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise Reject(native_damaged(f"{file} is not JSON", help="copy the artifact again")) from error
    return found if isinstance(found, dict) else {}
