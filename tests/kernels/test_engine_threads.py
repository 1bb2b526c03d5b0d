"""When the engine's threads share a step."""

import pytest
import torch
from effc.compiler.transforms.lowering.racing import try_set_real_time_priority
from effc.kernels.cores import usable_cores
from effc.kernels.engine import COPIED_BYTES, Engine

from tests.kernels.engine_plans import Built


def scan_of_heads(heads: int, width: int = 512, states: int = 4096) -> Built:
    """A scan whose heads each take about a millisecond: longer than it takes to wake a thread."""
    b = Built("dense_linear", context=1000)
    x, dt, keys, queries = (
        b.step("embedding", n, table=b.random(8, n)) for n in (heads * width, heads, states, states)
    )
    scales = {"rates": b.random(heads, offset=-2.0), "skip": b.random(heads), "bias": b.random(heads)}
    sizes = {"heads": heads, "head_dim": width, "groups": 1, "states": states}
    limits = {"softplus": True, "least": 0.0, "most": 1.5}
    y = b.step("ssd", heads * width, x=x, dt=dt, b=keys, c=queries, **sizes, **scales, **limits)
    b.linear(y, 8)
    return b


@pytest.mark.skipif(usable_cores() < 2, reason="one core")
def test_threads_go_on_sharing_where_one_waits_for_another_that_has_more_to_do():
    built = scan_of_heads(5)  # the first thread has two of them, and waits while the second does its third

    engine = Engine(built.plan, built.weights, 2)
    engine.thread_seconds_by_work()

    def share_of_calls_that_waited() -> float:
        """Of 40 calls after 40 others; a thread that does all by itself waits for nobody."""
        waits = []
        for _ in range(80):
            engine.run([1], [0])
            waits.append(engine.thread_seconds_by_work()["waiting"])
        return sum(wait > 0 for wait in waits[-40:]) / 40

    if not try_set_real_time_priority(True):
        pytest.skip("other work may hold a core, and no priority over it is to be had")
    try:  # a host that takes a core away for a while sends a thread on alone, rightly: one quiet moment is enough
        assert any(share_of_calls_that_waited() > 0.75 for _ in range(8))
    finally:
        try_set_real_time_priority(False)


def test_uneven_shares_give_the_same_bits_with_any_number_of_threads():
    built = scan_of_heads(5, width=3, states=7)
    rows = [Engine(built.plan, built.weights, threads).run([1, 2, 3], [0] * 3) for threads in (1, 2)]
    assert torch.equal(*rows)


@pytest.mark.slow
def test_weights_are_the_same_however_many_threads_copy_them():
    b = Built("dense_linear")
    wide = COPIED_BYTES // 32 + 5  # the table is copied in several pieces
    b.linear(b.step("embedding", wide, table=b.random(16, wide)), 5)
    engines = [
        Engine(b.plan, b.weights, threads, copy_weights=copied)
        for threads, copied in ((1, False), (1, True), (2, True))
    ]
    expected, *rows = (engine.run([15, 0, 7], [0] * 3) for engine in engines)
    assert all(torch.equal(row, expected) for row in rows)
