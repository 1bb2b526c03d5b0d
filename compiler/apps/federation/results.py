"""Results of a federation: folders of states, those of adapters as peft reads them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...core.cache import write_atomic
from ...core.safe_read import CONFIG, read_regular, refuse_links
from .declaration import Declaration
from .history import History
from .low_rank import modules, rank_of
from .state import State

MARK = "federation-result.json"
STATE = "state.safetensors"
PREFIX = "base_model.model"  # of names in peft's files


def write_results(
    states: Mapping[str, State],
    course: History,
    declaration: Declaration,
    destination: Path,
    source: Path | None = None,
) -> None:
    """A folder for every state ("global", or one of each client), and how the rounds went.

    source    the artifact, whose `edits/` say how interventions are put in

    Raises Reject (odd-file) where links lie in the folder already.
    """
    refuse_links(destination)
    for name, state in states.items():
        folder = destination / name
        if declaration.trains == "lora":
            _write_adapter(state, declaration, folder)
        elif declaration.trains == "reft" and source is not None:
            _write_interventions(state, source, folder)
        else:
            _write_tensors(state, folder / STATE)
    body = {"identity": declaration.identity, "base": declaration.base, "rounds": [r.to_json() for r in course.rounds]}
    write_atomic(destination / MARK, (json.dumps(body, indent=2) + "\n").encode())


def _write_adapter(state: State, declaration: Declaration, folder: Path) -> None:
    factors = modules(state)
    inside = {f"{path}.{side}" for path in factors for side in "AB"}
    named = {f"{PREFIX}.{name}": array for name, array in state.items() if name not in inside}
    named |= {f"{PREFIX}.{path}.lora_{side}.weight": state[f"{path}.{side}"] for path in factors for side in "AB"}
    _write_tensors(named, folder / "adapter_model.safetensors")
    write_atomic(
        folder / "adapter_config.json", (json.dumps(_peft_config(state, declaration), indent=2) + "\n").encode()
    )


def _write_interventions(state: State, source: Path, folder: Path) -> None:
    """As the target `reft` writes them, so that they go onto the base; a head's arrays beside them."""
    inner = {"R": "project", "V": "project", "W": "aim", "b": "bias"}
    edits: dict[str, np.ndarray] = {}
    head_arrays: dict[str, np.ndarray] = {}
    for name, array in state.items():
        path, _, last = name.rpartition(".")
        is_edit = ".reft.functions." in name and last in inner
        (edits if is_edit else head_arrays)[f"{path}.{inner[last]}" if is_edit else name] = array
    _write_tensors(edits, folder / "reft" / "model.safetensors")
    write_atomic(folder / "reft" / "reft.json", read_regular(source / "edits" / "reft.json", CONFIG, source))
    if head_arrays:
        _write_tensors(head_arrays, folder / "head.safetensors")


def _peft_config(state: State, declaration: Declaration) -> dict[str, Any]:
    saved_modules = sorted({name.partition(".")[0] for name in state if not name.endswith((".A", ".B"))})
    return {
        "peft_type": "LORA",
        "task_type": None if saved_modules else "CAUSAL_LM",
        "modules_to_save": saved_modules or None,
        "base_model_name_or_path": None,
        "r": rank_of(state),
        "lora_alpha": declaration.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules(state),
        "inference_mode": True,
    }


def _write_tensors(state: State, file: Path) -> None:
    from safetensors.numpy import save

    write_atomic(file, save({name: np.ascontiguousarray(array) for name, array in state.items()}))
