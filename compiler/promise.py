"""A pass's promise that outputs are kept, checked by running the model before and after."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..dsl.diagnostics import Fault, Reject
from .kinds import Close

if TYPE_CHECKING:
    from .program import Program

promise_broken = Fault("promise-broken", "A pass that promises to keep outputs changed them.", exit="failure")


@dataclass(frozen=True)
class Promise:
    """The outputs of the capture's batch, left-padded, before a pass ran."""

    outputs: torch.Tensor

    @staticmethod
    def of(program: "Program") -> "Promise":
        return Promise(outputs(program))

    def check(self, program: "Program", keeps: Close) -> None:
        """Raise Reject (promise-broken) where outputs differ by more than was promised, or are no numbers."""
        worst, most = (outputs(program) - self.outputs).abs().max().item(), self._allowed(program, keeps)
        if not worst <= most:
            raise Reject(promise_broken(f"outputs changed by {worst:.3g}, the pass promises at most {most:.3g}",
                                        help="this is a defect of the pass: leave the step out, and report it"))

    def _allowed(self, program: "Program", keeps: Close) -> float:
        """`atol` is told for float32; a narrower type rounds sums that are added in another order more coarsely."""
        step = torch.finfo(program.model.dtype).eps * self.outputs.abs().max().item()
        return max(keeps.atol, 8 * step) if keeps.atol else 0.0


@torch.no_grad()
def outputs(program: "Program") -> torch.Tensor:
    """Logits, or the last hidden state, of the inputs that the program was captured with, float32."""
    result = program.model.eval()(**program.inputs)
    return (result.logits if "logits" in result else result[0]).float()
