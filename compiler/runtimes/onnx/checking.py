"""An ONNX file read for what it is: listed ops, and weights in the one data file beside it."""

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....dsl.syntax.diagnostics import Reject
from ...core.json_errors import first_line
from ...core.safe_read import MALFORMED, MIB, open_regular, parse_strict_json, read_regular_file
from .nbits_checking import DOMAIN, OPERATOR, nbits_problem
from .refusal import rejected_onnx

if TYPE_CHECKING:
    import torch

NAME, FACTS = "model", "effc"
FILE, DATA = f"{NAME}.onnx", f"{NAME}.onnx.data"
ENCODER, BEGINNING, CONTINUATION = "encoder_model", "decoder_model", "decoder_with_past_model"  # as other hosts have it
FEATURES = "input_features"  # what an encoder of sounds takes
DOMAINS = ("", "ai.onnx")
# ONNX Runtime's own, of which int8 and codes of grids need one each: others read files.
RUNTIME = {DOMAIN: ("DynamicQuantizeLSTM", OPERATOR)}
_NUMBERS = (1, 2, 3, 5, 6, 7, 9, 10, 11)  # onnx.TensorProto: those that torch has, float32 to float64
_MAX_BYTES = 256 * MIB  # of the graph: weights lie beside it
_REJECTED_FIELDS = {
    "SparseTensorProto": "sparse tensor",
    "TrainingInfoProto": "graph for training",
}  # messages that effc never writes
_REMEDY = "compile it again with this effc"


