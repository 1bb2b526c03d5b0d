"""Files of a native artifact that were cut, changed or exchanged: a sentence, never a crash and never silence."""

import copy
import ctypes
import hashlib
import json
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.layers.linear import KernelLinear
from effc.compiler.runtimes.native import plan_files
from effc.compiler.runtimes.native.opening import open_native, verify_weight_contents
from effc.compiler.runtimes.native.plan_files import PLAN, WEIGHTS, read_plan, write_plan
from effc.compiler.runtimes.native.reader import Reader
from effc.dsl.syntax.diagnostics import Reject
from effc.kernels import levels
from effc.kernels.native import KernelError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import tiny

torch.set_num_threads(1)
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small artifact with packed layers of every kind: its two files as bytes."""
    model = tiny.model("llama", num_hidden_layers=1, tie_word_embeddings=True)
    layer = model.model.layers[0]
    for part, name, kernel in (
        (layer.self_attn, "q_proj", "sparse_linear"),
        (layer.mlp, "up_proj", "sparse_linear_int8"),
        (layer.mlp, "gate_proj", "block_sparse_linear"),
        (layer.mlp, "down_proj", "dense_linear_int8"),
    ):
        linear = getattr(part, name)
        linear.weight.data *= torch.rand(linear.weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
        setattr(part, name, KernelLinear.of(linear, kernel))
    folder = tmp_path_factory.mktemp("native")
    write_plan(Reader(capture(model), "bf16").build_plan(), folder, {"class": "X", "model_type": "llama", "params": 1})
    return (folder / PLAN).read_bytes(), (folder / WEIGHTS).read_bytes()


def put(folder, plan, weights):
    (folder / PLAN).write_bytes(plan)
    (folder / WEIGHTS).write_bytes(weights)
    return folder


def refused(folder, **options):
    with pytest.raises(Reject) as refusal:
        open_native(folder, **options)
    (said,) = refusal.value.diagnostics
    assert said.fault.slug == "native-damaged" and said.fault.exit == "environment"
    return said.message


def opens(folder):
    """Whether it opens, and then computes without harm; else it was refused by a sentence."""
    try:
        model = open_native(folder)
    except Reject as refusal:
        assert all(d.fault.slug == "native-damaged" for d in refusal.diagnostics)
        return False
    assert model(IDS).logits.shape[:2] == IDS.shape
    return True


def test_what_was_written_opens(whole, tmp_path):
    assert opens(put(tmp_path, *whole))
    assert torch.equal(open_native(tmp_path, mapped=True)(IDS).logits, open_native(tmp_path)(IDS).logits)
    assert maps(tmp_path, open_native(tmp_path, mapped=True)) and not maps(tmp_path, open_native(tmp_path))


def test_weights_of_more_than_a_quarter_of_the_memory_are_mapped_unless_said_otherwise(whole, tmp_path, monkeypatch):
    folder = put(tmp_path, *whole)
    size = len(whole[1])
    for memory, mapped in ((3 * size, True), (5 * size, False), (None, False)):
        monkeypatch.setattr("effc.compiler.core.memory.total_memory_bytes", lambda memory=memory: memory)
        assert maps(folder, open_native(folder)) == mapped
        assert not maps(folder, open_native(folder, mapped=False))


def maps(folder, model):
    """Whether a model's weights lie in its file."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    ranges = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    spans = [tuple(int(end, 16) for end in row[0].split("-")) for row in ranges]
    places = [w.data_ptr() for w in model.weights.buffers()]
    return all(any(begin <= place < end for begin, end in spans) for place in places)


@pytest.mark.parametrize("at", [4096, 9001])
def test_mapped_weights_are_held_against_their_checksums_unless_they_are_believed(whole, tmp_path, at):
    plan, weights = whole
    changed = bytearray(weights)
    entry = json.loads(plan)["entries"]["model.layers.0.self_attn.q_proj.weight"]
    changed[entry["at"] + entry["bytes"] - 1 - at % 64] ^= 4
    assert "q_proj" in refused(put(tmp_path, plan, bytes(changed)), mapped=True)


@FUZZ
@given(keep=st.integers(0, 10**6))
def test_weights_that_were_cut_are_refused(whole, tmp_path, keep):
    plan, weights = whole
    keep %= len(weights)
    assert "weights.bin" in refused(put(tmp_path, plan, weights[:keep]))


