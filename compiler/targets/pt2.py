"""A program of torch alone, which reads neither effc nor transformers."""

import json
from pathlib import Path
from typing import Any

from ...dsl.diagnostics import Fault, Reject
from ..artifacts.artifact import NOTES
from ..ir.program import Program
from ..report.broken import first_line
from ..words.context import Context
from ..words.kinds import Form, Target, Wish

cannot_export = Fault(
    "cannot-export",
    "torch.export can't make a program of a model.\n\n"
    "It follows all that a forward does, as capture does, but under restrictions of its own.",
    exit="environment",
)

FOLDER = "program"


class Pt2(Target):
    """A program of torch alone, which reads neither effc nor transformers.

    `torch.export.load("program/model.pt2").module()` gives a callable that takes what the forward takes, in batches
    of any size by name, and returns its result, of models of transformers the logits of prompts of any length;
    without a cache. `effc.load` fills in a mask and positions where they are not given. The one form for plain
    PyTorch modules, which have no config to be rebuilt from. Of a model with packed weights the program calls effc's
    kernels: `import effc.kernels.ops` before it is loaded.

    Source: torch.export.
    Example: pt2("exported")
    """

    cannot_hold = {
        "": {
            "interventions": "a program is the same for every row, and what is edited follows from "
            "where the row's prompt lies"
        }
    }

    loads = {"program": '`program/model.pt2` is a program of torch alone: `torch.export.load`, or `effc.load(".")`.'}
    marks = {"program": "model.pt2"}

    def emit(self, program: Program, into: Path, ctx: Context) -> None:
        import torch

        from ..artifacts.exported import write
        from ..layers.linear import params
        from ..measuring.results import first_result_of, refuse_two_sides, tensors_of
        from ..rows.forward import without_dropout

        folder = into / FOLDER
        folder.mkdir()
        refuse_two_sides(program.model, cannot_export)
        inputs = tensors_of(program)
        with without_dropout(program.model), torch.no_grad():
            try:
                exported = torch.export.export(
                    first_result_of(program.model),
                    (),
                    inputs,
                    dynamic_shapes={name: _free(x, 2 if "input_ids" in inputs else 1) for name, x in inputs.items()},
                )
            except Exception as error:  # whatever torch meets in a forward
                raise Reject(
                    cannot_export(
                        f"torch.export makes no program of {type(program.model).__name__}: {first_line(error)}",
                        help="--debug shows where; `hf` writes transformers models in another way",
                    )
                ) from error
        if "input_ids" in inputs and not _takes_longer(exported, inputs):
            raise Reject(
                cannot_export(
                    f"torch.export makes a program of {type(program.model).__name__} for short prompts only: how "
                    "often something is repeated follows from their number",
                    help="`native` and `hf` take any length",
                )
            )
        ops = write(exported, tuple(inputs), folder, params(program.model))
        if ops:
            note = f"The program calls {', '.join(ops)}: `import effc.kernels.ops` before torch.export.load."
            (into / NOTES).write_text(json.dumps([note]), encoding="utf-8")

    def foresee(self, ctx: Context) -> None:
        from ..checkpoints.blank import nothing_stored
        from ..measuring.results import refuse_two_sides

        with nothing_stored():
            refuse_two_sides(ctx.origin.build(), cannot_export)

    def forms(self) -> tuple[Form, ...]:
        return (Form(FOLDER, "torch", generates=False),)

    @classmethod
    def open(cls, folder: Path, wish: Wish) -> tuple[Any, None]:
        from ..artifacts.exported import read

        model = read(folder)
        return (model if wish.dtype is None else model.to(wish.dtype)), None


def _free(x: Any, axes: int) -> Any:
    """The first axes are of any size."""
    from torch.export import Dim

    return dict.fromkeys(range(axes), Dim.AUTO) if x.dim() else None


def _takes_longer(exported: Any, inputs: dict[str, Any]) -> bool:
    """Whether a program runs with several times as many tokens as it was traced with."""
    import torch

    longer = {name: torch.cat([x] * 5, 1) for name, x in inputs.items()}
    try:
        with torch.no_grad():
            exported.module()(**longer)
    except (AssertionError, RuntimeError):  # its guards, or an operation on a shape that was fixed
        return False
    return True
