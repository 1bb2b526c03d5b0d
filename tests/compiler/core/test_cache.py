"""The cache gives back what was put in, shares equal tensors, and notices damage."""

import os

import pytest
import torch
from effc.compiler.core.cache import Cache, canonical_json_sha256, tensor_hash, write_atomic
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8]


@settings(max_examples=25)
@given(shape=st.lists(st.integers(0, 4), max_size=3), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_a_tensor_comes_back_bit_for_bit(tmp_path_factory, shape, dtype, seed):
    cache = Cache(tmp_path_factory.mktemp("cache"))
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)
    again = cache.load_verified_tensor(cache.store_tensor(tensor))
    assert again.dtype == dtype and torch.equal(again, tensor)


def test_a_tensor_from_the_cache_lies_where_torch_would_put_a_new_one(tmp_path):
    cache = Cache(tmp_path)
    for shape in ((3,), (7, 11), (1,), (130, 64), ()):
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
            tensor = torch.ones(shape).to(dtype)
            again = cache.load_verified_tensor(cache.store_tensor(tensor))
            assert torch.equal(again, tensor) and again.data_ptr() % 64 == torch.empty(64).data_ptr() % 64


def test_equal_tensors_are_kept_once_and_others_are_not_taken_for_them(tmp_path):
    cache = Cache(tmp_path)
    zeros = torch.zeros(4)
    assert cache.store_tensor(zeros) == cache.store_tensor(zeros.clone())
    assert cache.store_tensor(zeros) != cache.store_tensor(zeros.view(2, 2))
    assert cache.store_tensor(zeros) != cache.store_tensor(zeros.to(torch.int32))
    assert len(list((tmp_path / "blobs").glob("*/*"))) == 3


def finished(cache, key, **parts):
    parts = {"step": {"word": "prune.blocks"}, **parts}
    cache.write_step_record(
        key, parts, {"tensors": {"w": cache.store_tensor(torch.ones(2))}, "borrowed": {}, "edits": {}, "notes": {}}
    )
    return parts


def test_a_step_whose_tensor_is_gone_counts_as_unfinished(tmp_path):
    cache = Cache(tmp_path)
    finished(cache, "k", seed=0)
    assert cache.is_step_complete("k")
    cache.tensor_path(tensor_hash(torch.ones(2))).unlink()
    assert not cache.is_step_complete("k")


def test_why_names_the_first_part_that_differs(tmp_path):
    cache = Cache(tmp_path)
    parts = finished(cache, "k", input="a", seed=0)
    assert cache.cache_miss_reason({**parts, "seed": 1}) == "`seed` was 0 and is 1"
    step = {**parts["step"], "args": {"keep": 0.5, "on": None}}
    assert (
        cache.cache_miss_reason({**parts, "step": step, "input": "c"})
        == "no result of prune.blocks is kept for this model"
    )
    parts = finished(cache, "l", input="b", step=step, seed=0)
    told = cache.cache_miss_reason({**parts, "step": {**step, "args": {"keep": 0.75, "on": None}}})
    assert told == "`keep` was 0.5 and is 0.75"
    shares = [{"Ratio": {"value": 1.0, "of": None}}, {"Ratio": {"value": 0.5, "of": None}}]
    told = cache.cache_miss_reason({**parts, "step": {**step, "args": {"keep": shares, "on": None}}})
    assert told == "`keep` was 0.5 and is [100%, 50%]"
    told = cache.cache_miss_reason({**parts, "input": "c" * 64})
    assert told == "the cached results are of another model"
    assert cache.cache_miss_reason({**parts, "step": {"word": "prune.heads"}}) == "no result of prune.heads is kept"


def test_why_is_told_by_the_records_that_are_there_now(tmp_path):
    cache, record = Cache(tmp_path), tmp_path / "steps" / "k.json"
    parts = finished(cache, "k", input="a", seed=0)
    assert cache.cache_miss_reason({**parts, "seed": 2}) == "`seed` was 0 and is 2"
    finished(cache, "k", input="a", seed=1)
    assert Cache(tmp_path).cache_miss_reason({**parts, "seed": 2}) == "`seed` was 1 and is 2"
    whole = record.read_bytes()
    for content in (whole.replace(b'"seed": 1', b'"seed": 3').replace(b'"seed":1', b'"seed":3'), whole[:40], b"[]"):
        record.write_bytes(content)
        assert cache.cache_miss_reason(parts) == "no result of prune.blocks is kept"
    record.write_bytes(whole)
    assert cache.cache_miss_reason({**parts, "seed": 2}) == "`seed` was 1 and is 2"
    record.unlink()
    assert cache.cache_miss_reason(parts) == "no result of prune.blocks is kept"


def test_damage_is_found_and_said(tmp_path):
    cache = Cache(tmp_path)
    name = cache.store_tensor(torch.ones(64))
    blob = cache.tensor_path(name)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    assert [path for path, _ in cache.damaged_files_with_faults()] == [blob]
    blob.write_bytes(b"cut")
    with pytest.raises(Reject, match="cache-damaged"):
        cache.load_verified_tensor(name)


def test_collecting_drops_old_steps_and_the_tensors_that_no_step_names(tmp_path):
    cache = Cache(tmp_path)
    finished(cache, "k", seed=0)
    assert cache.evict_unused_and_count_bytes(keep_seconds=3600) == 0
    assert cache.is_step_complete("k")
    assert cache.evict_unused_and_count_bytes(keep_seconds=-1) > 0
    assert not list((tmp_path / "blobs").glob("*/*"))


def test_equal_values_have_one_digest_whatever_their_order():
    assert canonical_json_sha256({"a": 1, "b": [1.5, None]}) == canonical_json_sha256({"b": [1.5, None], "a": 1})


def test_a_draft_that_a_killed_run_left_goes_with_the_next_compile_and_one_being_written_stays(tmp_path):
    cache = Cache(tmp_path)
    old, new = tmp_path / "hashes" / "ab" / ".abcd.4711", tmp_path / "hashes" / "ab" / ".abce.4712"
    whole = tmp_path / "hashes" / "ab" / "abcd"
    for path in (old, new, whole):
        write_atomic(path, b"64 characters, some day")
    for path in (old, whole):
        os.utime(path, (0, 0))
    assert cache.delete_stale_drafts_and_count_bytes() == len(b"64 characters, some day")
    assert sorted(p.name for p in old.parent.iterdir()) == [".abce.4712", "abcd"]


def test_much_damage_is_counted_and_the_remedy_said_once(tmp_path, capsys):
    from effc.compiler.cli.main import main

    (tmp_path / "blobs/aa").mkdir(parents=True)
    for number in range(5):
        (tmp_path / "blobs/aa" / f"odd{number}").write_bytes(b"")
    assert main(["cache", "verify", "--cache-dir", str(tmp_path)]) == 5
    told = capsys.readouterr().err
    assert "5 files of the cache are damaged" in told and "and 2 more" in told and told.count("--delete") == 1
