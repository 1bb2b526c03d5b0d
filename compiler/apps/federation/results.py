"""Results of a federation: folders of states, those of adapters as peft reads them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...core.cache import write_atomic
from ...core.safe_read import CONFIG, read_regular_file, refuse_unsafe_write_folder
from .declaration import Declaration
from .history import History
from .low_rank import lora_module_paths, lora_rank
from .state import State

MARK = "federation-result.json"
STATE = "state.safetensors"
PREFIX = "base_model.model"  # of names in peft's files


def write_results(
    states: Mapping[str, State],
    history: History,
    declaration: Declaration,
    destination: Path,
    model_folder: Path | None = None,
) -> None:
    """A folder for every state ("global", or one of each client), and how the rounds went.

    model_folder    the artifact, whose `edits/` say how interventions are put in

    Raises Reject (odd-file) where links lie in the folder already.
    """
    refuse_unsafe_write_folder(destination)
    for name, state in states.items():
        folder = destination / name
        if declaration.trains == "lora":
            _write_peft_adapter(state, declaration, folder)
        elif declaration.trains == "reft" and model_folder is not None:
            _write_interventions(state, model_folder, folder)
        else:
            _write_tensors(state, folder / STATE)
    body = {"identity": declaration.identity, "base": declaration.base, "rounds": [r.to_json() for r in history.rounds]}
    write_atomic(destination / MARK, (json.dumps(body, indent=2) + "\n").encode())


def _write_peft_adapter(state: State, declaration: Declaration, folder: Path) -> None:
    factors = lora_module_paths(state)
    inside = {f"{path}.{side}" for path in factors for side in "AB"}
    named = {f"{PREFIX}.{name}": array for name, array in state.items() if name not in inside}
    named |= {f"{PREFIX}.{path}.lora_{side}.weight": state[f"{path}.{side}"] for path in factors for side in "AB"}
    _write_tensors(named, folder / "adapter_model.safetensors")
    write_atomic(
        folder / "adapter_config.json", (json.dumps(_peft_config(state, declaration), indent=2) + "\n").encode()
    )


def _write_interventions(state: State, model_folder: Path, folder: Path) -> None:
    """Write the interventions of a state as the target `reft` does, so that they go onto the base; a head's arrays
    beside them."""
    inner = {"R": "project", "V": "project", "W": "aim", "b": "bias"}
    edits: dict[str, np.ndarray] = {}
    head_arrays: dict[str, np.ndarray] = {}
    for name, array in state.items():
        path, _, last = name.rpartition(".")
        is_edit = ".reft.functions." in name and last in inner
        (edits if is_edit else head_arrays)[f"{path}.{inner[last]}" if is_edit else name] = array
    _write_tensors(edits, folder / "reft" / "model.safetensors")
    write_atomic(
        folder / "reft" / "reft.json", read_regular_file(model_folder / "edits" / "reft.json", CONFIG, model_folder)
    )
    if head_arrays:
        _write_tensors(head_arrays, folder / "head.safetensors")


def _peft_config(state: State, declaration: Declaration) -> dict[str, Any]:
    saved_modules = sorted({name.partition(".")[0] for name in state if not name.endswith((".A", ".B"))})
    return {
        "peft_type": "LORA",
        "task_type": None if saved_modules else "CAUSAL_LM",
        "modules_to_save": saved_modules or None,
        "base_model_name_or_path": None,
        "r": lora_rank(state),
        "lora_alpha": declaration.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": lora_module_paths(state),
        "inference_mode": True,
    }


def _write_tensors(state: State, file: Path) -> None:
    from safetensors.numpy import save

    write_atomic(file, save({name: np.ascontiguousarray(array) for name, array in state.items()}))
