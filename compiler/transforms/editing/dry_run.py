"""An edit tried on a copy without weights, so that what the model can't do without is refused while it is whole.

Whether a model runs without a layer can't be read from its config: some work out by their own rules which layer
is of which kind.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from ....dsl.syntax.diagnostics import Fault, Reject
from ...ir.capture.first_calls import record_first_calls
from ...ir.program import Program

SMALL = 1 << 30  # bytes of a model that is copied with its numbers

layer_needed = Fault(
    "layer-needed",
    "A layer, or a branch of one, can't be removed, because the model does not run without it.\n\n"
    "Some models work out from a layer's number what kind it is, or share one layer's work with others: their "
    "config has no words for a model without it. Remove another layer, or single branches of this one.",
)


frees_nothing = Fault(
    "frees-nothing",
    "What is to be removed keeps running, because something that stays reads what it computes besides.\n\n"
    "A layer may hand on a state, or weights of its attention, that later layers or the model's outputs are made of.",
)


def dry_run_or_reject(
    program: Program,
    removed_label: str,
    remove: Callable[[Program], None],
    remedy: str = "remove another layer, or branches of this one",
) -> Program:
    """Dry run of an edit that removes `removed_label`, on a copy without weights.

    Raises Reject (layer-needed) if the model does not run after the edit. One that doesn't run without weights at
    all tells nothing: then the edit itself will show.
    """
    trial = copy_on_meta(program)
    remove(trial)
    try:
        record_first_calls(trial.model, trial.inputs)
    except Reject as error:
        if forward_runs(copy_on_meta(program)):
            name = type(program.model).__name__
            raise layer_needed(
                f"{removed_label} can't be removed: {name} does not run without it",
                help=remedy,
                note=error.diagnostics[0].message,
            ).rejection() from error
    return trial


def unread_output_indices(program: Program, unit_path: str) -> frozenset[int]:
    """Indices of a layer's outputs besides the first that neither the model nor its caller ever reads."""
    trial = copy_on_meta(program)
    layer, count = trial.model.get_submodule(unit_path), _output_count(program.units[unit_path].graph)
    return frozenset(index for index in range(1, count) if _is_output_unused(trial, layer, index))


def _output_count(graph: fx.Graph) -> int:
    returned = next(node for node in graph.nodes if node.op == "output").args[0]
    return len(returned) if isinstance(returned, (tuple, list)) else 1


def _is_output_unused(meta_program: Program, layer: nn.Module, output_index: int) -> bool:
    """Whether a model runs, and says nothing of it, when a layer gives a mark in place of one of its values."""
    mark = object()

    def marked(_layer: nn.Module, _args: Any, output: Any) -> Any:
        return tuple(mark if i == output_index else value for i, value in enumerate(output))

    handle = layer.register_forward_hook(marked)
    try:
        with torch.no_grad():
            output_of_model = meta_program.model(**meta_program.inputs)
    except Exception:  # whatever the model does with a value that is no tensor, it reads it
        return False
    finally:
        handle.remove()
    return not _contains(output_of_model, mark)


def _contains(value: Any, marker: object) -> bool:
    if isinstance(value, Mapping):
        return any(_contains(x, marker) for x in value.values())
    if isinstance(value, (tuple, list)):
        return any(_contains(x, marker) for x in value)
    if isinstance(value, EncoderDecoderCache):
        return _contains([value.self_attention_cache, value.cross_attention_cache], marker)
    if isinstance(value, Cache):
        return any(_contains(x, marker) for layer in value.layers for x in vars(layer).values())
    return value is marker


def forward_runs(program: Program) -> bool:
    """Whether the model's forward runs on the program's inputs."""
    try:
        record_first_calls(program.model, program.inputs)
    except Reject:
        return False
    return True


def copy_on_meta(program: Program) -> Program:
    """A copy of a program, of its model all but the numbers: parameters and buffers are on the meta device."""
    bare: dict[int, object] = {}
    for tensor in _tensors(program):
        empty = torch.empty_like(tensor, device="meta")
        bare[id(tensor)] = (
            nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        )
    inputs = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in program.inputs.items()
    }
    return _deepcopy_program(program, bare, inputs)


def copy_with_weights_if_small(program: Program) -> Program | None:
    """A copy with all numbers, for a model that doesn't run without any; None where it would take `SMALL` bytes."""
    if sum(tensor.nbytes for tensor in _tensors(program)) > SMALL:
        return None
    return _deepcopy_program(program, {}, dict(program.inputs))


def _tensors(program: Program) -> list[torch.Tensor]:
    return [*program.model.parameters(), *program.model.buffers()]


def _deepcopy_program(program: Program, memo: dict[int, object], inputs: dict[str, Any]) -> Program:
    units = {path: replace(unit) for path, unit in program.units.items()}
    model = copy.deepcopy(program.model, memo)
    return Program(model, inputs, units, dict(program.opaque), edits=copy.deepcopy(program.edits))