@dataclass(frozen=True)
class OnnxFile:
    """Parsed file: the graph, its input names, and the metadata that effc wrote.

    graph   the bytes that `model` was read of: what runs is what was checked, whatever the file became since
    file    the name of the file of its weights
    data    what lies there, mapped from disk by the one file that was opened; what is written to it stays here
    """

    model: Any
    graph: bytes
    file: str
    data: bytearray | mmap.mmap
    inputs: tuple[str, ...]
    facts: dict[str, Any]

    @property
    def operators(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for node in nodes(self.model):
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def graphs_in(folder: Path) -> tuple[str, ...]:
    """The names of a folder's graphs: one, or the three of an encoder with a decoder."""
    is_seq2seq = not (folder / FILE).exists() and (folder / f"{ENCODER}.onnx").exists()
    return (ENCODER, BEGINNING, CONTINUATION) if is_seq2seq else (NAME,)


def read_checked_onnx(folder: Path, file_stem: str = NAME) -> OnnxFile:
    """Raises Reject (refused-onnx) unless a folder's file of that name holds what effc writes."""
    import onnx

    path = folder / f"{file_stem}.onnx"
    try:
        graph = read_regular_file(path, _MAX_BYTES)
        model = onnx.load_model_from_string(graph)
    except OSError as error:
        raise rejected_onnx(f"{path} can't be read: {error.strerror}").rejection() from error
    except Exception as error:  # what protobuf raises is of its own kind
        raise _rejected(path, f"is no ONNX: {first_line(error)}") from error
    _refuse_content_effc_never_writes(path, model)
    foreign = _unsupported_operator_texts(model)
    if foreign or model.functions:
        raise _rejected(path, f"calls ops of {', '.join(foreign) or 'its own functions'}, not of ONNX")
    problem = nbits_problem(model.graph, nodes(model))
    if problem:
        raise _rejected(path, problem)
    external = f"{path.name}.data"
    data = _map_data(path.with_name(external))
    _check_tensor_locations(path, model, len(data))
    return OnnxFile(model, graph, external, data, tuple(i.name for i in model.graph.input), _read_facts(path, model))


def message_and_nested_messages(message: Any) -> Iterator[Any]:
    """A message of protobuf and all messages inside of it, whichever field has them."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from message_and_nested_messages(inner)


def nodes(message: Any) -> Iterator[Any]:
    """The nodes anywhere in a message, of branches and functions as well."""
    return (inner for inner in message_and_nested_messages(message) if inner.DESCRIPTOR.name == "NodeProto")


def _refuse_content_effc_never_writes(path: Path, model: Any) -> None:
    """Refuse what another reader of the same bytes may understand otherwise, and kinds of messages that effc never
    writes."""
    size = model.ByteSize()
    model.DiscardUnknownFields()
    if model.ByteSize() != size:
        raise _rejected(path, "has fields that are not of ONNX")
    for message in message_and_nested_messages(model):
        if message.DESCRIPTOR.name in _REJECTED_FIELDS:
            raise _rejected(path, f"has a {_REJECTED_FIELDS[message.DESCRIPTOR.name]}")
        for field, value in message.ListFields():
            # protobuf hands on as bytes what it can't decode
            if field.type == field.TYPE_STRING and any(
                isinstance(text, bytes) for text in ([value] if isinstance(value, str | bytes) else value)
            ):
                raise _rejected(path, "holds names that are not UTF-8")


def _unsupported_operator_texts(model: Any) -> list[str]:
    """Domains of ops that effc does not write, each with the op where others of the domain are written."""
    foreign = {o.domain for o in model.opset_import if o.domain not in DOMAINS and o.domain not in RUNTIME}
    for node in nodes(model):
        if not node.op_type.isidentifier():
            foreign.add(f"odd names ({node.op_type!a})")
        elif node.domain in RUNTIME and node.op_type not in RUNTIME[node.domain]:
            foreign.add(f"{node.domain} ({node.op_type})")
        elif node.domain not in DOMAINS and node.domain not in RUNTIME:
            foreign.add(node.domain)
    return sorted(foreign)


def _map_data(path: Path) -> bytearray | mmap.mmap:
    """The bytes of the data file, none where there is none."""
    if path.is_symlink() or not path.is_file():
        return bytearray()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) if size else bytearray()


def _check_tensor_locations(path: Path, model: Any, size: int) -> None:
    """Refuse a tensor that lies elsewhere than in the graph's own bytes: initializers of the graph alone may lie in the
    data file, whose size in bytes is `size`."""
    tensors = [message for message in message_and_nested_messages(model) if message.DESCRIPTOR.name == "TensorProto"]
    for tensor in tensors:
        if any(axis < 0 for axis in tensor.dims):
            raise _rejected(path, f"has a weight `{tensor.name}` of a size below zero")
        if tensor.external_data and tensor.data_location != tensor.EXTERNAL:  # readers differ in which they believe
            raise _rejected(path, f"has a weight `{tensor.name}` both inside and in another file")
    external = [tensor for tensor in model.graph.initializer if tensor.data_location == tensor.EXTERNAL]
    if sum(tensor.data_location == tensor.EXTERNAL for tensor in tensors) > len(external):
        raise _rejected(path, f"has a weight inside of an op that lies in another file than {path.name}.data")
    for tensor in external:
        _check_external_region(path, tensor, size)


def _check_external_region(path: Path, tensor: Any, size: int) -> None:
    entry = {e.key: e.value for e in tensor.external_data}
    if len(entry) < len(tensor.external_data):  # readers differ in which of two they take
        raise _rejected(path, f"has a weight `{tensor.name}` with two places")
    try:
        start, length = int(entry.get("offset", "0")), int(entry["length"])
    except (KeyError, ValueError) as error:
        raise _rejected(path, f"has a weight `{tensor.name}` without a place") from error
    if entry.get("location") != f"{path.name}.data":
        raise _rejected(path, f"has a weight `{tensor.name}` in another file than {path.name}.data")
    if start < 0 or length < 0 or start + length > size:
        raise _rejected(path, f"has a weight `{tensor.name}` outside of {path.name}.data")


def load_initializers(folder: Path, graph_file: OnnxFile, file_stem: str = NAME) -> "dict[str, torch.Tensor]":
    """The initializers by name: large ones mapped from disk, where they take no memory of their own."""
    import numpy as np
    import onnx
    import torch

    path, result = folder / f"{file_stem}.onnx", {}
    for tensor in graph_file.model.graph.initializer:
        if tensor.data_type not in _NUMBERS:
            raise _rejected(path, f"has a weight `{tensor.name}` of a type {tensor.data_type}")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if tensor.data_location == tensor.EXTERNAL:
            entry = {e.key: e.value for e in tensor.external_data}
            shape, start = tuple(tensor.dims), int(entry.get("offset", "0"))
            if prod(shape) * dtype.itemsize != int(entry["length"]):
                raise _rejected(path, f"has a weight `{tensor.name}` of another size than its shape")
            array = np.frombuffer(graph_file.data, dtype, prod(shape), start).reshape(shape)
        else:
            array = _inline_tensor(path, tensor)
        result[tensor.name] = torch.from_numpy(array)
    return result


def _inline_tensor(path: Path, tensor: Any) -> Any:
    """The numbers that lie in the graph itself."""
    import onnx

    try:
        return onnx.numpy_helper.to_array(tensor).copy()
    except MALFORMED as error:
        raise _rejected(path, f"has a weight `{tensor.name}` of another size than its shape") from error


def _read_facts(path: Path, model: Any) -> dict[str, Any]:
    metadata = {p.key: p.value for p in model.metadata_props}
    try:
        facts = parse_strict_json(metadata.get(FACTS, ""))
        kinds = {"class": str, "model_type": str, "params": int, "decodes": bool}
        if path.name != FILE:  # of an encoder with a decoder
            kinds |= {"start": int, "source_vocabulary": int}
        fits = isinstance(facts, dict) and all(type(facts.get(name)) is kind for name, kind in kinds.items())
        fits = fits and (facts["context"] is None or type(facts["context"]) is int)
    except MALFORMED:
        fits = False
    if not fits:
        raise _rejected(path, "does not say which model it was made of")
    return facts


def _rejected(path: Path, problem: str) -> Reject:
    return rejected_onnx(f"{path} {problem}", help=_REMEDY).rejection()
