"""From a program to the ONNX files of a folder, through torch's exporter."""

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...core.json_errors import first_line
from ...evaluation.results import example_inputs_by_name, with_main_output_only
from ...ir.layers.linear import count_params
from ...ir.program import Program
from ...models.checkpoints.origin import max_row_tokens
from ...models.checkpoints.pretrained import pretrained
from ...models.rows.forward import in_eval_mode, main_output_name, tower_embeddings
from ...models.rows.inputs import decoder_start_id, is_encoder_decoder, pad_id_of
from ...models.rows.packed_inputs import is_media_encoder_decoder
from ..native.kv_tensors import decoder_sample_inputs
from . import seq2seq_export
from .axes import rename_symbolic_axes
from .checking import FACTS, NAME, read_checked_onnx
from .decoder import KEEPS, Decoder
from .nbits import NBitsWeight, linears_as_matmul_nbits
from .refusal import cannot_write_onnx

_OPSET = 18  # what torch's exporter translates to itself; later ones are converted


def export_onnx(program: Program, folder: Path, nbits: Mapping[str, NBitsWeight]) -> None:
    """`model.onnx` and `model.onnx.data`: a decoder with its cache as inputs and outputs, anything else as it is.

    Of an encoder with a decoder three graphs, each with the file of its weights. Linear modules at the paths of
    `nbits` are nodes `MatMulNBits`.
    """
    model, facts = as_float(program.model), onnx_artifact_facts(program.model)
    if is_encoder_decoder(model):
        seq2seq_export.refuse_unsupported_encoder_decoder(model)
    with in_eval_mode(model), torch.no_grad(), _silence_exporter(), linears_as_matmul_nbits(model, nbits):
        if is_encoder_decoder(model):
            for graph in seq2seq_export.export_graphs(model):
                exported = _export_module(graph.module, graph.arguments, graph.shapes, graph.inputs, graph.outputs)
                _save_and_check(exported, facts, folder, graph.name)
        else:
            exported = _decoder(model) if decodes(model) else _export_forward(model, example_inputs_by_name(program))
            _save_and_check(exported, facts, folder, NAME)


def _save_and_check(exported: Any, facts: Mapping[str, Any], folder: Path, name: str) -> None:
    for node in exported.model.graph.all_nodes():  # they say whose files lay where
        node.metadata_props.clear()
        node.doc_string = None
    rename_symbolic_axes(exported.model)
    exported.model.metadata_props[FACTS] = json.dumps(facts)
    exported.save(folder / f"{name}.onnx", external_data=True)
    read_checked_onnx(folder, name)


def decodes(model: nn.Module) -> bool:
    """Whether a model continues text by what it kept of the tokens before."""
    return isinstance(model, PreTrainedModel) and model.can_generate() and model.main_input_name == "input_ids"


def as_float(model: nn.Module) -> nn.Module:
    """The model itself in float32, else a copy: ONNX Runtime has no bfloat16 on CPUs."""
    if all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point()):
        return model
    return copy.deepcopy(model).float()


def onnx_artifact_facts(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    text = config.get_text_config() if isinstance(model, PreTrainedModel) else None
    return {
        "class": type(model).__name__,
        "model_type": getattr(config, "model_type", ""),
        "params": count_params(model),
        "context": max_row_tokens(text.to_dict())
        if is_media_encoder_decoder(model)
        else getattr(text, "max_position_embeddings", None),
        "decodes": decodes(model),
        **(_encoder_decoder_facts(model) if is_encoder_decoder(model) else {}),
    }


def _encoder_decoder_facts(model: nn.Module) -> dict[str, Any]:
    vocabulary = (
        0 if is_media_encoder_decoder(model) else pretrained(model).get_encoder().get_input_embeddings().num_embeddings
    )
    return {"start": decoder_start_id(model), "pad": pad_id_of(model), "source_vocabulary": vocabulary}


def _decoder(model: nn.Module) -> Any:
    inputs, past, slots = decoder_sample_inputs(model, cannot_write_onnx, KEEPS)
    with _experts_as_batched_matmul(model):
        return _export_decoder_step(Decoder(model, slots), inputs, past)


def _export_decoder_step(decoder: Decoder, inputs: dict[str, Any], past: list[Any]) -> Any:
    free = torch.export.Dim.DYNAMIC
    layers = range(len(past) // 2)
    parts = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
    return _export_module(
        decoder,
        {"inputs": inputs, "past": past},
        {"inputs": {name: {0: free, 1: free} for name in inputs}, "past": [{0: free, 2: free} for _ in past]},
        [*inputs, *(f"past_key_values.{part}" for part in parts)],
        ["logits", *(f"present.{part}" for part in parts)],
    )


def _export_forward(model: nn.Module, inputs: dict[str, Any]) -> Any:
    free, axes = torch.export.Dim.AUTO, 2 if "input_ids" in inputs else 1
    inputs = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    shapes = {name: dict.fromkeys(range(axes), free) if x.dim() else None for name, x in inputs.items()}
    output = model(**inputs) if isinstance(model, PreTrainedModel) else None
    outputs = [main_output_name(output)] if isinstance(output, Mapping) and not tower_embeddings(output) else None
    return _export_module(with_main_output_only(model), inputs, shapes, list(inputs), outputs)


def _export_module(
    module: nn.Module, example_inputs: Any, shapes: Any, inputs: list[str], outputs: list[str] | None
) -> Any:
    kind = type(getattr(module, "model", module)).__name__
    try:
        return torch.onnx.export(
            module.eval(),
            (),
            kwargs=example_inputs,
            dynamo=True,
            verbose=False,
            opset_version=_OPSET,
            dynamic_shapes=shapes,
            input_names=inputs,
            output_names=outputs,
        )
    except Exception as error:  # whatever torch meets in a forward, or has no translation of
        raise cannot_write_onnx(
            f"torch.onnx.export makes no ONNX of {kind}: {first_line(error.__cause__ or error)}",
            help="--debug shows where; `hf` and `native` write models in other ways",
        ).rejection() from error


@contextlib.contextmanager
def _experts_as_batched_matmul(model: Any) -> Iterator[None]:
    """Experts by products of batches: the loop over those that were hit, and grouped products, have no translation."""
    before = getattr(model.config, "_experts_implementation", None)
    if before is None:
        yield
        return
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextlib.contextmanager
def _silence_exporter() -> Iterator[None]:
    """The exporter prints and warns of what it tries; what goes wrong it raises."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