@FUZZ
@given(at=st.integers(0, 10**7), bit=st.integers(0, 7))
def test_a_flipped_bit_of_a_weight_is_refused(whole, tmp_path, at, bit):
    """Of a packed one, an embedding, a norm or a table."""
    plan, weights = whole
    entries = list(json.loads(plan)["entries"].values())
    entry = entries[at % len(entries)]
    where = entry["at"] + at // len(entries) % entry["bytes"]
    changed = bytearray(weights)
    changed[where] ^= 1 << bit
    said = refused(put(tmp_path, plan, bytes(changed)))
    assert "can't be used" in said or "do not match their checksum" in said


def test_every_piece_of_a_large_weight_has_a_hash(monkeypatch):
    monkeypatch.setattr(plan_files, "PIECE", 64)
    weight = torch.arange(40.0)  # 160 bytes: pieces of 64, 64 and 32
    parts = plan_files.pieces(memoryview(weight.numpy()).cast("B"))
    entry = {"sha256": [hashlib.sha256(part).hexdigest() for part in parts]}
    verify_weight_contents({"w": weight}, {"w": entry}, 2)
    verify_weight_contents(
        {"w": weight}, {"w": {"sha256": hashlib.sha256(weight.numpy()).hexdigest()}}, 2
    )  # as it was written once
    for at in (0, 16, 39):
        other = weight.clone()
        other[at] += 1
        with pytest.raises(KernelError, match=r"`w`: .* checksum"):
            verify_weight_contents({"w": other}, {"w": entry}, 2)
    for said in (entry["sha256"][:2], [], None, 7, entry["sha256"][::-1]):
        with pytest.raises(KernelError):
            verify_weight_contents({"w": weight}, {"w": {"sha256": said}}, 1)


