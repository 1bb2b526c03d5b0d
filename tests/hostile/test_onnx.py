"""What runs of an ONNX file are the bytes that were checked, and only ops that effc writes."""

import os
import tarfile
from math import prod

import pytest
import torch
from effc.compiler.runtimes.onnx.checking import DATA, FILE, load_initializers, read_checked_onnx
from effc.compiler.runtimes.onnx.model import Session, open_onnx
from effc.dsl.syntax.diagnostics import Reject

from tests.hostile.kinds import STORED

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
torch.set_num_threads(1)
IDS = torch.tensor([[5, 7, 9]])


@pytest.fixture
def folder(tmp_path):
    with tarfile.open(STORED / "kinds.tar.xz") as archive:
        archive.extractall(tmp_path, [m for m in archive if m.name.startswith("kinds/onnx/")], filter="data")
    return tmp_path / "kinds" / "onnx" / "onnx"


def logits(session: Session) -> torch.Tensor:
    return torch.from_numpy(session.step(IDS, torch.ones_like(IDS))[0])


@pytest.mark.parametrize("by", ["nothing", "another file", "a link", "a pipe"])
@pytest.mark.parametrize("name", [FILE, DATA])
def test_a_file_that_is_exchanged_after_it_was_checked_is_not_read(folder, name, by):
    with torch.no_grad():
        before = open_onnx(folder)(input_ids=IDS).logits
    stored = read_checked_onnx(folder)
    (folder / name).unlink()
    if by == "another file":
        (folder / name).write_bytes(b"\0" * 100_000)
    elif by == "a link":
        (folder / name).symlink_to("/dev/zero")
    elif by == "a pipe":
        os.mkfifo(folder / name)
    assert torch.equal(logits(Session(folder / FILE, stored, 1)), before)
    assert any(
        float(tensor.abs().max()) > 0 for tensor in load_initializers(folder, stored).values() if tensor.numel() > 9
    )


def changed(folder, change) -> None:
    model = onnx.load(folder / FILE, load_external_data=False)
    change(model)
    (folder / FILE).write_bytes(model.SerializeToString())


def into_a_branch(model, domain, op):
    branch = onnx.helper.make_graph([onnx.helper.make_node(op, [], ["y"], domain=domain)], "b", [], [])
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    model.graph.node.append(node)


@pytest.mark.parametrize(
    ("domain", "op"),
    [
        ("com.microsoft", "EPContext"),
        ("com.microsoft", "PyOp"),
        ("com.microsoft.experimental", "MatMul"),
        ("com.microsoft.nchwc", "Conv"),
        ("ai.onnx.contrib", "PyOp"),
        ("ai.onnx.ml", "LabelEncoder"),
        ("ai.onnx.preview.training", "Gradient"),
        ("custom", "MatMul"),
    ],
)
@pytest.mark.parametrize("place", ["graph", "branch"])
def test_an_op_that_effc_does_not_write_is_refused(folder, domain, op, place):
    def put(model):
        if place == "branch":
            return into_a_branch(model, domain, op)
        model.graph.node.append(onnx.helper.make_node(op, [], ["y"], domain=domain))

    changed(folder, put)
    with pytest.raises(Reject, match=f"calls ops of {domain}"):
        read_checked_onnx(folder)


@pytest.mark.parametrize("domain", ["custom", "ai.onnx.contrib"])
def test_a_domain_that_is_only_declared_is_refused(folder, domain):
    changed(folder, lambda model: model.opset_import.append(onnx.helper.make_opsetid(domain, 1)))
    with pytest.raises(Reject, match=f"calls ops of {domain}"):
        read_checked_onnx(folder)


def outside(location: str = "../../secret.bin"):
    """A tensor of 8 bytes whose numbers lie in another file."""
    tensor = onnx.TensorProto(name="s", dims=[8], data_type=onnx.TensorProto.UINT8)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "8"}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def sparse():
    indices = onnx.helper.make_tensor("i", onnx.TensorProto.INT64, [8], range(8))
    return onnx.SparseTensorProto(values=outside(), indices=indices, dims=[8])


def with_attribute(model, **fields):
    """A node `Constant` whose one attribute has these fields."""
    node = model.graph.node.add(op_type="Constant", output=["spelled"])
    node.attribute.add(name="sparse_value", **fields)


CLASS_PATHS = {
    "a sparse attribute": lambda m: with_attribute(m, sparse_tensor=sparse(), type=11),
    "one of several sparse attributes": lambda m: with_attribute(m, sparse_tensors=[sparse()], type=12),
    "a sparse initializer": lambda m: m.graph.sparse_initializer.append(sparse()),
    "an attribute": lambda m: with_attribute(m, t=outside(), type=4),
    "one of several attributes": lambda m: with_attribute(m, tensors=[outside()], type=9),
    "a branch": lambda m: with_attribute(m, g=onnx.GraphProto(initializer=[outside()]), type=5),
    "a sparse attribute in a branch": lambda m: with_attribute(
        m, g=onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["y"], sparse_value=sparse())], "b", [], [])
    ),
    "training": lambda m: m.training_info.add(initialization=onnx.GraphProto(initializer=[outside()])),
    "a function": lambda m: m.functions.add(
        name="f", node=[onnx.helper.make_node("Constant", [], ["y"], sparse_value=sparse())]
    ),
    "a default of a function": lambda m: m.functions.add(
        name="f", attribute_proto=[onnx.helper.make_attribute("value", outside())]
    ),
}


