"""What the native engine runs: packed weights and a plan of the decode step, for CPUs."""

from pathlib import Path
from typing import Literal

from ..context import Context
from ..kinds import Form, Target, param
from ..program import Program

FOLDER = "native"

# Of the largest logit. Weights and what linear layers read are rounded to bfloat16 (2**-9) or int8 (2**-8),
# over all layers; a wrong step is off by about the whole.
SHARES = {"bf16": 2**-4, "int8": 2**-3}
_REASON = "packed weights and cached keys and values are rounded, activations are not"


class Native(Target):
    """What the native engine runs: packed weights and a plan of the decode step, for CPUs.

    `effc.load` gives a model that computes logits and generates, `effc run` talks to it; a token is one call
    into compiled code, which runs without torch and without Python. The plan is read from the model's graph,
    whatever its architecture, pruned shapes and state-space mixers too; what the engine has no step for (experts)
    is refused with the module and the line. Linear layers that `lower` packed stay as they are, the others are
    packed here. Keys and values are cached as bfloat16, states of scans as float32.

    Source: own.
    Example: native("cpu")
    """

    weights: Literal["bf16", "int8"] = param(
        "Numbers of linear layers that are not lowered: bfloat16, or int8 with a scale for each output.",
        default="bf16")

    def emit(self, program: Program, into: Path, ctx: Context) -> None:
        from ..native.emission import emit

        folder = into / FOLDER
        folder.mkdir()
        emit(program, folder, ctx, self.weights)

    def forms(self) -> tuple[Form, ...]:
        return (Form(FOLDER, "native", share=SHARES[self.weights], reason=_REASON),)
