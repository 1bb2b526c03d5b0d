"""What Python says of the compiled code equals what its sources declare: ops, structures, signatures, answers."""

import ctypes
import re
from pathlib import Path

import pytest
from effc.compiler.runtimes.native import plan
from effc.kernels import engine_steps, levels, native, packed

SOURCES = Path(native.__file__).resolve().parent / "src"
PLAN_H = (SOURCES / "engine" / "plan.h").read_text(encoding="utf-8")
LEVELS_H = (SOURCES / "levels.h").read_text(encoding="utf-8")
CTYPES = {"int32_t": ctypes.c_int32, "uint32_t": ctypes.c_uint32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


def bare(text: str) -> str:
    """C++ without comments and line ends."""
    return " ".join(re.sub(r"//[^\n]*", "", text).split())


def enumerated(text: str, name: str) -> list[str]:
    """The names of an enum, without their `k` and in lower case with underscores: kAddVector is add_vector."""
    body = re.search(rf"enum {name} : \w+ {{(.*?)}}", bare(text))[1]
    return [
        re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", n.split("=")[0].strip().removeprefix("k")).lower()
        for n in body.split(",")
    ]


def fields(name: str) -> list[tuple[str, str]]:
    """(name, type) of every field of a structure of plan.h."""
    body = re.search(rf"struct {name} {{(.*?)}};", bare(PLAN_H))[1]
    found = []
    for line in filter(None, map(str.strip, body.split(";"))):
        kind, names = re.fullmatch(r"((?:const )?\w+ ?\*?) ?(.*)", line).groups()
        found += [(n.strip(), kind.replace(" ", "")) for n in names.split(",")]
    return found


def test_ops_are_numbered_as_the_header_numbers_them():
    assert enumerated(PLAN_H, "Op") == list(engine_steps.OPS)
    assert enumerated(PLAN_H, "Act") == engine_steps.STEPS["act"]["kind"].split()
    assert enumerated(PLAN_H, "Router") == ["softmax", "logistic", "near", "logits"]  # `sigmoid` is an activation there
    assert enumerated(PLAN_H, "Norm") == engine_steps.STEPS["norm"]["kind"].split()
    assert set(engine_steps.OPS) - set(engine_steps.STEPS) == {"angles", "place"}  # made while a plan is laid out
    assert set(engine_steps.STEPS) - set(engine_steps.OPS) == {"join"}  # becomes `place`
    first = engine_steps.OPS.index("convolve")
    assert "step.op >= kConvolve" in PLAN_H and engine_steps.OPS[first:] == engine_steps.STATEFUL


def test_kernels_of_packed_weights_are_numbered_as_the_header_numbers_their_kinds():
    text = (SOURCES / "packed.h").read_text(encoding="utf-8").replace("\\\n", " ")
    rows = re.findall(r"each\((\w+), (\w+), \w+, \w+\)", text)
    said = [m for file in SOURCES.glob("*.cc") for m in re.findall(r"EFFC_LINEAR\((\w+), (\w+)\)", file.read_text())]
    assert sorted(said) == sorted(rows) and len(dict(rows)) == len(rows)
    assert {kernel: place for place, (kernel, _) in enumerate(rows, start=1)} == packed.KINDS
    assert "enum Kind : uint32_t { kNoKind, EFFC_LINEARS(EFFC_KIND) kKinds };" in text


def test_kinds_that_stored_buffers_have_keep_their_numbers():
    assert list(packed.KINDS)[:7] == [
        "dense_linear",
        "sparse_linear",
        "dense_linear_int8",
        "sparse_linear_int8",
        "block_sparse_linear",
        "dense_linear_int4",
        "dense_linear_int8_int16",
    ]


@pytest.mark.parametrize("name", ["Step", "Weight", "Slot", "Plan"])
def test_a_structure_has_the_fields_of_the_header_in_their_order(name):
    declared, ours = fields(name), getattr(engine_steps, name)._fields_
    padding = {"zero"} if name == "Plan" else set()  # where the compiler leaves room by itself
    assert [n for n, _ in declared] == [n for n, _ in ours if n not in padding]
    kinds = dict(declared)
    for field, kind in ours:
        if field not in padding:
            wanted = CTYPES.get(kinds[field])
            assert kind is wanted if wanted else kind is ctypes.c_void_p or issubclass(kind, ctypes._Pointer), field


def test_every_op_of_a_plan_is_known_by_its_fields():
    for op, kinds in engine_steps.STEPS.items():
        step = {"op": op, "to": 9} | {name: [1, 2] if kind in ("R", "W") else 1 for name, kind in kinds.items()}
        reads = [n for n, kind in kinds.items() if kind in ("r", "r?", "R")]
        assert len(plan.registers_read_by_step(step)) == sum(2 if kinds[n] == "R" else 1 for n in reads)
        assert plan.weights_read_by_step(step | dict.fromkeys(kinds, None)) == []
    assert plan.weights_read_by_step({"op": "linear", "to": 0, "x": 1, "weight": "w", "bias": None}) == ["w"]


# -- exported functions --------------------------------------------------------------------------------------


def exported() -> dict[str, list[type]]:
    """Argument types of every function that the sources export; those that a macro makes under each of its names."""
    found = {}
    files = {file: bare(file.read_text(encoding="utf-8").replace("\\\n", " ")) for file in SOURCES.rglob("*.[ch]*")}
    for text in files.values():
        for match in re.finditer(r"EFFC_API \w+ effc_([\w#]+)\((.*?)\)\s*[{;]", text):
            names = [match[1]]
            if "#" in match[1]:  # of `#define EFFC_LINEAR(name, kind)`, used elsewhere
                macro = re.findall(r"#define (EFFC_\w+)\(name", text[: match.start()])[-1]
                names = [n for other in files.values() for n in re.findall(rf"(?<!define ){macro}\((\w+)", other)]
            for name in names:
                types = [argument(a) for a in parts(match[2])]
                assert found.setdefault(name, types) == types, f"{name} is declared in two ways"
    return found


def parts(arguments: str) -> list[str]:
    return [a.strip() for a in arguments.split(",") if a.strip()]


def argument(declared: str) -> type:
    if "*" in declared:
        return ctypes.c_void_p
    return CTYPES[declared.removeprefix("const ").split()[0]]


def test_a_function_is_called_with_the_types_that_its_source_declares():
    declared = exported()
    apart = {"machine_level", "built", "seal_for_tests"}  # called without `native.function`
    assert declared.keys() - apart == native.ARGUMENTS.keys()
    for name, types in native.ARGUMENTS.items():
        assert list(types) == declared[name], name


def test_every_answer_of_the_compiled_code_has_a_sentence():
    names = enumerated(LEVELS_H, "Status")
    assert names[0] == "ok" and list(native.SENTENCES) == names[1:]
    assert all(native.SENTENCES.values())


def test_levels_are_numbered_as_the_header_numbers_them():
    assert enumerated(LEVELS_H, "Level") == [
        *(name.replace("amx_model", levels.MODEL) for name in levels.CODES),
        "levels",
    ]
