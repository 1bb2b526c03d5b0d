"""What the engine refuses, and hosts that fork, thread and cancel."""

import copy
import os
import threading
import time

import pytest
import torch
from effc.kernels.cores import cgroup_cpu_limit, usable_cores
from effc.kernels.engine import Cancelled, Engine
from effc.kernels.native import KernelError
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.engine_oracle import wanted_logits
from tests.kernels.engine_plans import Built, gpt2, llama, mixture

BUILT = llama(layers=1)
MIXTURE = mixture(layers=1)


def first(built: Built, op: str) -> dict:
    return next(s for s in built.plan["steps"] if s["op"] == op)


def changed(op: str, /, _of: Built = BUILT, **fields) -> tuple[dict, dict]:
    built = copy.deepcopy(_of)
    first(built, op).update(fields)
    return built.plan, built.weights


REFUSED = [
    (changed("add", x=9999), "its `x` is 9999"),
    (changed("add", x=-1), "its `x` is -1"),
    (changed("add", x=True), "its `x` is True"),
    (changed("add", x=len(BUILT.plan["registers"]) - 1), "its `x` is"),
    (changed("norm", to=0), "its `to` is 0"),
    (changed("norm", group=7), "groups of 7 do not divide 48"),
    (changed("norm", eps=float("nan")), "its `eps` is nan"),
    (changed("norm", eps=-1.0), "its `eps` is -1.0"),
    (changed("norm", kind="group"), "its `kind` is 'group'"),
    (changed("norm", weight="nowhere"), "its `weight` is 'nowhere'"),
    (changed("linear", weight=None), "its `weight` is None"),
    (changed("linear", weight=first(BUILT, "norm")["weight"]), "is not packed for any kernel"),
    (changed("linear", bias=first(BUILT, "norm")["weight"]), "is not float32 [96]"),
    (changed("linear", weight=first(BUILT, "embedding")["table"]), "its weight takes 48 numbers to 70"),
    (changed("rotary", rotary_dim=15), "15 from 0 are no pairs in a head of 16"),
    (changed("rotary", start=2), "16 from 2 are no pairs in a head of 16"),
    (changed("rotary", heads=2**40), "its `heads` is"),
    (changed("attention", slot=1), "its slot 1 is not there"),
    (changed("attention", kv_heads=4), "its sizes are not those of slot 0"),
    (changed("attention", heads=3), "3 query heads are not a multiple of 2 key heads"),
    (changed("attention", window=0), "its `window` is 0"),
    (changed("attention", scale="large"), "its `scale` is 'large'"),
    (changed("attention", slopes=first(BUILT, "norm")["weight"]), "is not float32 [6]"),
    (changed("scores", MIXTURE, weight=first(MIXTURE, "route")["bias"]), "is not float32 [6, 40]"),
    (changed("route", MIXTURE, count=7), "it chooses 7 of 6 experts"),
    (changed("route", MIXTURE, count=3), "it writes 6 columns, and register"),
    (changed("route", MIXTURE, groups=4), "4 groups of 6 experts, 1 of them kept"),
    (changed("route", MIXTURE, groups=6, kept=1), "it chooses 2 of 1 experts"),
    (changed("route", MIXTURE, groups=3, kept=2, judges=3), "3 experts judge a group of 2"),
    (changed("route", MIXTURE, bias=first(MIXTURE, "norm")["weight"]), "is not float32 [6]"),
    (changed("experts", MIXTURE, chosen=0), "register 0 is not what a `route` chose"),
    (changed("experts", MIXTURE, weights=first(MIXTURE, "experts")["weights"][:5]), "it has 5 weights"),
    (changed("experts", MIXTURE, weights=[]), "its `weights` is []"),
    (changed("experts", MIXTURE, weights=[first(MIXTURE, "linear")["weight"]] * 6), "it writes 80 columns"),
    (changed("experts", MIXTURE, weights=[first(MIXTURE, "norm")["weight"]] * 6), "is not packed for any kernel"),
    (changed("experts", MIXTURE, summed=True), "it writes 48 columns"),
    (changed("experts", MIXTURE, biases=first(MIXTURE, "scores")["weight"]), "is not float32 [6, 48]"),
    (changed("clip", MIXTURE, least=2.0), "its numbers are to be 2.0 to 1.5"),
    (changed("attention", alibi=True), "it has a field `alibi`"),
    (changed("act", kind="swish"), "its `kind` is 'swish'"),
    (changed("mul", op="divide"), "is none that the engine knows"),
    (changed("mul", op=[]), "is none that the engine knows"),
    (({**BUILT.plan, "logits": [0]}, BUILT.weights), "its logits are register [0]"),
    (({**BUILT.plan, "version": 2}, BUILT.weights), "its version is 2"),
    (({**BUILT.plan, "registers": [48]}, BUILT.weights), "its `to` is 1"),
    (({**BUILT.plan, "registers": [-48] * 99}, BUILT.weights), "no list of widths"),
    (({**BUILT.plan, "registers": [2**30] * 99}, BUILT.weights), "its rows have 48 numbers"),
    (({**BUILT.plan, "logits": 99999}, BUILT.weights), "which no step writes"),
    (({**BUILT.plan, "logits": 0}, BUILT.weights), "a step reads the logits"),
    (({**BUILT.plan, "steps": []}, BUILT.weights), "it has no steps"),
    (({**BUILT.plan, "slots": [{"kv_heads": 2, "head_dim": 4096}]}, BUILT.weights), "a head has 4096 dimensions"),
    (({**BUILT.plan, "context": 0}, BUILT.weights), "its context is no number"),
    (([], BUILT.weights), "it is not an object"),
]


