"""The program of a model whose weights nobody has read: captured on the meta device, or over numbers that stand in.

Some models ask while they run what numbers a tensor holds: how many tokens an expert takes, which rows are in a
language. On the meta device there are none; these are captured again, on numbers that take no room.
"""

from ....dsl.syntax.diagnostics import Reject
from ...models.checkpoints.fake_weights import build_with_random_weights
from ...models.checkpoints.meta_init import without_storage
from ...models.checkpoints.origin import Origin
from ..program import Program
from .capture import capture
from .first_calls import needs_weights


def capture_on_meta(origin: Origin) -> Program:
    """Raises Reject (unsupported-model) with what the meta device said, where numbers do not help."""
    with without_storage():
        model = origin.build()
    try:
        return capture(model)
    except Reject as rejection:
        if not needs_weights(rejection):
            raise
        try:
            return capture(build_with_random_weights(origin))
        except Reject as real:
            raise rejection if needs_weights(real) else real from None
