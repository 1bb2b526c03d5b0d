"""Distance of two models, on the shapes where a wrong one shows."""

from effc.compiler.evaluation.equivalence import max_difference, record_logits_of_sample_calls
from effc.compiler.models.rows.inputs import vocabulary_size
from torch import nn


def max_logit_difference(
    reference: nn.Module, candidate: nn.Module, *, vocab: int | None = None, seed: int = 0
) -> float:
    """The worst absolute difference of logits between two models; inf if any isn't finite.

    vocab   ids are drawn below it; by default the reference's vocabulary
    seed    chooses the ids
    """
    vocab = vocab or vocabulary_size(reference)
    return max_difference(
        record_logits_of_sample_calls(reference, vocab_size=vocab, seed=seed),
        record_logits_of_sample_calls(candidate, vocab_size=vocab, seed=seed),
    )
