"""A second program of torch alone that continues text: keys and values of a stated number of tokens go in and come out.

Keys and values have places for all tokens from the start, so that every call has the same shapes but for the batch and
the new tokens: what a compiler of programs wants, and what costs least to bind from another language.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import StaticLayer

from ...dsl.syntax.diagnostics import Fault
from ..core.safe_read import parse_strict_json, read_regular_file
from ..runtimes.native.kv_tensors import decoder_sample_inputs
from ..runtimes.padded import SEQUENCES, PaddedModel, PaddedRows
from .openers.export import STEP_FACTS, Exported

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MAX_FACTS = 1 << 16
_INSTEAD = "leave `context` out: the program of whole prompts needs no cache"


class CacheSlot(StaticLayer):
    """Keys and values of one layer, [b, heads, context, d]: new ones go where the tokens before end."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, past: Tensor):
        super().__init__(keys.shape[2])
        self.keys, self.values, self.before, self.is_initialized = keys, values, past, True

    def get_seq_length(self) -> Any:
        return self.before

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        positions = torch.arange(key_states.shape[2]) + self.before
        self.keys = self.keys.index_copy(2, positions, key_states)
        self.values = self.values.index_copy(2, positions, value_states)
        return self.keys, self.values


class Steps(nn.Module):
    """Logits, and keys and values layer by layer.

    given    input_ids [b, t], attention_mask [b, context] with zeros where a row has no token and, where the model
             takes some, position_ids [b, t]
    before   [] int64: how many places are taken
    past     keys and values in turns, each [b, heads, context, d]; of layers without attention none
    slots    where in the model's cache they belong
    """

    def __init__(self, model: nn.Module, slots: list[int]):
        super().__init__()
        self.model, self.slots = model, slots

    def forward(self, given: dict[str, Tensor], before: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        pairs = dict(zip(self.slots, zip(past[::2], past[1::2], strict=True), strict=True))
        any_pair = (past[0], past[1])  # of a layer without attention: nothing asks for it but the mask's length
        layers_cache = [CacheSlot(*pairs.get(n, any_pair), before) for n in range(max(self.slots) + 1)]
        logits = self.model(**given, cache=Cache(layers=[*layers_cache]), use_cache=True).logits
        return logits.float(), [part for n in self.slots for part in (layers_cache[n].keys, layers_cache[n].values)]


def export_decode_step(model: nn.Module, context_length: int, error_type: Fault) -> tuple[Any, dict[str, Any]]:
    """The program, and what a caller has to know of it. Raises Reject of `error_type`, or whatever torch meets."""
    inputs, past_parts, slots = decoder_sample_inputs(model, error_type, _INSTEAD)
    if not past_parts:
        raise error_type(f"{type(model).__name__} has no layer with keys and values left", help=_INSTEAD).rejection()
    mask = torch.ones(len(inputs["input_ids"]), context_length, dtype=torch.int64)
    mask[-1, 0] = 0
    past = [
        torch.zeros(part.shape[0], part.shape[1], context_length, part.shape[3], dtype=part.dtype)
        for part in past_parts
    ]
    free = torch.export.Dim.DYNAMIC
    rows = {name: {0: free, 1: free} for name in inputs} | {"attention_mask": {0: free}}
    program = torch.export.export(
        Steps(model, slots).eval(),
        (),
        {"given": {**inputs, "attention_mask": mask}, "before": torch.tensor(past_parts[0].shape[2]), "past": past},
        dynamic_shapes={
            "given": {name: rows[name] for name in inputs},
            "before": None,
            "past": [{0: free}] * len(past),
        },
    )
    facts = {
        "context": context_length,
        "inputs": list(inputs),
        "past": [[part.shape[1], part.shape[3]] for part in past],
        "dtype": str(past[0].dtype).removeprefix("torch."),
    }
    return program, facts


@dataclass(frozen=True)
class StepFacts:
    """past   heads and size of each of keys and values, in turns"""

    context: int
    inputs: tuple[str, ...]
    past: tuple[tuple[int, int], ...]
    dtype: torch.dtype


def read_step_facts(folder: Path) -> StepFacts:
    """Raises ValueError where the file beside a program does not say what it must."""
    data = parse_strict_json(read_regular_file(folder / STEP_FACTS, _MAX_FACTS))
    try:
        context, names, past = data["context"], data["inputs"], data["past"]
        integers = [context, *(number for pair in past for number in pair)]
        fits = all(type(n) is int and 0 < n < 1 << 24 for n in integers) and past and all(len(p) == 2 for p in past)
        if not fits or not set(names) <= {"input_ids", "attention_mask", "position_ids"}:
            raise ValueError("numbers or names that no program has")
        return StepFacts(context, tuple(names), tuple(map(tuple, past)), _DTYPES[data["dtype"]])
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError("it lacks something") from error


class Stepper:
    """The program with arrays of the length that there is, instead of all places."""

    def __init__(self, program: nn.Module, facts: StepFacts):
        self.program, self.facts = program, facts
        self.past = [f"past.{number}" for number in range(len(facts.past))]
        self.shapes = {n: (None, heads, None, d) for n, (heads, d) in zip(self.past, facts.past, strict=True)}

    @torch.no_grad()
    def step(self, ids: Tensor, mask: Tensor, past: list[np.ndarray] | None = None) -> list[np.ndarray]:
        length, context = mask.shape[1], self.facts.context
        before = length - ids.shape[1]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, before:]
        available = {"input_ids": ids, "attention_mask": _pad_with_ones(mask, 1, context), "position_ids": positions}
        past_padded = [torch.zeros(len(ids), heads, context, d, dtype=self.facts.dtype) for heads, d in self.facts.past]
        for buffer, part in zip(past_padded, past or [], strict=bool(past)):
            buffer[:, :, :before] = torch.from_numpy(part)
        # strides of a slice follow from the length, and shapes are checked again for new ones
        inputs = {name: available[name].clone(memory_format=torch.contiguous_format) for name in self.facts.inputs}
        logits, new = self.program(given=inputs, before=torch.tensor(before), past=past_padded)
        return [logits.numpy(), *(part[:, :, :length].float().numpy() for part in new)]


