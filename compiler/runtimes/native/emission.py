"""From a program to the folder that the engine runs."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ....kernels.native import KernelError
from ...ir.capture.sample import first_position_id, uncounted_token_id
from ...ir.layers.linear import count_params
from ...ir.program import Program
from ...ir.weights import model_weights_hash
from ...models.checkpoints.sidecar_files import copy_sidecar_files
from ...models.rows.inputs import decoder_start_id, is_encoder_decoder, pad_id_of
from ...plugin.context import Context
from ..model import READS_PADDING
from .linears import NumberFormats
from .plan import Output
from .plan_files import write_plan
from .reader import Reader
from .refusal import model_rejection

BASE_HASH = "tensors_sha256"  # among the facts: of the tensors that were packed, by which interventions know their base


def write_native_artifact(program: Program, folder: Path, ctx: Context, formats: NumberFormats) -> None:
    """Plan, weights and what a tokenizer needs. Rejects a program without a plan before anything is written."""
    plan = Reader(program, formats).build_plan()
    copy_sidecar_files(program.model, ctx.origin, folder)
    try:
        write_plan(plan, folder, native_artifact_facts(program.model, formats.weights, plan.output))
    except KernelError as error:  # a weight that is not finite, or no memory for it
        raise model_rejection(program.model, str(error)) from error


def native_artifact_facts(model: Any, weight_format: str, output_form: Output = Output()) -> dict[str, Any]:
    """Facts of an artifact about the model and the machines that may run it: packed weights are equal at every
    level."""
    known = _model_identity(model, weight_format)
    if (skipped := uncounted_token_id(model)) is not None:
        known["uncounted"] = skipped
    if is_encoder_decoder(model):
        return known | {"start": decoder_start_id(model), "pad": pad_id_of(model)}
    if output_form.predicts_next_tokens:
        known[BASE_HASH] = model_weights_hash(model)
        return known | ({READS_PADDING: True} if _reads_padding(model) else {})
    return known | {"gives": asdict(output_form), "pad": pad_id_of(model), "position": first_position_id(model)}


@torch.no_grad()
def _reads_padding(model: Any) -> bool:
    """Whether a model takes padding for text: its forward is given a mask and doesn't read it, as RWKV's."""
    ids, mask = (torch.tensor([row], device=model.device) for row in ([0, 1, 2, 3], [0, 0, 1, 1]))
    masked, untold = (model(input_ids=ids, **mask_kwargs)["logits"] for mask_kwargs in ({"attention_mask": mask}, {}))
    return torch.equal(masked, untold)


def _model_identity(model: Any, weight_format: str) -> dict[str, Any]:
    return {
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "params": count_params(model),
        "weights": weight_format,
        "isa": "portable",
    }