@pytest.mark.parametrize("given, sentence", REFUSED, ids=[s for _, s in REFUSED])
def test_a_plan_that_does_not_fit_is_refused_with_its_place(given, sentence):
    with pytest.raises(KernelError) as refused:
        Engine(*given, threads=1)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    "damage, deep, sentence",
    [
        (lambda w: w[:100], False, "not packed for any kernel"),
        (lambda w: w[:-64], False, "longer or shorter than its header says"),
        (lambda w: torch.cat([w, torch.zeros(64, dtype=torch.uint8)]), False, "longer or shorter"),
        (lambda w: torch.cat([w[:12], w[12:13] + 1, w[13:]]), False, "another version"),
        (lambda w: torch.cat([w[:8], w[8:12].flip(0), w[12:]]), False, "other byte order"),
        (lambda w: torch.cat([w[:-100], w[-100:-99] ^ 1, w[-99:]]), True, "do not match their checksum"),
        (lambda w: w.float(), False, "float32"),
        (lambda w: w.float()[:0], False, "float32 [0]"),
    ],
)
def test_a_damaged_weight_is_refused_by_name(damage, deep, sentence):
    name = first(BUILT, "linear")["weight"]
    with pytest.raises(KernelError) as refused:
        Engine(BUILT.plan, {**BUILT.weights, name: damage(BUILT.weights[name].clone())}, 1, compares_checksums=deep)
    assert sentence in str(refused.value) or "is not packed for any kernel" in str(refused.value)
    assert f"`{name}`" in str(refused.value)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_change_of_a_plan_crashes_the_engine(data):
    built = copy.deepcopy(data.draw(st.sampled_from([BUILT, GPT2, MIXTURE])))
    plan = built.plan
    step = data.draw(st.sampled_from(plan["steps"]))
    name = data.draw(st.sampled_from(sorted(step)))
    odd = st.one_of(st.integers(-2, 200), st.sampled_from([2**31, 2**63, None, 0.5, "w1", True, [], [0, 1]]))
    step[name] = data.draw(odd)
    number = data.draw(st.integers(0, len(plan["registers"]) - 1))
    widths = [*[plan["registers"][number]] * 3, 1, 47, 2**31 - 1]
    plan["registers"][number] = data.draw(st.sampled_from(widths))
    try:
        own = Engine(plan, built.weights, 2)
    except KernelError:
        return
    assert own.run([1, 2, 3, 4, 5, 6], [0] * 6).shape[0] == 6  # the change was one that runs
    own.run([7], [0])


GPT2 = gpt2(layers=1)


