"""A model as exporters take it: tensors in by name, one tensor out."""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...dsl.syntax.diagnostics import Fault
from ..ir.capture.sample import first_position_id
from ..ir.program import Program
from ..models.rows.forward import main_tensor_of_output
from ..models.rows.inputs import is_encoder_decoder, use_cache_false_kwargs


def example_inputs_by_name(program: Program) -> dict[str, Any]:
    """Example inputs for tracing a program: no cache, which a plain program can't hand back, and no positions where
    those of a model do not begin at 0, as whoever calls it would think: it counts them itself."""
    excluded = {"position_ids"} if first_position_id(program.model) else set()
    return {name: x for name, x in program.inputs.items() if isinstance(x, torch.Tensor) and name not in excluded}


class MainOutput(nn.Module):
    """The logits of a model of transformers, or its last hidden state where it has no head.

    Positions that begin behind the one of padding (RoBERTa and its kin) count what is neither masked nor padding.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        has_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.first = first_position_id(model) if has_positions else 0

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        pixel_values: Any = None,
        input_values: Any = None,
        past_values: Any = None,
    ) -> Any:
        if position_ids is None and self.first and input_ids is not None:
            position_ids = self._positions(input_ids, attention_mask)
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "pixel_values": pixel_values,
            "input_values": input_values,
            "past_values": past_values,
        }
        inputs = {name: x for name, x in named.items() if x is not None}
        return main_tensor_of_output(self.model(**inputs, **use_cache_false_kwargs(self.model)))

    def _positions(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[b, t]; padding has the number before the first, as in the model's own count, which knows no masks."""
        real = (ids != self.first - 1).long() * (1 if mask is None else mask)
        return real.cumsum(1) * real + self.first - 1


def refuse_encoder_decoder(model: nn.Module, fault: Fault) -> None:
    """Raise Reject of an encoder with a decoder, which would be two programs with a cache between them."""
    if is_encoder_decoder(model):
        raise fault(
            f"{type(model).__name__} is an encoder with a decoder, and what is written here reads one row",
            help="`hf` writes it for transformers; its encoder alone is a model of its own, as T5EncoderModel",
        ).rejection()


def with_main_output_only(model: nn.Module) -> nn.Module:
    """A plain module itself; a model of transformers with one result, as other libraries know no other."""
    return MainOutput(model) if isinstance(model, PreTrainedModel) else model
