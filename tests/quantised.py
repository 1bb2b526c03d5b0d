"""Models whose linear modules are on grids, with the note that a quantiser leaves."""

import torch
from effc.compiler.ir.capture.capture import capture


def quantised(model, grids):
    """The program with modules on grids and the note that a quantiser leaves; `grids`: end of a path -> Grid."""
    program = capture(model)
    for suffix, grid in grids.items():
        linear = [path for path, m in model.named_modules() if path.endswith(suffix) and isinstance(m, torch.nn.Linear)]
        for path in linear:
            weight = model.get_submodule(path).weight
            with torch.no_grad():
                weight.copy_(grid.fit_scales(weight.float()).round(weight.float()))
        program.note(bits=grid.bits, group=grid.group, symmetric=grid.symmetric, quantized=dict.fromkeys(linear, 0.0))
    return program
