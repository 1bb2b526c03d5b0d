"""A pass's promise that outputs are kept, checked by running the model before and after."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...dsl.syntax.diagnostics import Fault
from ..ir.capture.sample import can_make_sample_inputs
from ..models.rows.forward import in_eval_mode, main_tensor_of_output
from ..plugin.interfaces import Close
from .equivalence import max_difference, record_logits_of_sample_calls

if TYPE_CHECKING:
    from ..ir.program import Program

promise_broken = Fault("promise-broken", "A pass that promises to keep outputs changed them.", exit="failure")


@dataclass(frozen=True)
class OutputPromise:
    """Outputs of a model before a pass ran: some tokens each, on several shapes, padded and while decoding."""

    outputs: list[torch.Tensor]

    @staticmethod
    def of(program: "Program") -> "OutputPromise":
        return OutputPromise(observed(program))

    def check(self, program: "Program", logit_tolerance: Close) -> None:
        """Raise Reject (promise-broken) where outputs differ by more than was promised, or are no numbers."""
        worst = max_difference(self.outputs, observed(program))
        tolerance = self._scaled_tolerance(program, logit_tolerance)
        if not worst <= tolerance:
            raise promise_broken(
                f"outputs changed by {worst:.3g}, the pass promises at most {tolerance:.3g}",
                help="this is a defect of the pass: leave the step out, and report it",
            ).rejection()

    def _scaled_tolerance(self, program: "Program", tolerance: Close) -> float:
        """`atol` is told for float32; a narrower type rounds sums that are added in another order more coarsely."""
        largest = max(float(t.abs().max()) for t in self.outputs)
        step = torch.finfo(next(program.model.parameters()).dtype).eps * largest
        return max(tolerance.atol, 8 * step) if tolerance.atol else 0.0


def observed(program: "Program") -> list[torch.Tensor]:
    """Outputs in all situations that `equivalence` looks at; of modules of other kinds, on the capture's batch."""
    if can_make_sample_inputs(program.model):
        return record_logits_of_sample_calls(program.model)
    return [outputs(program)]


def outputs(program: "Program") -> torch.Tensor:
    """Logits, or the last hidden state, of the inputs that the program was captured with, float32."""
    with torch.no_grad(), in_eval_mode(program.model):
        return main_tensor_of_output(program.model(**program.inputs)).float()