@pytest.mark.parametrize(
    "ids, sequences, wanted, sentence",
    [
        ([1, 70], [0, 0], None, "not all among the 70"),
        ([-1], [0], None, "not all among the 70"),
        ([1], [2], None, "not all among this engine's 2"),
        ([1, 2], [0], None, "2 tokens need as many sequences, not 1"),
        ([[1, 2]], [0], None, "the tokens are not a row of whole numbers"),
        ([1.5], [0], None, "the tokens are not a row of whole numbers"),
        ([2**70], [0], None, "the tokens are not a row of whole numbers"),
        ([1, 2], [0, 0], [1, 0], "do not increase"),
        ([1, 2], [0, 0], [2], "do not increase"),
        ([1, 2], [0, 0], [0, 0], "do not increase"),
        ([1] * 9, [1] * 9, None, "exceed the context of 8"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_before_anything_is_computed(ids, sequences, wanted, sentence):
    own = Engine(BUILT.plan, BUILT.weights, 1, max_sequences=2, context=8)
    own.run([3], [1])
    with pytest.raises(KernelError, match=sentence):
        own.run(ids, sequences, wanted)
    assert own.length(0) == 0 and own.length(1) == 1


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"threads": 0}, "0 threads"),
        ({"threads": 1, "max_sequences": 0}, "0 sequences"),
        ({"threads": 1, "max_sequences": 65537}, "at most 65536 sequences"),
        ({"threads": 1, "context": -3}, "-3 tokens of context"),
        ({"threads": 1, "context": 129}, "limit is 128"),
    ],
)
def test_an_engine_of_no_size_is_refused(arguments, sentence):
    with pytest.raises(KernelError, match=sentence):
        Engine(BUILT.plan, BUILT.weights, **arguments)


def test_the_context_can_be_used_to_its_last_token():
    own = Engine(BUILT.plan, BUILT.weights, 1)
    ids = [i % 60 for i in range(128)]
    found = own.run(ids, [0] * 128, [127])
    assert float((found - wanted_logits(BUILT, ids)[-1]).abs().max()) < 0.1
    with pytest.raises(KernelError, match="exceed the context of 128"):
        own.run([1], [0])


def test_threads_are_no_more_than_the_cores_that_the_process_may_use():
    assert Engine(BUILT.plan, BUILT.weights, 10_000).threads == min(usable_cores(), 256)
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    "files, cores",
    [
        ({}, float("inf")),
        ({"cpu.max": "max 100000\n"}, float("inf")),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "0 0\n"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "lots\n"}, float("inf")),
    ],
)
def test_a_container_bounds_the_cores_that_are_used(tmp_path, monkeypatch, files, cores):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cgroup_cpu_limit(tmp_path) == cores
    monkeypatch.setattr("effc.kernels.cores.cgroup_cpu_limit", lambda: cores)
    assert usable_cores() <= max(1, cores) + 1 and (cores >= 1 or usable_cores() == 1)


def test_no_tokens_are_no_logits():
    own = Engine(BUILT.plan, BUILT.weights, 2)
    assert own.run([], []).shape == (0, 70)


def test_a_closed_engine_says_so():
    own = Engine(BUILT.plan, BUILT.weights, 1)
    own.close()
    own.close()
    with pytest.raises(KernelError, match="is closed"):
        own.run([1], [0])
    with pytest.raises(KernelError, match="is closed"):
        own.length(0)


@pytest.mark.parametrize("call", [lambda e: e.forget(5), lambda e: e.forget(0, -1), lambda e: e.length(-1)])
def test_a_sequence_that_is_not_there_is_refused(call):
    with pytest.raises(KernelError, match="sequence"):
        call(Engine(BUILT.plan, BUILT.weights, 1))


