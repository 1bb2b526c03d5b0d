"""From a program to the folder that the engine runs."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ....kernels.native import KernelError
from ...ir.capture.sample import first_position, uncounted
from ...ir.layers.linear import params
from ...ir.program import Program
from ...models.checkpoints.sidecar_files import companions
from ...models.rows.inputs import first_said, has_two_sides, padding
from ...plugin.context import Context
from .linears import Numbers
from .model import READS_PADDING
from .plan import Gives
from .plan_files import write
from .reader import Reader
from .refusal import refused_whole


def emit(program: Program, folder: Path, ctx: Context, numbers: Numbers) -> None:
    """Plan, weights and what a tokenizer needs. Rejects a program without a plan before anything is written."""
    plan = Reader(program, numbers).read()
    companions(program.model, ctx.origin, folder)
    try:
        write(plan, folder, facts(program.model, numbers.weights, plan.gives))
    except KernelError as error:  # a weight that is not finite, or no memory for it
        raise refused_whole(program.model, str(error)) from error


def facts(model: Any, weights: str, gives: Gives = Gives()) -> dict[str, Any]:
    """What an artifact says of the model, and of what may run it: packed weights are the same at every level."""
    known = _identity(model, weights)
    if (skipped := uncounted(model)) is not None:
        known["uncounted"] = skipped
    if has_two_sides(model):
        return known | {"start": first_said(model), "pad": padding(model)}
    if gives.speaks:
        return known | ({READS_PADDING: True} if _reads_padding(model) else {})
    return known | {"gives": asdict(gives), "pad": padding(model), "position": first_position(model)}


@torch.no_grad()
def _reads_padding(model: Any) -> bool:
    """Whether a model takes padding for text: its forward is given a mask and doesn't read it, as RWKV's."""
    ids, mask = (torch.tensor([row], device=model.device) for row in ([0, 1, 2, 3], [0, 0, 1, 1]))
    told, untold = (model(input_ids=ids, **given)["logits"] for given in ({"attention_mask": mask}, {}))
    return torch.equal(told, untold)


def _identity(model: Any, weights: str) -> dict[str, Any]:
    return {
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "params": params(model),
        "weights": weights,
        "isa": "portable",
    }
