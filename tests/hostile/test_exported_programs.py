"""An exported program comes from anybody: it calls listed operators, and nothing of it is unpickled or compiled."""

import contextlib
import copy
import io
import json
import pickle
import time
import zipfile
from pathlib import Path

import pytest
import torch
from effc.compiler.artifacts import exported
from effc.compiler.artifacts.exported_ops import is_allowed_operator
from effc.dsl.syntax.diagnostics import Reject
from torch._export.serde.serialize import GraphModuleDeserializer

from tests.worlds import refused

torch.set_num_threads(1)
MODEL = "models/model.json"
WEIGHTS, CONSTANTS = (f"data/{kind}/model_{kind}_config.json" for kind in ("weights", "constants"))
SAMPLES = "data/sample_inputs/model.pt"


class Effect:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(4))

    def forward(self, x):
        return torch.relu(self.inner(x)) * self.table


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What the target writes of a small module: the files of its archive by name."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    program = torch.export.export(
        Net().eval(), (), {"x": torch.ones(2, 4)}, dynamic_shapes={"x": {0: torch.export.Dim.AUTO}}
    )
    exported.write_program_and_kernels(program, ("x",), folder, params=20)
    with zipfile.ZipFile(folder / exported.FILE) as archive:
        return {item.filename.partition("/")[2]: archive.read(item) for item in archive.infolist()}


@pytest.fixture
def reading(tmp_path):
    """Reads an archive of some files, which it stores as they are."""

    def read(files, compression=zipfile.ZIP_STORED):
        with zipfile.ZipFile(tmp_path / exported.FILE, "w", compression) as archive:
            for name, body in files.items():
                archive.writestr(f"model/{name}", body)
        return exported.load_exported_model(tmp_path)

    return read


def with_json(files, name, change):
    body = json.loads(files[name])
    change(body)
    return files | {name: json.dumps(body).encode()}


def refusal(call) -> str:
    found = refused(call).diagnostics[0]
    assert found.slug == "refused-program"
    return found.message


def test_what_is_written_is_read_and_computes_the_same(written, reading):
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    torch.manual_seed(0)
    assert torch.equal(reading(written)(x), Net()(x))


def test_a_written_program_has_no_pickle_and_names_no_files_of_its_author(written):
    assert written[SAMPLES] == b""
    assert b".py" not in written[MODEL] and str(Path.home()).encode() + b"/" not in written[MODEL]


def test_sample_inputs_are_not_unpickled(written, reading, tmp_path):
    reading(written | {SAMPLES: pickle.dumps(Effect(tmp_path / "effect"))})
    assert not (tmp_path / "effect").exists()


@pytest.mark.parametrize(
    ("broke", "kind"), [(MemoryError("none is left"), MemoryError), (KeyError("unsqueeze_31"), Reject)]
)
def test_what_stops_torch_is_told_and_a_want_of_memory_is_no_fault_of_the_program(
    written, reading, monkeypatch, broke, kind
):
    def deserialize(*_):
        raise broke

    monkeypatch.setattr(GraphModuleDeserializer, "deserialize_node", deserialize)
    with pytest.raises(kind) as found:
        reading(written)
    if kind is Reject:
        assert found.value.diagnostics[0].note == "KeyError: 'unsqueeze_31'"


@pytest.mark.parametrize("table", [WEIGHTS, CONSTANTS])
def test_pickled_tensors_are_refused(written, reading, tmp_path, table):
    buffer = io.BytesIO()
    torch.save(Effect(tmp_path / "effect"), buffer)

    name = "weight_0" if table == WEIGHTS else "tensor_0"

    def change(body):
        body["config"] = {
            "inner.weight": {"path_name": name, "is_param": True, "use_pickle": True, "tensor_meta": None}
        }

    files = with_json(written, table, change) | {f"{table.rpartition('/')[0]}/{name}": buffer.getvalue()}
    assert "a tensor inner.weight of another form" in refusal(lambda: reading(files))
    assert not (tmp_path / "effect").exists()


