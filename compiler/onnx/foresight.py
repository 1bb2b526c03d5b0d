"""What the target `onnx` would refuse, from a config alone."""

from ..checkpoints.blank import nothing_stored
from ..words.context import Context
from .decoder import refuse_states
from .export import decodes


def foresee(ctx: Context) -> None:
    """Raise Reject where the recipe's model has a layer that no standard op computes."""
    with nothing_stored():
        model = ctx.origin.build()
    if decodes(model):
        refuse_states(model)