@pytest.mark.parametrize("place", CLASS_PATHS)
def test_a_tensor_that_lies_in_another_file_is_refused_wherever_the_message_has_it(folder, place):
    changed(folder, CLASS_PATHS[place])
    with pytest.raises(Reject, match=r"model\.onnx (has|calls)"):
        read_checked_onnx(folder)


@pytest.mark.parametrize("message", ["SparseTensorProto", "FunctionProto", "TrainingInfoProto"])
def test_the_places_above_are_all_that_the_schema_has(message):
    """A newer schema with another way to a tensor fails here, until the list above tries it."""
    schema = onnx.TensorProto.DESCRIPTOR.file.message_types_by_name
    ways = {
        f"{kind}.{field.name}"
        for kind, entry in schema.items()
        for field in entry.fields
        if field.message_type is not None and field.message_type.name in ("TensorProto", message)
    }
    known = {"SparseTensorProto.values", "SparseTensorProto.indices", "AttributeProto.t", "AttributeProto.tensors",
             "GraphProto.initializer", "AttributeProto.sparse_tensor", "AttributeProto.sparse_tensors",
             "GraphProto.sparse_initializer", "ModelProto.functions", "ModelProto.training_info"}  # fmt: skip
    assert ways <= known


def test_a_tensor_in_the_graph_that_also_names_a_file_is_refused(folder):
    def change(model):
        inside = next(t for t in model.graph.initializer if t.data_location != t.EXTERNAL)
        inside.external_data.add(key="location", value="../../secret.bin")

    changed(folder, change)
    with pytest.raises(Reject, match="both inside and in another file"):
        read_checked_onnx(folder)


def test_a_field_that_the_schema_does_not_have_is_refused_as_another_reader_may_know_it(folder):
    graph = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(graph + bytes([0xBA, 0x3E, 1, 7]))  # field 999 of the model, one byte long
    with pytest.raises(Reject, match="fields that are not of ONNX"):
        read_checked_onnx(folder)


def with_codes(model, shapes=None, branch: bool = False, **stated) -> None:
    """A product of four outputs and 40 inputs in blocks of 16; `shapes` and `stated` change what the file says."""
    dims = {"codes": [4, 3, 8], "scales": [4, 3], "zero": [4, 2], **(shapes or {})}
    kinds = {"codes": onnx.TensorProto.UINT8, "scales": onnx.TensorProto.FLOAT, "zero": onnx.TensorProto.UINT8}
    facts = {"K": 40, "N": 4, "bits": 4, "block_size": 16, "accuracy_level": 0, **stated}
    facts = {name: value for name, value in facts.items() if value is not None}
    node = onnx.helper.make_node("MatMulNBits", ["a", *dims], ["y"], domain="com.microsoft", **facts)
    for name, shape in dims.items():
        model.graph.initializer.append(
            onnx.helper.make_tensor(name, kinds[name], shape, bytes(prod(shape) * (4 if name == "scales" else 1)), True)
        )
    if branch:
        graph = onnx.helper.make_graph([node], "b", [], [])
        model.graph.node.append(onnx.helper.make_node("If", ["c"], ["y"], then_branch=graph, else_branch=graph))
    else:
        model.graph.node.append(node)


def test_codes_of_the_sizes_that_a_file_states_are_read(folder):
    changed(folder, with_codes)
    assert read_checked_onnx(folder).operators["MatMulNBits"] == 1


@pytest.mark.parametrize(
    "odd",
    [
        {"shapes": {"codes": [4, 3, 4]}},
        {"shapes": {"codes": [3, 3, 8]}},
        {"shapes": {"scales": [4, 2]}},
        {"shapes": {"scales": [12]}},
        {"shapes": {"zero": [4, 1]}},
        {"K": 400},
        {"K": 0},
        {"K": -16},
        {"N": 1 << 40},
        {"bits": 2},
        {"bits": 8},
        {"block_size": 24},
        {"block_size": 512},
        {"accuracy_level": 9},
        {"accuracy_level": None},
        {"weight_prepacked": 1},
    ],
    ids=str,
)
def test_codes_of_other_sizes_than_a_file_states_are_refused_before_onnx_runtime_packs_them(folder, odd):
    changed(folder, lambda model: with_codes(model, **odd))
    with pytest.raises(Reject, match="weights of MatMulNBits of other sizes"):
        read_checked_onnx(folder)


def test_codes_that_are_no_constants_of_the_graph_are_refused(folder):
    def variable(model):
        with_codes(model)
        model.graph.input.append(onnx.helper.make_tensor_value_info("codes", onnx.TensorProto.UINT8, [4, 3, 8]))

    def twice(model):
        with_codes(model)
        model.graph.initializer.append(onnx.helper.make_tensor("codes", onnx.TensorProto.UINT8, [1], b"0", True))

    honest = (folder / FILE).read_bytes()
    for change in (variable, twice):
        (folder / FILE).write_bytes(honest)
        changed(folder, change)
        with pytest.raises(Reject, match="weights of MatMulNBits of other sizes"):
            read_checked_onnx(folder)


def test_codes_inside_of_a_branch_are_refused(folder):
    changed(folder, lambda model: with_codes(model, branch=True))
    with pytest.raises(Reject, match="MatMulNBits inside of a branch"):
        read_checked_onnx(folder)
