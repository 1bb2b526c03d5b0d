"""Why a search can't go on, or its result can't be kept."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ....dsl.syntax.diagnostics import Diagnostic, Fault

if TYPE_CHECKING:
    from .choice import Round

no_finite_score = Fault("no-finite-score", "Every candidate of a search scored NaN or infinity.", exit="failure")
out_of_reach = Fault(
    "out-of-reach",
    "A step is to remove more than can go.\n\n"
    "A model keeps its last branch, and every module that is narrowed keeps a step of its width.",
)
saved_less = Fault(
    "saved-less",
    "A search counted on more than what its cuts took out of the model.\n\n"
    "Every cut has a size on paper, and the model that results is measured: something of what was cut still runs. "
    "The step's result is not kept.",
    exit="failure",
)
SCORE_HELP = "score on other data, or look at what made the model's weights"


def percent_floor(fraction: float) -> str:
    """A share that can be reached, rounded down: `3.4%`."""
    return f"{int(fraction * 1000) / 10:g}%"


def no_candidate_diagnostic(
    round_: "Round", refusal_by_location: Mapping[str, str], quantity: str, saved_share: float
) -> Diagnostic:
    """Diagnostic for a round that has no winner; parts of `refusal_by_location` can't go, each with its reason, and a
    share is saved so far, which is as much as another recipe can remove."""
    reach = percent_floor(saved_share)
    less = "" if reach == "0%" else f"remove at most {reach} of {quantity}, or "
    if refusal_by_location and not round_.candidates:
        return out_of_reach(
            f"none of the {len(refusal_by_location)} parts that are left can go, and {reach} of {quantity} are saved",
            note="; ".join(list(refusal_by_location.values())[:5]),
            help=f"{less}narrow it instead: prune.channels, prune.heads",
            argument="keep remove",
        )
    if any(math.isfinite(score) for score in round_.scores.values()):
        return out_of_reach(
            f"nothing that is left saves {quantity}, and {reach} are saved",
            help=f"{less}let more modules or kinds be cut",
            argument="keep remove",
        )
    return no_finite_score(f"all {len(round_.scores)} candidates score NaN or infinity", help=SCORE_HELP)
