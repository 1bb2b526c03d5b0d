"""Operators of a stored program are public ones, and what they are given fits before they run."""

import json
import random
import signal
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from effc.compiler.artifacts import exported
from effc.compiler.artifacts.exported_ops import is_allowed_operator
from effc.dsl.syntax.diagnostics import Reject

torch.set_num_threads(1)
MODEL, CONSTANTS = "models/model.json", "data/constants/model_constants_config.json"
PRIVATE = {
    "__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "__iand__", "__ior__",
    "_assert_tensor_metadata", "_assert_scalar",
}  # fmt: skip


def overloads() -> list[str]:
    """Those of aten that a stored program may call."""
    names = sorted({s.name[6:] for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::")})
    every = [f"{name}.{overload}" for name in names for overload in getattr(torch.ops.aten, name).overloads()]
    return [name for name in every if is_allowed_operator(f"torch.ops.aten.{name}")]


def schema(name: str):
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload)._schema


def test_private_operators_are_those_that_exports_need():
    assert {n.partition(".")[0] for n in overloads() if n.startswith("_")} == PRIVATE


def test_operators_take_or_give_tensors_and_write_into_none_as_out():
    of_numbers = ("_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size")
    for name in (n for n in overloads() if not n.startswith(of_numbers)):
        parts = (*schema(name).arguments, *schema(name).returns)
        assert any("Tensor" in str(part.type) for part in parts) and not any(part.is_out for part in parts), name


@pytest.mark.parametrize(
    "name",
    [
        "_native_batch_norm_legit_no_training.default", "_scaled_dot_product_flash_attention_for_cpu.default",
        "_grouped_mm.default", "_softmax.default", "_reshape_alias.default", "_unsafe_view.default", "add.out",
        "remainder.int", "is_scripting.default", "to.prim_Device",
        "batch_norm_update_stats.default", "slow_conv_transpose2d.default",
    ],
)  # fmt: skip
def test_an_operator_that_leaves_its_memory_is_not_called(name):
    assert not is_allowed_operator(f"torch.ops.aten.{name}")


class Attends(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("keys", torch.ones(1, 2, 8, 4))
        self.register_buffer("values", torch.ones(1, 2, 8, 4))

    def forward(self, x):
        said = torch.nn.functional.scaled_dot_product_attention(x, self.keys, self.values)
        return said.to(torch.float64) + torch.full((4,), 1.0, dtype=torch.float64)


def written(folder: Path, net: torch.nn.Module, **inputs) -> dict[str, bytes]:
    """The files of the archive that the target writes."""
    rows = {name: {0: torch.export.Dim.AUTO} for name in inputs}
    exported.write_program_and_kernels(
        torch.export.export(net.eval(), (), inputs, dynamic_shapes=rows), tuple(inputs), folder, params=0
    )
    with zipfile.ZipFile(folder / exported.FILE) as archive:
        return {item.filename.partition("/")[2]: archive.read(item) for item in archive.infolist()}


@pytest.fixture
def attends(tmp_path):
    return written(tmp_path, Attends(), x=torch.ones(1, 2, 3, 4))


def with_json(files, name, change):
    body = json.loads(files[name])
    change(body)
    return files | {name: json.dumps(body).encode()}


def rewritten(folder: Path, files) -> Path:
    with zipfile.ZipFile(folder / exported.FILE, "w") as archive:
        for name, body in files.items():
            archive.writestr(f"model/{name}", body)
    return folder


def refused(call, said: str) -> None:
    with pytest.raises(Reject) as raised:
        call()
    assert raised.value.diagnostics[0].slug == "refused-program" and said in raised.value.diagnostics[0].message


def node(body, target):
    return next(n for n in body["graph_module"]["graph"]["nodes"] if target in n["target"])


@pytest.mark.parametrize("number", [1, 7, 99, 1 << 20, -1])
@pytest.mark.parametrize("target", ["aten.to.", "aten.full."])
def test_a_number_is_no_dtype(tmp_path, attends, target, number):
    """torch takes any integer where a schema has a type, and looks it up in a table of 40."""

    def change(body):
        (dtype,) = (i for i in node(body, target)["inputs"] if "as_scalar_type" in i["arg"])
        dtype["arg"] = {"as_int": number}

    rewritten(tmp_path, with_json(attends, MODEL, change))
    for reading in (exported.check_exported_folder, exported.load_exported_model):
        refused(lambda reading=reading: reading(tmp_path), "as `dtype`")


def shorter(name: str, length: int):
    """A buffer with fewer keys or values than there are, within its file and by all that is said of it."""

    def weights(body):
        body["config"][name]["tensor_meta"]["sizes"][2] = {"as_int": length}

    def model(body):
        body["graph_module"]["graph"]["tensor_values"][f"b_{name}"]["sizes"][2] = {"as_int": length}

    return weights, model


@pytest.mark.parametrize("name", ["keys", "values"])
def test_an_attention_whose_keys_and_values_differ_in_number_is_refused(tmp_path, attends, name):
    weights, model = shorter(name, 2)
    files = with_json(with_json(attends, "data/weights/model_weights_config.json", weights), MODEL, model)
    rewritten(tmp_path, files)
    for reading in (exported.check_exported_folder, exported.load_exported_model):
        refused(lambda reading=reading: reading(tmp_path), "an attention with keys")


def test_a_shape_that_is_stated_and_not_computed_is_refused(tmp_path, attends):
    def change(body):
        name = node(body, "scaled_dot_product_attention")["outputs"][0]["as_tensor"]["name"]
        body["graph_module"]["graph"]["tensor_values"][name]["sizes"][3] = {"as_int": 5}

    refused(
        lambda: exported.load_exported_model(rewritten(tmp_path, with_json(attends, MODEL, change))),
        "another shape or type",
    )


def test_weights_of_other_sizes_than_operators_take_are_refused_before_they_run(tmp_path):
    files = written(tmp_path, torch.nn.BatchNorm1d(300), input=torch.ones(2, 300, 3))

    def change(body):
        for name in ("running_mean", "running_var", "weight", "bias"):
            body["config"][name]["tensor_meta"]["sizes"] = [{"as_int": 2}]

    rewritten(tmp_path, with_json(files, "data/weights/model_weights_config.json", change))
    refused(lambda: exported.check_exported_folder(tmp_path), "batch_norm")


def test_sizes_of_a_call_are_checked_before_it_runs(tmp_path):
    """Of a program that says of an input that it is square, and multiplies it by a matrix of two rows."""

    class Multiplies(torch.nn.Module):
        def forward(self, x):
            return x @ torch.ones(2, 4)

    files = written(tmp_path, Multiplies(), x=torch.ones(2, 2))

    def change(body):
        sizes = body["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]
        sizes[1] = sizes[0]

    rewritten(tmp_path, with_json(files, MODEL, change))
    model = exported.load_exported_model(tmp_path)
    assert torch.equal(model(x=torch.ones(2, 2)), torch.full((2, 4), 2.0))
    refused(lambda: model(x=torch.ones(3, 3)), "does not fit")


def called(names: list[str], seed: int, tries: int) -> tuple[list[str], Counter]:
    """What ended a process, as the last lines before it, and how often calls came to what."""
    ended, counted, rest = [], Counter(), names
    while rest:
        command = [sys.executable, str(Path(__file__).with_name("overloads.py")), str(seed), str(tries), *rest]
        run = subprocess.run(command, capture_output=True, text=True)
        lines = run.stdout.splitlines()
        counted.update(line.split()[0] for line in lines)
        begun = [line.removeprefix("begin ") for line in lines if line.startswith("begin ")]
        assert begun, run.stderr
        if run.returncode == 0:
            break
        if run.returncode != -signal.SIGALRM:  # a program may be as slow as its author likes
            ended.append(f"{signal.Signals(-run.returncode).name} in {begun[-1]}: {lines[-1]}")
        rest = rest[rest.index(begun[-1]) + 1 :]
    return ended, counted


@pytest.mark.slow
def test_operators_that_pass_the_check_stay_in_their_memory():
    """A share of all overloads, other ones each time that the list changes; the heavy lot has all."""
    every = overloads()
    names = random.Random(len(every)).sample(every, 60)
    ended, counted = called([*names, "native_batch_norm.default", "batch_norm.default"], 0, 12)
    assert not ended
    assert counted["ran"] > 50 and counted["refused"] > 50


@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_all_operators_that_pass_the_check_stay_in_their_memory():
    ended, counted = called(overloads(), 1, 60)
    assert not ended
    assert counted["ran"] > 5000
