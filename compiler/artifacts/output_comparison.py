"""Comparison of what a fresh process computed with what this one did: logits, and tokens of greedy generations."""

import math
from collections.abc import Mapping

import torch

from ..plugin.target import Form
from .manifest import Check
from .verify_child import GENERATION

# How far logits may be off, as a share of the largest one, by dtype.
SAME = {torch.float32: 1e-5}  # equal shapes give equal sums; BLAS may still choose by memory alignment
PADDED = {torch.float32: 1e-4}  # zeros change how sums are blocked, hence their rounding
HALF = {"same": 2**-6, "padded": 2**-4}  # bfloat16 rounds at 2**-8, and over some layers


def compare_outputs(
    form: Form,
    expected: Mapping[str, torch.Tensor],
    actual: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    rounding: float | None = None,
    *,
    has_routed_experts: bool = False,
) -> list[Check]:
    """One check per output. Tokens count as different only where the two best logits are not a near tie.

    rounding             the share of root mean squares for a form that rounds
    has_routed_experts   a token with a nearly undecided router takes other experts once numbers are rounded: then
                         `MOST` of the tokens are compared, and steps of generation behind such a token are not
    """
    share = (PADDED if form.padded else SAME).get(dtype, HALF["padded" if form.padded else "same"])
    reason = "zeros change the order of sums" if form.padded else "equal shapes; memory alignment may round sums"
    reason = form.reason or reason
    checks = []
    for name, reference in expected.items():
        if name.startswith(GENERATION) and not form.generates:
            continue
        got = actual.get(name)
        label = f"{form.folder}, fresh process: {name}"
        if got is None:
            checks.append(Check(label, math.inf, 0.0, "a fresh process gave none"))
        elif got.shape != reference.shape:
            shapes = f"they are {list(got.shape)} in a fresh process, and {list(reference.shape)} here"
            checks.append(Check(label, math.inf, 0.0, shapes))
        elif reference.is_floating_point():
            parting_steps = _steps_through_first_difference(name, expected, actual)
            until = None if parting_steps is None else int(parting_steps.min())
            if rounding is None:
                worst, limit = (
                    float((got - reference)[:, :until].abs().max()),
                    share * max(1.0, float(reference.abs().max())),
                )
            elif has_routed_experts:
                worst, limit = (
                    relative_error_quantile(got - reference, reference, parting_steps),
                    rounding * logit_rms(reference),
                )
            else:
                worst, limit = logit_rms((got - reference)[:, :until]), rounding * logit_rms(reference)
            checks.append(Check(label, worst, limit, reason))
        else:
            gap = _largest_top2_gap_at_divergence(name, expected, actual, rounding if has_routed_experts else None)
            tolerance = (
                share * _largest_absolute_value(expected)
                if rounding is None
                else _FAR * rounding * _largest_logit_rms(expected)
            )
            checks.append(Check(label, gap, 2 * tolerance, _TIES))
    return checks


def logit_rms(logits: torch.Tensor) -> float:
    """Root mean square of logits less the mean of each row, which no token feels."""
    return float((logits - logits.mean(-1, keepdim=True)).double().square().mean().sqrt())


def _logit_rms_by_token(logits: torch.Tensor) -> torch.Tensor:
    """Spread of each token alone."""
    return (logits - logits.mean(-1, keepdim=True)).double().square().mean(-1).sqrt()


def relative_error_quantile(
    errors: torch.Tensor, reference: torch.Tensor, divergence_steps: torch.Tensor | None
) -> float:
    """Largest error of the `MAJORITY` of tokens, of those that neither are padding nor follow a parting."""
    compared = (reference != 0).any(-1)
    if divergence_steps is not None:
        compared &= torch.arange(reference.shape[1]) < divergence_steps[:, None]
    return float(_logit_rms_by_token(errors)[compared].quantile(MAJORITY, interpolation="higher"))


def _largest_logit_rms(expected: Mapping[str, torch.Tensor]) -> float:
    return max(logit_rms(t) for t in expected.values() if t.is_floating_point())


# Of the tokens of an output. A token that met another expert takes those after it in its row along, so it cannot be
# nearly all; a fault that strikes the padded row alone, two in five of the tokens, is refused.
MAJORITY = 0.625
_FAR = 4  # root mean squares: one number in some ten thousands is further off
_TIES = "distance of the two best logits where tokens first part; 0 where all are equal"


def _steps_through_first_difference(
    logits_name: str, expected: Mapping[str, torch.Tensor], actual: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """Number of comparable steps of each generated row: up to and with its first token that differs."""
    steps = expected[logits_name].shape[1] - 1
    tokens = logits_name.replace(f"logits of prefill and {steps} decode steps", "greedy tokens")
    if tokens == logits_name or tokens not in actual:
        return None
    differs_at = (expected[tokens] != actual[tokens]).long()
    return torch.where(differs_at.any(1), differs_at.argmax(1) + 1, steps + 1)


def _largest_top2_gap_at_divergence(name: str, expected, actual, rounding: float | None) -> float:
    """Gap of the best logits where rows diverge; `rounding` leaves out tokens that are further off."""
    steps = expected[name].shape[1]
    of = name.replace("greedy tokens", f"logits of prefill and {steps - 1} decode steps")
    reference, gap = expected[of], 0.0
    parting_steps = _steps_through_first_difference(of, expected, actual)
    assert parting_steps is not None, f"no tokens beside {of}"
    for row, end in enumerate(parting_steps):
        last = int(end) - 1
        if expected[name][row, last] == actual[name][row, last]:
            continue
        if rounding is None or logit_rms((actual[of] - reference)[row, last]) <= rounding * logit_rms(reference):
            best = reference[row, last].topk(2).values
            gap = max(gap, float(best[0] - best[1]))
    return gap


def _largest_absolute_value(expected: Mapping[str, torch.Tensor]) -> float:
    return max([1.0, *(float(t.abs().max()) for t in expected.values() if t.is_floating_point())])
