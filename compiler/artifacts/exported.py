"""Programs of torch alone as models: what the target `pt2` wrote, opened again."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

FOLDER, FILE, NAMES = "program", "model.pt2", "inputs.json"
KERNELS = "kernels.json"         # beside the program: which of effc's ops it calls, where it calls any


class Exported(nn.Module):
    """Takes its inputs by name or in order, as the module that it was made of. It knows no training."""

    def __init__(self, program: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.program, self.names = program, names
        self.training = False

    def forward(self, *args: Any, **given: Any) -> Any:
        return self.program(**dict(zip(self.names, args, strict=False)), **given)

    def train(self, mode: bool = True) -> "Exported":
        assert not mode, "an exported program has no training mode"
        return self


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
