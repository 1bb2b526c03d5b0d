"""Adapters that were trained and not merged: a step's result beside the model, which is as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ir.outcome import Outcome
from ..ir.program import Program
from ..report.quantity import count, counted
from .adapters import Shape, adapted


@dataclass
class Unmerged(Outcome):
    """Low-rank adapters and the program that they were trained on.

    base      key of the program's own result; "" of the recipe's model
    shape     their rank, scale and dropout
    tensors   "PATH.lora_A" [rank, in] and "PATH.lora_B" [out, rank] for the path of each adapted module
    """

    kind: ClassVar[str] = "adapters"
    program: Program
    base: str
    shape: Shape
    tensors: Mapping[str, Tensor]

    @property
    def summary(self) -> str:
        trained = sum(tensor.numel() for tensor in self.tensors.values())
        return f"{counted(len(self.paths), 'adapter')} of rank {self.shape.rank}, {count(trained)} parameters"

    @property
    def paths(self) -> tuple[str, ...]:
        """Modules that have an adapter."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.tensors))

    def members(self) -> Iterator[tuple[str, Program]]:
        """The program with its adapters on, for as long as it is its turn."""
        with self.applied():
            yield "", self.program

    @contextmanager
    def applied(self) -> Iterator[None]:
        with adapted(self.program.model, self.paths, self.shape, seed=0) as adapters, torch.no_grad():
            for name, parameter in adapters.parameters().items():
                parameter.copy_(self.tensors[name])
            yield
