"""Steps of the native engine that keep a state of each sequence, against plain torch operations."""

import copy
import threading

import pytest
import torch
from effc.kernels.engine import Cancelled, Engine
from effc.kernels.native import KernelError

from tests.kernels.engine_oracle import wanted_logits
from tests.kernels.engine_plans import Built, delta, mamba, mamba2
from tests.kernels.test_engine import assert_near, ids_of

MAKERS = [mamba, mamba2, delta]


def engine(built: Built, threads: int = 2, **more) -> Engine:
    return Engine(built.plan, built.weights, threads, **more)


@pytest.mark.parametrize("make", MAKERS)
def test_a_prompt_and_tokens_one_by_one_give_what_torch_gives(make, level):
    built = make()
    ids = ids_of(built, 80)
    wanted, own = wanted_logits(built, ids), engine(built)
    assert_near(own.run(ids[:70], [0] * 70), wanted[:70])
    for i in range(70, 80):
        assert_near(own.run([ids[i]], [0]), wanted[i : i + 1])


PARTS = {
    mamba: ({"bias": None}, {"skip": None}, {"softplus": False}, {"gate": None}),
    mamba2: ({"bias": None}, {"skip": None}, {"softplus": False}, {"most": None}),
}


@pytest.mark.parametrize("make, fields", [(make, fields) for make, parts in PARTS.items() for fields in parts])
def test_every_part_of_a_scan_can_be_missing(make, fields, level):
    built = make(layers=1)
    scan = next(s for s in built.plan["steps"] if s["op"] in ("ssd", "selective"))
    scan.update(fields)
    built.weights[scan["rates"]] *= 0.01  # time steps below zero make states grow
    ids = ids_of(built, 21)
    wanted, own = wanted_logits(built, ids), engine(built)
    assert_near(own.run(ids[:20], [0] * 20), wanted[:20])
    assert_near(own.run(ids[20:], [0]), wanted[20:])


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_neither_chunks_nor_neighbours_nor_threads_change_a_bit(make, threads, monkeypatch):
    monkeypatch.setattr("effc.kernels.engine.usable_cores", lambda: 64)
    built = make()
    ids, other = ids_of(built, 70), ids_of(built, 70, seed=1)
    wanted = engine(built, 1, batch_invariant=True).run(ids, [0] * 70)
    own, at, found = engine(built, threads, max_sequences=2, batch_invariant=True), 0, []
    for size in (1, 2, 3, 9, 1, 20, 34):
        # The other sequence lies between this one's tokens, too.
        part, half = ids[at : at + size], size // 2
        rows = own.run(part[:half] + other[at : at + size] + part[half:], [0] * half + [1] * size + [0] * (size - half))
        found += [rows[:half], rows[half + size :]]
        at += size
    assert torch.equal(torch.cat(found), wanted)


@pytest.mark.parametrize("make", MAKERS)
def test_a_prompt_longer_than_a_chunk_goes_on_with_its_state(make):
    built = make()
    built.plan["context"] = 1300
    ids = ids_of(built, 1200)
    own = engine(built)
    assert_near(own.run(ids, [0] * 1200, [0, 511, 512, 1199]), wanted_logits(built, ids)[[0, 511, 512, 1199]])


@pytest.mark.parametrize("make", MAKERS)
def test_a_sequence_is_forgotten_whole_and_not_cut_back(make):
    built = make()
    ids, other = ids_of(built, 30), ids_of(built, 30, seed=9)
    own = engine(built, max_sequences=2)
    own.run(ids[:20] + other[:5], [0] * 20 + [1] * 5, [])
    with pytest.raises(KernelError, match="can't be cut back to fewer; only 0 and all are possible"):
        own.forget(0, 19)
    assert own.length(0) == 20
    own.forget(0, 20)
    assert_near(own.run(ids[20:], [0] * 10), wanted_logits(built, ids)[20:])
    own.forget(0)
    assert_near(own.run(other, [0] * 30), wanted_logits(built, other))
    assert_near(own.run(other[5:], [1] * 25), wanted_logits(built, other)[5:])


@pytest.mark.parametrize("make", MAKERS)
def test_a_cancelled_call_leaves_states_as_they_were(make):
    built = make()
    built.plan["context"] = 200_000
    ids = ids_of(built, 40)
    wanted = engine(built, 1, batch_invariant=True).run(ids, [0] * 40)
    own = engine(built, batch_invariant=True)
    own.run(ids[:20], [0] * 20, [])
    done = threading.Event()

    def cancel():
        while not done.wait(0.001):
            own.cancel()

    other = threading.Thread(target=cancel)
    other.start()
    try:
        with pytest.raises(Cancelled):
            own.run(ids_of(built, 100_000), [0] * 100_000, [])
    finally:
        done.set()
        other.join()
    assert own.length(0) == 20
    assert torch.equal(own.run(ids[20:], [0] * 20), wanted[20:])


def test_a_delta_rule_may_decay_by_channel(level):
    built = delta(by_channel=True, n=33)
    ids = ids_of(built, 21)
    wanted, own = wanted_logits(built, ids), engine(built)
    assert_near(own.run(ids[:20], [0] * 20), wanted[:20])
    assert_near(own.run(ids[20:], [0]), wanted[20:])


def test_a_mamba_of_one_state_and_a_filter_of_one_place_runs():
    for built in (mamba(n=1, k=1), mamba2(n=1, k=1, p=1, heads=2, groups=1)):
        ids = ids_of(built, 9)
        own = engine(built)
        assert_near(torch.cat([own.run(ids[:8], [0] * 8), own.run(ids[8:], [0])]), wanted_logits(built, ids))


def changed(make, op: str, /, **fields) -> Built:
    built = copy.deepcopy(make(layers=1))
    next(s for s in built.plan["steps"] if s["op"] == op).update(fields)
    return built


@pytest.mark.parametrize(
    "built, said",
    [
        (changed(mamba2, "ssd", heads=5), "5 heads of 18 in 2 groups are not 108 columns"),
        (changed(mamba2, "ssd", groups=4), "6 heads of 18 in 4 groups are not 108 columns"),
        (changed(mamba2, "ssd", states=2**30), "a channel has 1073741824 states"),
        (changed(mamba2, "ssd", states=20), "its `b` has 42 columns, not 40"),
        (changed(mamba2, "ssd", least=2.0), "its time steps are to be 2.0 to 1.5"),
        (changed(mamba2, "ssd", rates=None), "its `rates` is None"),
        (changed(mamba, "selective", dt=0), "its `dt` has 40 columns, not 70"),
        (changed(mamba, "selective", gate=0), "its `gate` has 40 columns, not 70"),
        (changed(mamba, "selective", states=4), "its `b` has 5 columns, not 4"),
        (changed(delta, "delta", heads=3), "3 heads of 21 in 2 groups are not 84 columns"),
        (changed(delta, "delta", head_dim=2**20), "a key has 1048576 numbers"),
        (changed(delta, "delta", head_dim=17), "its `k` has 36 columns, not 34"),
        (changed(delta, "delta", by_channel=True), "its `decay` has 4 columns, not 72"),
        (changed(delta, "delta", beta=0), "its `beta` has 40 columns, not 4"),
        (changed(mamba, "convolve", x=0), "have different widths"),
        (changed(mamba, "convolve", filters="w0"), "weight `w0` is not float32 [any, 70]"),
    ],
)
def test_a_step_that_does_not_hold_together_is_refused(built, said):
    with pytest.raises(KernelError) as refused:
        engine(built)
    assert said in str(refused.value)
