"""What the target `onnx` would refuse, from a config alone."""

from ...models.checkpoints.meta_init import nothing_stored
from ...models.rows.inputs import has_two_sides
from ...plugin.context import Context
from ..native.kv_tensors import refuse_states
from . import seq2seq_export
from .decoder import KEEPS
from .export import decodes
from .refusal import cannot_write_onnx


def foresee(ctx: Context) -> None:
    """Raise Reject where the recipe's model has a layer that no standard op computes."""
    with nothing_stored():
        model = ctx.origin.build()
    if has_two_sides(model):
        seq2seq_export.refuse(model)
    elif decodes(model):
        refuse_states(model, cannot_write_onnx, KEEPS)
