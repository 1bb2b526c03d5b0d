"""Files that anybody may have written are refused with their fault and a short reason, whatever reading them raises."""

import json

import pytest
from effc.compiler.core.json_errors import reject_on_error
from effc.compiler.core.safe_read import MIB, parse_strict_json, read_json
from effc.dsl.syntax.diagnostics import Fault, Reject
from safetensors import safe_open

torn = Fault("torn-file", "A file is torn.")


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda folder: read_json(folder / "none.json", MIB), "no such file or directory"),
        (lambda folder: parse_strict_json('{"a": 1,}'), "it breaks at line 1, column"),
        (lambda folder: parse_strict_json(b"\xff"), "byte 0 is not UTF-8"),
        (lambda folder: json.loads("[" * 100_000), "it is nested too deep"),
        (lambda folder: {}["steps"], "it has no `steps`"),
        (lambda folder: int("x\ny"), "invalid literal for int()"),
        (lambda folder: safe_open(folder / "torn", "pt"), "Error while deserializing header"),
    ],
    ids=["absent", "torn", "bytes", "deep", "key", "value", "tensors"],
)
def test_a_file_of_another_form_is_refused_with_the_reason_on_one_line(read, reason, tmp_path):
    (tmp_path / "torn").write_bytes(b"\x05" * 9)
    with pytest.raises(Reject) as refused, reject_on_error(torn, "x.json holds nothing", "fetch it again"):
        read(tmp_path)
    (diagnostic,) = refused.value.diagnostics
    assert diagnostic.fault is torn and diagnostic.help == "fetch it again"
    assert diagnostic.message.startswith(f"x.json holds nothing: {reason}") and "\n" not in diagnostic.message


@pytest.mark.parametrize("error", [AssertionError("ours"), KeyboardInterrupt(), Reject(torn("another"))])
def test_mistakes_of_our_own_are_not_taken_for_a_files(error):
    with pytest.raises(type(error)) as raised, reject_on_error(torn, "x.json"):
        raise error
    assert raised.value is error


def test_errors_of_a_library_are_named_where_it_is_called():
    with pytest.raises(ZeroDivisionError), reject_on_error(torn, "x.json", error_types=RuntimeError):
        _ = 1 / 0
    with pytest.raises(Reject), reject_on_error(torn, "x.json", error_types=RuntimeError):
        raise RuntimeError("sizes differ")
