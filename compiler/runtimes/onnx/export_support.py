"""Check of the support by the target `onnx`, from a config alone."""

from ...models.checkpoints.meta_init import without_storage
from ...models.rows.inputs import is_encoder_decoder
from ...plugin.context import Context
from ..native.kv_tensors import refuse_recurrent_layers
from . import seq2seq_export
from .decoder import KEEPS
from .export import decodes
from .refusal import cannot_write_onnx


def refuse_unsupported_model(ctx: Context) -> None:
    """Raise Reject where the recipe's model has a layer that no standard op computes."""
    with without_storage():
        model = ctx.origin.build()
    if is_encoder_decoder(model):
        seq2seq_export.refuse_unsupported_encoder_decoder(model)
    elif decodes(model):
        refuse_recurrent_layers(model, cannot_write_onnx, KEEPS)
