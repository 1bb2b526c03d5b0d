"""How far rounding moves models that it moves far, how far the engine is from them, and which faults are told from that.

    python -m tests.bench.moves [NAME ...]

For each: root mean squares of logits, of eight draws and of the engine, as shares of the original's; then how many of its
linear weights are found out when one at a time is a tenth larger. Weights are drawn with the seed of the matrix.
"""

import copy
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from effc.compiler.artifacts.verify_child import probe
from effc.compiler.machine.fingerprint import machine
from effc.compiler.measuring.rounding import draws, exact_twin
from torch import nn

from tests.architectures.matrix import inputs
from tests.native.test_moves import FAR, checks, native, original

NAME = "logits of a batch"


def spread(x: torch.Tensor) -> float:
    return float((x - x.mean(-1, keepdim=True)).square().mean().sqrt())


def said(given: dict[str, torch.Tensor], model: nn.Module) -> torch.Tensor:
    return probe(model, given, 0)[NAME]


def found(model: nn.Module, name: str) -> tuple[int, int, list[str]]:
    """How many weights are found out of how many, and those that are not."""
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    missed = []
    for path in paths:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_submodule(path).weight.mul_(1.1)
        with tempfile.TemporaryDirectory() as folder:
            _, moved = checks(model, other, Path(folder), name)
        missed += [path] if all(check.holds for check in moved) else []
    return len(paths) - len(missed), len(paths), missed


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    print(machine())
    for name, half in FAR:
        if names and name not in names:
            continue
        model = original(name, half)
        twin, given = exact_twin(model), inputs(model)
        exact = said(given, twin)
        seen = draws(twin, partial(said, given), seed=0)
        moved = [spread(x - exact) / spread(exact) for x in seen]
        with tempfile.TemporaryDirectory() as folder:
            engine = native(model, Path(folder), name)[0][NAME]
        off = spread(engine - exact) / spread(exact)
        print(f"{name}, {half}: draws {min(moved):.4f} .. {max(moved):.4f}, engine {off:.4f}", flush=True)
        right, of, missed = found(model, name)
        print(f"  {right} of {of} weights a tenth larger are found; not {', '.join(missed) or 'any'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