@FUZZ
@given(at=st.integers(0, 10**7), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_never_breaks_the_process(whole, tmp_path, at, bit):
    plan, weights = whole
    changed = bytearray(weights)
    changed[at % len(weights)] ^= 1 << bit
    opens(put(tmp_path, plan, bytes(changed)))


def _places(value, path=()):
    """Every place of a JSON tree."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from _places(part, (*path, key))


ODD = [None, -1, 0, 1, 3, 2**31, 2**62, 2**64, 1e308, "", "x", True, [], {}, [0], float("inf")]


@FUZZ
@given(pick=st.integers(0, 10**6), value=st.sampled_from(ODD), drop=st.booleans())
def test_a_plan_with_another_value_anywhere_never_breaks_the_process(whole, tmp_path, pick, value, drop):
    plan, weights = whole
    body = json.loads(plan)
    *path, last = [p for p in _places(body) if p][pick % (sum(1 for _ in _places(body)) - 1)]
    parent = body
    for key in path:
        parent = parent[key]
    if drop:
        del parent[last]
    else:
        parent[last] = copy.deepcopy(value)
    opens(put(tmp_path, json.dumps(body).encode(), weights))


@pytest.mark.parametrize(
    "change,said",
    [
        (lambda b: b["facts"].update(version=2), "format 2, and this effc reads 1"),
        (lambda b: b["facts"].update(byte_order="big"), "big-endian byte order, and this one is little-endian"),
        (lambda b: b["facts"].update(isa="avx9"), "asks for the instruction set 'avx9', which this effc does not know"),
        (lambda b: b["facts"].update(isa=["avx2"]), "which this effc does not know"),
        (lambda b: b["plan"].update(version=9), "version is 9"),
        (lambda b: b["entries"]["lm_head.weight"].update(at=2**40), "leaves the"),
        (lambda b: b["entries"]["lm_head.weight"].update(bytes=2**62), "leaves the"),
        (
            lambda b: b["entries"]["model.norm.weight"].update(shape=[2**31, 2**31]),
            "not [2147483648, 2147483648] numbers",
        ),
        (lambda b: b["entries"]["model.norm.weight"].update(kind="f64"), "unknown kind 'f64'"),
        (lambda b: b["entries"].pop("lm_head.weight"), "its `table` is 'lm_head.weight'"),
        (lambda b: b["plan"]["steps"].pop(1), "its `x` is 1"),
        (lambda b: b["plan"]["registers"].__setitem__(0, 65), "its rows have 64 numbers, and register 0 has 65"),
        (lambda b: b.pop("entries"), "lacks a field"),
    ],
)
def test_a_plan_says_what_is_wrong_with_it(whole, tmp_path, change, said):
    body = json.loads(whole[0])
    change(body)
    assert said in refused(put(tmp_path, json.dumps(body).encode(), whole[1]))


@pytest.mark.parametrize(
    "at,bytes,said",
    [
        (0, b"safetens", "does not begin as"),
        (8, b"\x01\x02\x03\x04", "other byte order"),
        (12, b"\x07", "format 7, and this effc reads 1"),
        (16, struct.pack("q", 2**61), "its header says 2305843009213693952"),
    ],
)
def test_a_header_of_weights_says_what_is_wrong_with_it(whole, tmp_path, at, bytes, said):
    plan, weights = whole
    assert said in refused(put(tmp_path, plan, weights[:at] + bytes + weights[at + len(bytes) :]))


def test_missing_files_and_text_that_is_no_json_are_refused(whole, tmp_path):
    assert "no such file" in refused(tmp_path)
    assert "is no JSON" in refused(put(tmp_path, whole[0][:100], whole[1]))
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / PLAN).write_bytes(whole[0])
    assert "no such file" in refused(tmp_path)


@pytest.mark.parametrize("field", [24, 32, 48, 56, 64, 88, 96])  # n, k, blocks, tiles, two sections, bytes
def test_sizes_in_a_packed_header_that_overflow_are_refused_even_where_files_are_believed(whole, tmp_path, field):
    plan, weights = whole
    at = json.loads(plan)["entries"]["model.layers.0.self_attn.q_proj.weight"]["at"] + field
    put(tmp_path, plan, weights[:at] + struct.pack("q", 2**62) + weights[at + 8 :])
    assert "q_proj" in refused(tmp_path) and "can't be used" in refused(tmp_path, mapped=True, skip_checks=True)


def test_a_mask_that_disagrees_with_its_values_is_refused_though_the_checksum_is_right(whole, tmp_path):
    plan, weights = whole
    entry = json.loads(plan)["entries"]["model.layers.0.self_attn.q_proj.weight"]
    own = bytearray(weights[entry["at"] : entry["at"] + entry["bytes"]])
    stream = struct.unpack_from("q", own, 88)[0]
    own[stream] ^= 1
    raw = torch.frombuffer(own, dtype=torch.uint8)
    levels.load_library().effc_seal_for_tests(ctypes.c_void_p(raw.data_ptr()), ctypes.c_int64(len(own)))
    changed = weights[: entry["at"]] + bytes(own) + weights[entry["at"] + entry["bytes"] :]
    said = refused(put(tmp_path, plan, changed))
    assert "q_proj" in said and "masks do not agree" in said


@pytest.mark.slow
def test_a_level_that_is_not_here_is_one_sentence_and_its_exit_code(whole, tmp_path):
    put(tmp_path, *whole)
    missing = next((name for name in levels.NAMES if name not in levels.available_levels()), None)
    if missing is None:
        pytest.skip("this machine has every level")
    code = (
        "from pathlib import Path; from effc.compiler.runtimes.native.opening import open_native; "
        f"open_native(Path({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"EFFC_ISA": missing})
    assert done.returncode == 1 and f"EFFC_ISA is {missing}" in done.stderr.splitlines()[-1]


def test_two_threads_share_a_model_one_after_the_other(whole, tmp_path):
    model = open_native(put(tmp_path, *whole), max_sequences=3)
    ids = torch.arange(3, 103)[None]
    wanted, found = model(ids).logits, []
    threads = [threading.Thread(target=lambda: found.extend(model(ids).logits for _ in range(30))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 90 and all(torch.equal(logits, wanted) for logits in found)
    assert model.num_free_sequences == 3


def test_what_is_read_lies_where_the_table_says(whole, tmp_path):
    stored = read_plan(put(tmp_path, *whole))
    for entry in stored.entries.values():
        assert entry["at"] % 64 == 0 and entry["at"] + entry["bytes"] <= len(whole[1])


@pytest.mark.parametrize("said", ["\udcff", 0, True, 7, None, 2**40])
def test_a_vocabulary_that_is_no_number_or_not_that_of_the_logits_is_refused(whole, tmp_path, said):
    plan, weights = whole
    body = json.loads(plan)
    body["plan"]["vocabulary"] = said
    assert "vocabulary" in refused(put(tmp_path, json.dumps(body).encode(), weights))
