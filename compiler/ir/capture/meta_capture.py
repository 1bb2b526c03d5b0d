"""The program of a model whose weights nobody has read: captured on the meta device, or over numbers that stand in.

Some models ask while they run what numbers a tensor holds: how many tokens an expert takes, which rows are in a
language. On the meta device there are none; these are captured again, on numbers that take no room.
"""

from collections.abc import Callable

from torch import nn

from ....dsl.syntax.diagnostics import Reject
from ...models.checkpoints.fake_weights import build_with_random_weights
from ...models.checkpoints.meta_init import without_storage
from ...models.checkpoints.origin import Origin
from ..program import Program
from .capture import capture
from .failed_forward import was_rejected_for_lack_of_weights


def capture_on_meta(origin: Origin) -> Program:
    """Program of an origin's model. Raises Reject (unsupported-model), see `capture_without_weights`."""
    with without_storage():
        model = origin.build()
    return capture_without_weights(model, origin.build)


def capture_without_weights(model: nn.Module, build: Callable[[], nn.Module]) -> Program:
    """Program of a model on the meta device, or else of what `build` makes, over numbers that stand in.

    Raises Reject (unsupported-model) with what the meta device said, where numbers do not help.
    """
    try:
        return capture(model)
    except Reject as rejection:
        if not was_rejected_for_lack_of_weights(rejection):
            raise
        try:
            return capture(build_with_random_weights(build))
        except Reject as real:
            raise rejection if was_rejected_for_lack_of_weights(real) else real from None
