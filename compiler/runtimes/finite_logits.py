"""Logits of which the largest is a number: by others no token can be chosen."""

from torch import Tensor
from transformers import LogitsProcessor

from ...dsl.syntax.diagnostics import Fault

REASON = "the model's logits are NaN or infinite behind this text, so that no token can be chosen"

logits_not_finite = Fault(
    "logits-not-finite",
    "A model was asked to generate, and computed logits that are NaN or infinite.\n\n"
    "Its weights hold such values, or a product overflowed. `effc verify` names the weights of an artifact that do. "
    "Logits of minus infinity for some tokens forbid those, and are none of this.",
    exit="environment",
)


class FiniteLogits(LogitsProcessor):
    """Leaves logits [b, vocabulary] as they are; Reject (logits-not-finite) where a row's largest is no number.

    NaN is the largest of a row that has one, so that nothing else is looked at.
    label   of the model, in the sentence
    """

    def __init__(self, label: str):
        self._label = label

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not scores.amax(-1).isfinite().all():
            raise logits_not_finite(
                f"{self._label}: {REASON}",
                help="`effc verify` names weights of an artifact that are no numbers; compile it or fetch it again",
            ).rejection()
        return scores
