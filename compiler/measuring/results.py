"""A model as exporters take it: tensors in by name, one tensor out."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...dsl.diagnostics import Fault, Reject
from ..ir.program import Program
from ..rows.forward import main_output
from ..rows.inputs import has_two_sides, without_cache


def tensors_of(program: Program) -> dict[str, Any]:
    """What a program is traced with: no cache, which a plain program can't hand back."""
    return {name: x for name, x in program.inputs.items() if isinstance(x, torch.Tensor)}


class Main(nn.Module):
    """The logits of a model of transformers, or its last hidden state where it has no head."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, pixel_values: Any = None
    ) -> Any:
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "pixel_values": pixel_values,
        }
        given = {name: x for name, x in named.items() if x is not None}
        return main_output(self.model(**given, **without_cache(self.model)))


def refuse_two_sides(model: nn.Module, fault: Fault) -> None:
    """Raise Reject of an encoder with a decoder, which would be two programs with a cache between them."""
    if has_two_sides(model):
        raise Reject(
            fault(
                f"{type(model).__name__} is an encoder with a decoder, and what is written here reads one row",
                help="`hf` writes it for transformers; its encoder alone is a model of its own, as T5EncoderModel",
            )
        )


def first_result_of(model: nn.Module) -> nn.Module:
    """A plain module itself; a model of transformers with one result, as other libraries know no other."""
    return Main(model) if isinstance(model, PreTrainedModel) else model
