"""What the target `onnx` would refuse, from a config alone."""

from ..checkpoints.blank import nothing_stored
from ..native.kept import refuse_states
from ..rows.inputs import has_two_sides
from ..words.context import Context
from . import sources
from .decoder import KEEPS
from .export import decodes
from .refusal import cannot_write_onnx


def foresee(ctx: Context) -> None:
    """Raise Reject where the recipe's model has a layer that no standard op computes."""
    with nothing_stored():
        model = ctx.origin.build()
    if has_two_sides(model):
        sources.refuse(model)
    elif decodes(model):
        refuse_states(model, cannot_write_onnx, KEEPS)
