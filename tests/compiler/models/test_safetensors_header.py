"""Headers of safetensors files are whole or refused; hashes of files are remembered only while they hold."""

import pytest
import torch
from effc.compiler.core import hashes
from effc.compiler.models.checkpoints.safetensors_header import FLOATS, read_safetensors_header
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests import worlds


@given(cut=st.integers(0, 400), patch=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=4))
@settings(max_examples=300, deadline=None)
def test_a_patched_header_is_refused_or_still_covers_the_file(tmp_path_factory, cut, patch):
    path = tmp_path_factory.mktemp("fuzz") / "m.safetensors"
    tensors = {"a": torch.zeros(3, 4), "b": torch.zeros(5).bfloat16(), "c": torch.tensor(1)}
    save_file(tensors, path, metadata={"format": "pt"})
    data = bytearray(path.read_bytes())
    for place, value in patch:
        data[place % len(data)] = value
    path.write_bytes(data[: len(data) - cut % len(data)] if cut else data)
    try:
        header = read_safetensors_header(path)
    except Reject as reject:
        assert [d.slug for d in reject.diagnostics] == ["damaged-weights"]
    else:
        assert header.begin + sum(s.end - s.start for s in header.slots.values()) == path.stat().st_size


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"\xff",
        b'{"a": 1}',
        b'{"a": {}}',
        b"[" * 10**5,
        b'{"__metadata__": 3}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": ['
        + b", ".join([b"4611686018427387904"] * 64)
        + b'], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_headers_that_are_none(tmp_path, header):
    path = worlds.write_safetensors(tmp_path / "m.safetensors", header, b"\0" * 4)
    assert worlds.slug(lambda: read_safetensors_header(path)) == "damaged-weights"


def test_a_header_agrees_with_the_library(tmp_path):
    folder = worlds.llama(tmp_path)
    header, stored = read_safetensors_header(folder / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {n: s.shape for n, s in header.slots.items()} == {n: tuple(t.shape) for n, t in stored.items()}
    assert {FLOATS[s.dtype] for s in header.slots.values()} == {"float32"}


# -- hashes --------------------------------------------------------------------------------------------------


def test_a_settled_file_is_hashed_once_and_a_changed_one_again(tmp_path, monkeypatch):
    path, kept = tmp_path / "f", tmp_path / "cache"
    path.write_bytes(b"one")
    monkeypatch.setattr(hashes, "SETTLED", -1.0)
    first = hashes.cached_file_hash(path, kept)
    monkeypatch.setattr(hashes.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert hashes.cached_file_hash(path, kept) == first
    monkeypatch.undo()
    path.write_bytes(b"other")
    assert hashes.cached_file_hash(path, kept) != first


def test_a_file_just_written_is_not_remembered(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"one")
    hashes.cached_file_hash(path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
