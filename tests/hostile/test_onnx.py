"""What runs of an ONNX file are the bytes that were checked, and only ops that effc writes."""

import os
import tarfile

import pytest
import torch
from effc.compiler.onnx.checking import DATA, FILE, check, weights
from effc.compiler.onnx.model import Session, open_onnx
from effc.dsl.diagnostics import Reject

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
    stored = check(folder)
    (folder / name).unlink()
    if by == "another file":
        (folder / name).write_bytes(b"\0" * 100_000)
    elif by == "a link":
        (folder / name).symlink_to("/dev/zero")
    elif by == "a pipe":
        os.mkfifo(folder / name)
    assert torch.equal(logits(Session(folder / FILE, stored, 1)), before)
    assert any(float(tensor.abs().max()) > 0 for tensor in weights(folder, stored).values() if tensor.numel() > 9)


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
        check(folder)


@pytest.mark.parametrize("domain", ["custom", "ai.onnx.contrib"])
def test_a_domain_that_is_only_declared_is_refused(folder, domain):
    changed(folder, lambda model: model.opset_import.append(onnx.helper.make_opsetid(domain, 1)))
    with pytest.raises(Reject, match=f"calls ops of {domain}"):
        check(folder)
