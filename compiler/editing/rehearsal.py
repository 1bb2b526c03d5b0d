"""An edit tried on a copy without weights, so that what the model can't do without is refused while it is whole.

Whether a model runs without a layer can't be read from its config: some work out by their own rules which layer
is of which kind.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from ...dsl.diagnostics import Fault, Reject
from ..capture.calls import record
from ..ir.program import Program

layer_needed = Fault(
    "layer-needed",
    "A layer, or a branch of one, can't be removed, because the model does not run without it.\n\n"
    "Some models work out from a layer's number what kind it is, or share one layer's work with others: their "
    "config has no words for a model without it. Remove another layer, or single branches of this one.")


def rehearse(program: Program, what: str, edit: Callable[[Program], None]) -> None:
    """Raise Reject (layer-needed) if the model does not run after the edit, which removes `what`.

    A model that doesn't run without weights at all tells nothing: then the edit itself will show.
    """
    trial = weightless(program)
    edit(trial)
    try:
        record(trial.model, trial.inputs)
    except Reject as refused:
        if _runs(weightless(program)):
            name = type(program.model).__name__
            raise Reject(layer_needed(f"{what} can't be removed: {name} does not run without it",
                                      help="remove another layer, or branches of this one",
                                      note=refused.diagnostics[0].message)) from refused


def _runs(program: Program) -> bool:
    try:
        record(program.model, program.inputs)
    except Reject:
        return False
    return True


def weightless(program: Program) -> Program:
    """A copy of a program, of its model all but the numbers: parameters and buffers are on the meta device."""
    model = program.model
    bare: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        bare[id(tensor)] = (nn.Parameter(empty, requires_grad=tensor.requires_grad)
                            if isinstance(tensor, nn.Parameter) else empty)
    units = {path: replace(unit) for path, unit in program.units.items()}
    inputs = {name: value.to("meta") if isinstance(value, torch.Tensor) else value
              for name, value in program.inputs.items()}
    return Program(copy.deepcopy(model, bare), inputs, units, dict(program.opaque),
                   edits=copy.deepcopy(program.edits))