@pytest.mark.parametrize(
    "name",
    [
        "data/weights/model.pt",
        "data/constants/model.pt",
        "data/constants/custom_obj_0",
        "data/constants/opaque_obj_0",
        "data/aotinductor/model/x.so",
        "../../escape",
        "models/other.json",
        "extra/other.txt",
        "data/weights/../weight_1",
    ],
)
def test_other_files_than_a_program_has_are_refused(written, reading, tmp_path, name):
    body = pickle.dumps(Effect(tmp_path / "effect"))
    assert "the file" in refusal(lambda: reading(written | {name: body}))
    assert not (tmp_path / "effect").exists()


def test_a_packed_archive_is_refused(written, reading):
    assert "packed" in refusal(lambda: reading(written, zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize(
    "target",
    [
        "torch.load",
        "torch.hub.load",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.set_.source_Tensor",
        "torch.ops.aten._print.default",
        "torch.ops.load_library",
        "torch.os.system",
        "torch.serialization.os.system",
        "_operator.attrgetter",
        "_operator.methodcaller",
        "math.factorial",
        "#namespace:op",
        "print",
        "torch._C._jit_pass",
        "torch.ops.higher_order.print",
        "torch.ops.effc.nothing.default",
        "torch.ops.aten.add.__class__",
        "builtins.eval",
        "torch.ops.aten.__class__.mro",
        "torch.ops.aten.resize_.default",
        "torch.ops.inductor.accumulate_grad_.default",
    ],
)
def test_only_listed_operators_are_called(written, reading, target):
    assert not is_allowed_operator(target)

    def change(body):
        body["graph_module"]["graph"]["nodes"][-1]["target"] = target

    assert "as `target`" in refusal(lambda: reading(with_json(written, MODEL, change)))


def product(levels: int) -> str:
    """Products of sums of such products: of 2**levels in one symbol."""
    if not levels:
        return "Symbol('s0')"
    inner = product(levels - 1)
    return f"Mul(Add({inner}, Symbol('s{levels}')), Add({inner}, Symbol('s{levels + 1}')))"


EXPRESSIONS = [
    "__import__('os').system('x')",
    "Symbol('s0').__class__",
    "exec('1')",
    "Integer(10)**10**10",
    "Pow(Integer(10), Integer(10000000000))",
    "Symbol('x' * 10**9)",
    "lambda: 0",
    "[i for i in (1,)]",
    "Symbol('s0', evil=True)",
    "Lambda(1, 2)",
    "S('1')",
    "factorial(Integer(99999999))",
    "Integer('9')",
    *(f"FloorDiv({product(n)}, Symbol('s1'))" for n in (4, 5, 6)),  # sympy multiplies them out: seconds, minutes, days
    f"FloorDiv({'Pow(Add(' * 4}Symbol('s0'){', Integer(1)), Integer(2))' * 4}, Symbol('s1'))",
    f"{'Add(' * 40}Symbol('s0'){', Integer(1))' * 40}",
    f"Max({', '.join(f'Integer({n})' for n in range(250))})",
]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_sizes_are_sums_of_symbols_and_numbers(written, reading, text):
    def change(body):
        body["graph_module"]["graph"]["sym_int_values"] = {"n": {"as_expr": {"expr_str": text, "hint": None}}}

    assert "as `expr_str`" in refusal(lambda: reading(with_json(written, MODEL, change)))


def test_an_expression_as_large_as_may_be_takes_no_time(written, reading):
    def change(body):
        text = f"FloorDiv({product(3)}, Symbol('s1'))"
        body["graph_module"]["graph"]["sym_int_values"] = {"n": {"as_expr": {"expr_str": text, "hint": None}}}

    started = time.process_time()
    with contextlib.suppress(Reject):
        reading(with_json(written, MODEL, change))
    assert time.process_time() - started < 10


def test_guards_that_are_code_are_not_run(written, reading, tmp_path):
    def change(body):
        body["guards_code"] = [f"__import__('pathlib').Path({str(tmp_path / 'effect')!r}).touch()"]

    reading(with_json(written, MODEL, change))(torch.ones(2, 4))
    assert not (tmp_path / "effect").exists()


CODE = "x=__import__('pathlib').Path('effect').touch()"


@pytest.mark.parametrize("place", ["name", "as_name", "spec", "forward", "table", "parameter"])
def test_names_are_names(written, reading, place):
    """torch writes names of arguments into Python code."""

    def change(body):
        graph, entry = body["graph_module"]["graph"], body["graph_module"]["module_call_graph"][0]["signature"]
        if place == "name":
            graph["inputs"][-1] = {"as_tensor": {"name": CODE}}
        elif place == "as_name":
            graph["outputs"] = [{"as_sym_int": {"as_name": CODE}}]
        elif place == "spec":
            spec = json.loads(entry["in_spec"])
            spec[1]["children_spec"][1] = {
                "type": "builtins.dict",
                "context": json.dumps([CODE]),
                "children_spec": [{"type": None, "context": None, "children_spec": []}],
            }
            entry["in_spec"] = json.dumps(spec)
        elif place == "forward":
            entry["forward_arg_names"] = [CODE]
        elif place == "table":
            graph["tensor_values"][CODE] = next(iter(graph["tensor_values"].values()))
        else:
            body["graph_module"]["signature"]["input_specs"][0]["parameter"]["parameter_name"] = CODE

    refusal(lambda: reading(with_json(written, MODEL, change)))


def test_a_tree_of_arguments_imports_nothing(written, reading):
    def change(body):
        spec = {
            "type": "collections.defaultdict",
            "children_spec": [],
            "context": json.dumps(
                {"default_factory_module": "os", "default_factory_name": "getcwd", "dict_context": []}
            ),
        }
        body["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps([1, spec])

    assert "as `in_spec`" in refusal(lambda: reading(with_json(written, MODEL, change)))


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": [{"as_int": 1 << 40}, {"as_int": 4}]},
        {"strides": [{"as_int": 1 << 30}, {"as_int": 1}]},
        {"storage_offset": {"as_int": 1}},
        {"storage_offset": {"as_int": -1}},
        {"dtype": 99},
        {"layout": 3},
        {"sizes": [{"as_expr": {"expr_str": "1", "hint": None}}, {"as_int": 4}]},
        {"device": {"type": "cuda"}},
        {"sizes": [{"as_int": 4}]},
    ],
    ids=str,
)
def test_a_tensor_lies_within_its_file(written, reading, change):
    def edit(body):
        body["config"]["inner.weight"]["tensor_meta"].update(copy.deepcopy(change))

    assert "a tensor inner.weight" in refusal(lambda: reading(with_json(written, WEIGHTS, edit)))


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{}", b"[" * 100_000, b"\xff", b'{"graph_module": 3}'])
@pytest.mark.parametrize("name", [MODEL, WEIGHTS, CONSTANTS, "extra/inputs.json"])
def test_json_of_another_form_is_refused(written, reading, name, text):
    if (name, text) == ("extra/inputs.json", b"[]"):
        return  # a program without inputs
    refusal(lambda: reading(written | {name: text}))


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    for body in (b"", b"PK\x03\x04", b"PK\x05\x06" + b"\0" * 18, b"x" * 1000):
        (tmp_path / exported.FILE).write_bytes(body)
        refusal(lambda: exported.load_exported_model(tmp_path))


@pytest.mark.parametrize("text", ['{"params": -1}', '{"params": true}', '{"params": 1e9}', "[]", "{}", "x", "\xff"])
def test_a_count_of_another_form_beside_a_program_is_refused(written, reading, tmp_path, text):
    (tmp_path / exported.FACTS).write_bytes(text.encode("latin1"))
    assert "states no number of params" in refusal(lambda: reading(written))
