"""Programs of torch alone as models: what the target `pt2` wrote, opened again."""

import json
from pathlib import Path
from typing import Any

import torch

from .verify_child import Exported

FOLDER, FILE, NAMES = "program", "model.pt2", "inputs.json"
KERNELS = "kernels.json"         # beside the program: which of effc's ops it calls, where it calls any


def write(program: Any, names: tuple[str, ...], folder: Path) -> list[str]:
    """The names of effc's ops that it calls."""
    torch.export.save(program, folder / FILE, extra_files={NAMES: json.dumps(names)})
    called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    ops = sorted({name for name in called if name.startswith("effc.")})
    if ops:
        (folder / KERNELS).write_text(json.dumps(ops) + "\n", encoding="utf-8")
    return ops


def read(folder: Path) -> Exported:
    from ...kernels import ops as _registered  # noqa: F401 (torch knows effc's ops from here on)

    extra = {NAMES: ""}
    program = torch.export.load(folder / FILE, extra_files=extra)
    return Exported(program.module(), tuple(json.loads(extra[NAMES])))
