"""Models that number positions by the tokens themselves: RoBERTa and its kin leave out every token that is padding by
its number, wherever it stands. The engine numbers a row's own tokens, so a row where both differ is refused."""

import torch
from torch import Tensor

from ...dsl.syntax.diagnostics import Fault

other_positions = Fault(
    "other-positions",
    "The engine counts the tokens of a text from 0 on, and the model that it was made of counts otherwise.\n\n"
    "RoBERTa and its kin (X-MOD, M2M100) give no position to the token that rows are filled up with, also where it "
    "stands inside of a text. `generate` counts tokens as the engine does.",
    exit="usage",
)


def refuse_visible_padding(ids: Tensor, mask: Tensor | None, uncounted_token: int | None) -> None:
    """Raises Reject (other-positions) where a model that leaves out `uncounted_token` would number tokens that are seen
    otherwise.

    ids, mask         [b, t]; all is seen without a mask
    uncounted_token   None of a model that counts every token
    """
    if uncounted_token is None:
        return
    visible = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    model_positions, expected_positions = ((ids != uncounted_token) * 1).cumsum(-1), (visible * 1).cumsum(-1)
    if bool(((ids == uncounted_token) | (model_positions != expected_positions))[visible].any()):
        raise other_positions(
            "tokens would have other positions than the model gives them: it counts all but "
            f"{uncounted_token}, which a row "
            "holds among its own, or has not where it is filled up",
            help=f"fill rows up with {uncounted_token} and say where by `attention_mask`; "
            "leave that token out of texts",
        ).rejection()
