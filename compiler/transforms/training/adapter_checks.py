"""Whether adapters that a cache holds fit their program: who can write to a cache can make seals."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ...ir.program import Program
from .adapters import AdapterShape

LORA_WEIGHTS = ("lora_A", "lora_B")
_MAX_SIZE = 1 << 14  # of a rank


def assert_adapters_fit_program(program: Program, shape: AdapterShape, tensors: Mapping[str, Tensor]) -> None:
    """Raises AssertionError unless every adapter has two sides that fit a module."""
    assert type(shape.rank) is int and 1 <= shape.rank <= _MAX_SIZE, f"a rank of {shape.rank}"
    assert _is_number(shape.alpha) and _is_number(shape.dropout), "the scale of adapters is no number"
    assert 0 <= shape.dropout < 1, f"a dropout of {shape.dropout}"
    modules = dict(program.model.named_modules())
    for path in {name.rpartition(".")[0] for name in tensors}:
        assert path in modules, f"there is no module {path}"
        weight, a, b = (getattr(modules[path], "weight", None), *(tensors[f"{path}.{s}"] for s in LORA_WEIGHTS))
        assert isinstance(weight, Tensor) and a.dim() == b.dim() == weight.dim() >= 2, f"{path} takes no adapter"
        size = weight.shape[::-1] if isinstance(modules[path], Conv1D) else weight.shape
        assert a.shape[1:] == size[1:] and b.shape[0] == size[0], f"the adapter of {path} is of another size"
        assert 1 <= a.shape[0] == b.shape[1] <= shape.rank, f"the adapter of {path} is of another rank"
    assert all(name.rpartition(".")[2] in LORA_WEIGHTS for name in tensors), "a tensor of no adapter"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
