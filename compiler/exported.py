"""Programs of torch alone as models: what the target `pt2` wrote, opened again."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

FOLDER, FILE, NAMES = "program", "model.pt2", "inputs.json"


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


def write(program: Any, names: tuple[str, ...], folder: Path) -> None:
    torch.export.save(program, folder / FILE, extra_files={NAMES: json.dumps(names)})


def read(folder: Path) -> Exported:
    extra = {NAMES: ""}
    program = torch.export.load(folder / FILE, extra_files=extra)
    return Exported(program.module(), tuple(json.loads(extra[NAMES])))
