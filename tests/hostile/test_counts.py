"""Counts and places that a binary file states are held against the file before anybody believes them."""

import json
import struct
import time

import pytest
from effc.compiler.artifacts.manifest import Manifest
from effc.compiler.inputs.sources.gguf import read_tensor_shapes
from effc.compiler.ir import graph_json

from tests.worlds import slug


def gguf_of(*keys: bytes, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(keys)) + b"".join(keys)


def key(name: str, kind: int, body: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + body


@pytest.mark.parametrize("count", [2**22 + 1, 2**31, 2**63, 2**64 - 1])
@pytest.mark.parametrize("kind", [4, 7, 8, 9])
def test_a_gguf_that_counts_beyond_its_end_is_refused_at_once(tmp_path, count, kind):
    pytest.importorskip("gguf")
    file = tmp_path / "x.gguf"
    file.write_bytes(gguf_of(key("tokenizer.ggml.tokens", 9, struct.pack("<IQ", kind, count) + b"\0" * 64)))
    started = time.process_time()
    assert slug(lambda: read_tensor_shapes(file, "x")) == "bad-gguf"
    assert time.process_time() - started < 5


def place(name, *args):
    return {"op": "placeholder", "name": name, "target": name, "args": list(args)}


def test_a_graph_whose_arguments_no_function_could_have_is_refused():
    nodes = [place("a", None), place("b"), {"op": "output", "name": "output", "args": [{"node": "b"}]}]
    assert slug(lambda: graph_json.graph_from_json({"format": 1, "nodes": nodes})) == "refused-graph"
    nodes[:2] = [place("b"), place("a", None)]
    assert len(graph_json.graph_from_json({"format": 1, "nodes": nodes}).nodes) == 3


def changed_onnx(folder, change):
    onnx = pytest.importorskip("onnx")
    from effc.compiler.runtimes.onnx import checking

    tensor = onnx.TensorProto(name="w", data_type=1, dims=[2, 3])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for name, text in (("location", checking.DATA), ("offset", "0"), ("length", "24")):
        tensor.external_data.add(key=name, value=text)
    change(tensor)
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    model = onnx.helper.make_model(graph)
    said = '{"class": "A", "model_type": "a", "params": 6, "decodes": false, "context": null}'
    model.metadata_props.add(key=checking.FACTS, value=said)
    (folder / checking.FILE).write_bytes(model.SerializeToString())
    (folder / checking.DATA).write_bytes(b"\0" * 24)
    return checking.load_initializers(folder, checking.read_checked_onnx(folder))


def test_an_external_weight_of_onnx_is_read(tmp_path):
    assert tuple(changed_onnx(tmp_path, lambda tensor: None)["w"].shape) == (2, 3)


def _dims(*sizes):
    def change(tensor):
        del tensor.dims[:]
        tensor.dims.extend(sizes)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _dims(2**32, 2**32, 2**32),
        _dims(-2, -3),
        _dims(2, 4),
        lambda tensor: tensor.external_data.add(key="location", value="/etc/passwd"),
        lambda tensor: tensor.external_data.add(key="offset", value="8"),
        lambda tensor: setattr(tensor, "data_type", 0),
        lambda tensor: setattr(tensor, "data_type", 8),
        lambda tensor: setattr(tensor.external_data[0], "value", "../model.onnx.data"),
        lambda tensor: setattr(tensor.external_data[1], "value", str(2**63)),
        lambda tensor: setattr(tensor.external_data[2], "value", "-24"),
    ],
)
def test_a_weight_of_onnx_that_lies_elsewhere_or_in_two_places_is_refused(tmp_path, change):
    assert slug(lambda: changed_onnx(tmp_path, change)) == "refused-onnx"


def test_a_front_names_each_point_once():
    """Every name is a folder that is read and measured: thousands of one name would be thousands of readings."""
    point = {"name": "small", "measures": [["params", 1, "", "lower"]], "profile": {}, "steps": []}
    whole = Manifest("front", files={"points/small/model/config.json": (1, "0")}).to_json()
    body = json.loads(json.dumps(whole))
    assert len(Manifest.from_json(body | {"members": [point, point | {"name": "large"}]}).members) == 2
    for count in (2, 3000):
        with pytest.raises(ValueError, match="two points have one name"):
            Manifest.from_json(body | {"members": [point] * count})
