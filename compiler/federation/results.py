"""What a federation leaves: folders of states, those of adapters as peft reads them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .course import Course
from .declaration import Declaration
from .low_rank import modules, rank_of
from .state import State

MARK = "federation-result.json"


def write_results(states: Mapping[str, State], course: Course, declared: Declaration, into: Path) -> None:
    """A folder for every state ("global", or one of each client), and how the rounds went."""
    from ..store.cache import write_whole

    for name, state in states.items():
        folder = into / name
        folder.mkdir(parents=True, exist_ok=True)
        if declared.trains == "lora":
            _write_adapter(state, declared, folder)
        else:
            _write_tensors(state, folder / "state.safetensors")
    body = {"identity": declared.identity, "base": declared.base, "rounds": [r.to_json() for r in course.rounds]}
    write_whole(into / MARK, (json.dumps(body, indent=2) + "\n").encode())


def _write_adapter(state: State, declared: Declaration, folder: Path) -> None:
    prefix = "base_model.model"
    named = {f"{prefix}.{path}.lora_{side}.weight": state[f"{path}.{side}"] for path in modules(state) for side in "AB"}
    _write_tensors(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(_config(state, declared), indent=2) + "\n")


def _config(state: State, declared: Declaration) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank_of(state),
        "lora_alpha": declared.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules(state),
        "inference_mode": True,
    }


def _write_tensors(state: State, file: Path) -> None:
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, file)