def test_engines_side_by_side_do_not_disturb_each_other():
    engines = [Engine(BUILT.plan, BUILT.weights, 2) for _ in range(2)]
    alone = Engine(BUILT.plan, BUILT.weights, 2)
    ids = list(range(40))
    wanted, found = [alone.run([i], [0]) for i in ids], [[], []]

    def decode(number: int) -> None:
        found[number] = [engines[number].run([i], [0]) for i in ids]

    threads = [threading.Thread(target=decode, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rows in found:
        assert all(torch.equal(a, b) for a, b in zip(rows, wanted, strict=True))


def test_a_cancelled_call_leaves_its_sequences_as_they_were():
    own = Engine(WIDE.plan, WIDE.weights, 2)
    before = own.run([1, 2, 3], [0] * 3)
    outcome: list[BaseException | None] = []

    def long() -> None:
        try:
            own.run([5] * 4000, [0] * 4000, [])
            outcome.append(None)
        except Cancelled as cancelled:
            outcome.append(cancelled)

    thread = threading.Thread(target=long)
    thread.start()
    refused = ""
    while not refused:  # it runs now: a second call is refused, not mixed into it
        try:
            own.forget(0, own.length(0))
        except KernelError as error:
            refused = str(error)
        assert thread.is_alive() or refused, "the long call ended before it could be seen"
    own.cancel()
    thread.join()
    assert isinstance(outcome[0], Cancelled) and "another thread is running it" in refused
    assert own.length(0) == 3
    own.forget(0)
    assert torch.equal(own.run([1, 2, 3], [0] * 3), before)


def test_an_engine_that_is_closed_while_another_thread_runs_it_ends_that_call_first():
    for pause in (0.0, 0.0, 0.001, 0.01):
        own = Engine(WIDE.plan, WIDE.weights, 2)
        outcome: list[BaseException | None] = []

        def long(engine=own, outcome=outcome) -> None:
            try:
                engine.run([5] * 4000, [0] * 4000, [])
                outcome.append(None)
            except (Cancelled, KernelError) as error:
                outcome.append(error)

        thread = threading.Thread(target=long)
        thread.start()
        time.sleep(pause)
        own.close()
        thread.join()
        assert isinstance(outcome[0], Cancelled) or "is closed" in str(outcome[0])
        with pytest.raises(KernelError, match="is closed"):
            own.run([1], [0])


WIDE = llama(layers=8, hidden=256, heads=8, kv=8, d=32, context=4096)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_forked_child_goes_on_with_threads_of_its_own():
    own = Engine(BUILT.plan, BUILT.weights, 2)
    own.run([1, 2, 3], [0] * 3, [])
    wanted = Engine(BUILT.plan, BUILT.weights, 2).run([1, 2, 3, 4], [0] * 4, [3])
    child = os.fork()
    if child == 0:
        same = torch.allclose(own.run([4], [0]), wanted, atol=1e-4)
        own.close()
        os._exit(0 if same else 1)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended[0] == child and os.waitstatus_to_exitcode(ended[1]) == 0
    assert torch.allclose(own.run([4], [0]), wanted, atol=1e-4)  # and the parent with its own


def test_what_is_not_a_number_stays_in_its_sequence():
    b = Built()
    table = b.random(60, 48)
    b.weights[table][7] = float("nan")
    x = b.step("embedding", 48, table=table)
    q, k, v = (b.linear(x, 48) for _ in range(3))
    b.linear(b.attention(q, k, v, 3, 3, 16), 60)
    own = Engine(b.plan, b.weights, 2, max_sequences=2)
    found = own.run([1, 7, 1, 2], [0, 0, 1, 1])
    assert found[1].isnan().any() and not found[2:].isnan().any()
    own.forget(0, 1)
    assert not own.run([1, 2, 3], [0, 0, 0]).isnan().any()


def test_the_same_threads_give_the_same_bits_alone_or_together():
    ids = [i % 60 for i in range(50)]
    rows = []
    for _ in range(6):  # under load a call is sometimes done by one thread for both
        own = Engine(BUILT.plan, BUILT.weights, 2)
        rows.append(torch.cat([own.run(ids, [0] * 50), *(own.run([i], [0]) for i in ids)]))
    assert all(torch.equal(r, rows[0]) for r in rows)


def test_a_library_of_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr("effc.kernels.engine.LAYOUT", 1)
    with pytest.raises(KernelError, match="install effc again"):
        Engine(BUILT.plan, BUILT.weights, 1)
