"""Caches of query states: R5 of the digest, persistence, and files that are not what was written."""

import resource

import pytest
import torch
from effc.compiler.apps.rttc.caching import StateCache
from hypothesis import given
from hypothesis import strategies as st

ENTRY = 8 * 4 + 100 * 4  # bytes of what `put` below keeps


def unit(seed):
    return torch.nn.functional.normalize(torch.randn(8, generator=torch.Generator().manual_seed(seed)), dim=0)


def put(cache, seed):
    cache.put(unit(seed), {"a": torch.full((100,), float(seed))})


def found(cache, seed):
    state = cache.find_nearest(unit(seed))
    return None if state is None else int(state["a"][0])


@given(seeds=st.lists(st.integers(0, 20), max_size=30), probe=st.integers(0, 99))
def test_above_one_nothing_is_found_and_at_minus_one_always_the_nearest(seeds, probe):
    never, always = StateCache("x", 1.0001, 10**6), StateCache("x", -1.0001, 10**6)
    for seed in seeds:
        put(never, seed)
        put(always, seed)
    assert found(never, probe) is None
    if seeds:
        best = max(float(unit(s) @ unit(probe)) for s in seeds)
        assert float(unit(found(always, probe)) @ unit(probe)) == pytest.approx(best, abs=1e-6)


@given(
    turns=st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60),
    room=st.integers(0, 5),
    eviction=st.sampled_from(["lfu", "lru"]),
)
def test_what_is_evicted_is_what_a_plain_list_evicts_and_the_bytes_are_never_passed(turns, room, eviction):
    cache = StateCache("x", 0.9999, room * ENTRY + 7, eviction)
    plain: list[list] = []  # [seed, used, touched, made]
    for turn, (puts, seed) in enumerate(turns, 1):
        if puts:
            put(cache, seed)
            if room:
                while len(plain) >= room:
                    plain.remove(min(plain, key=lambda e: (e[1] if eviction == "lfu" else e[2], e[3])))
                plain.append([seed, 0, turn, turn])
        else:
            hit = next((e for e in plain if e[0] == seed), None)
            assert found(cache, seed) == (seed if hit else None)
            if hit:
                hit[1:3] = [hit[1] + 1, turn]
        assert cache.n_bytes <= cache.max_bytes and len(cache) == len(plain)


def test_states_counts_and_order_are_there_after_a_restart(tmp_path):
    first = StateCache("x", 0.999, 3 * ENTRY, folder=tmp_path)
    for seed in range(3):
        put(first, seed)
    found(first, 0), found(first, 2)
    first.flush()
    again = StateCache("x", 0.999, 3 * ENTRY, folder=tmp_path)
    put(again, 7)  # the one never used goes
    assert [found(again, seed) for seed in (0, 1, 2, 7)] == [0, None, 2, 7]
    assert len(list(tmp_path.glob("entry-*"))) == 3


def test_states_of_another_model_embedder_base_or_shape_are_removed(tmp_path):
    put(StateCache("x", 0.5, 10**6, folder=tmp_path), 1)
    other = StateCache("y", -1.1, 10**6, folder=tmp_path)
    assert len(other) == 0 and not list(tmp_path.glob("entry-*"))


def test_what_belongs_to_another_version_of_the_base_is_dropped_also_over_a_restart(tmp_path):
    first = StateCache("x", 0.5, 10**6, folder=tmp_path)
    first.drop_other_versions("one")
    put(first, 1)
    first.drop_other_versions("one")
    assert found(first, 1) == 1
    again = StateCache("x", 0.5, 10**6, folder=tmp_path)
    again.drop_other_versions("one")
    assert found(again, 1) == 1
    later = StateCache("x", 0.5, 10**6, folder=tmp_path)
    later.drop_other_versions("two")
    assert len(later) == 0 and not list(tmp_path.glob("entry-*"))
    assert len(StateCache("x", 0.5, 10**6, folder=tmp_path)) == 0


@pytest.mark.parametrize("harm", ["index", "entry", "cut", "gone", "odd", "list"])
def test_a_folder_that_is_damaged_loses_what_is_damaged_and_no_more(tmp_path, harm):
    first = StateCache("x", 0.999, 10**6, folder=tmp_path)
    put(first, 1), put(first, 2)
    entry, index = sorted(tmp_path.glob("entry-*"))[0], tmp_path / "index.json"
    match harm:
        case "index":
            index.write_bytes(index.read_bytes()[:30])
        case "odd":
            index.write_text('{"format": 1, "identity": "x", "turn": 1, "entries": {"1": 5}}')
        case "list":
            index.write_text("[]")
        case "entry":
            entry.write_bytes(b"nothing")
        case "cut":
            entry.write_bytes(entry.read_bytes()[:-40])
        case "gone":
            entry.unlink()
    again = StateCache("x", 0.999, 10**6, folder=tmp_path)
    assert len(again) == (0 if harm in ("index", "odd", "list") else 1)
    put(again, 3)
    assert found(again, 3) == 3


def test_a_folder_that_can_not_be_written_is_forgotten_and_answers_go_on(tmp_path):
    (tmp_path / "file").write_text("")
    cache = StateCache("x", 0.999, 10**6, folder=tmp_path / "file" / "below")
    put(cache, 1)
    assert found(cache, 1) == 1 and cache.unsaved


def test_a_disk_that_is_full_costs_what_is_on_it_alone(tmp_path):
    cache = StateCache("x", 0.999, 10**6, folder=tmp_path)
    put(cache, 1)
    large, (soft, hard) = {"w": torch.randn(10_000)}, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # as a full disk: no file can grow beyond
    try:
        cache.put(unit(2), large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cache.unsaved == 1 and torch.equal(cache.find_nearest(unit(2))["w"], large["w"])
    again = StateCache("x", 0.999, 10**6, folder=tmp_path)
    assert len(again) == 1 and found(again, 1) == 1 and again.find_nearest(unit(2)) is None
    assert len(list(tmp_path.glob("entry-*"))) == 1  # the half that was written is gone


def test_a_state_larger_than_the_cache_is_not_kept():
    cache = StateCache("x", -1.1, ENTRY - 1)
    put(cache, 1)
    assert len(cache) == 0 and found(cache, 1) is None