def _pad_with_ones(x: Tensor, axis: int, length: int) -> Tensor:
    """Filled up with ones; what lies behind the last token is hidden by being later."""
    shape = list(x.shape)
    shape[axis] = length - shape[axis]
    return torch.cat([x, torch.ones(shape, dtype=x.dtype)], axis)


class Continued(PaddedModel):
    """A program of whole prompts, and one that continues text, as one model."""

    engine_name = "the exported program"

    def __init__(
        self,
        prefill: Exported,
        program: nn.Module,
        facts: StepFacts,
        model_facts: dict[str, Any],
        generation: dict[str, Any] | None,
    ):
        plan = {"vocabulary": model_facts["vocabulary"], "context": facts.context}
        super().__init__(PaddedRows(Stepper(program, facts), plan), plan, {}, model_facts, SEQUENCES, generation)
        self.plain = prefill

    def batch_logits(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self.plain(**{name: x for name, x in inputs.items() if x is not None}).float()


def step_usage_note(facts: dict[str, Any], file: str) -> str:
    """Usage note of a program for the model card."""
    (heads, d), context = facts["past"][0], facts["context"]
    arguments = ", ".join(f'"{name}": ...' for name in facts["inputs"])
    return (
        f"`program/{file}` continues text: "
        f"`logits, past = step(given={{{arguments}}}, before=torch.tensor(n), past=past)` "
        f"where n tokens came before. `attention_mask` is [batch, {context}], and `past` begins as "
        f"{len(facts['past'])} tensors of zeros like [batch, {heads}, {context}, {d}]: `program/{STEP_FACTS}` has each."
    )


def write_step_facts(facts: dict[str, Any], folder: Path) -> None:
    (folder / STEP_FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")
