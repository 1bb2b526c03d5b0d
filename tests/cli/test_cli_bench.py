"""bench kernels: a small race, its answer as text and JSON, and what it refuses."""

import json

import pytest
import torch
from effc.compiler.lowering import racing
from effc.compiler.lowering.kernel_table import Table
from effc.compiler.lowering.racing import Contender, race


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """A machine with a tiny cache: copies that exceed a real one would take the test's time."""
    monkeypatch.setattr(racing, "last_cache", lambda: 1 << 16)


def test_it_prints_a_line_for_each_race_and_the_targets(effc):
    run = effc("bench", "kernels", "--only", "gemv", "--shape", "48x64", "--seconds", "0.01", "--threads", 1)
    assert run.code == 0, run.err
    assert "48 x 64, 50% zeros, 1 row   read " in run.out and "thrown" in run.out
    assert run.out.count("48 x 64 50%") == 9 and "of read" in run.out and "load" in run.out.splitlines()[0]


def test_the_json_answer_holds_samples_machine_and_targets(effc):
    run = effc("bench", "kernels", "--only", "gemv", "--shape", "48x64", "--seconds", "0.01", "--format", "json")
    found = json.loads(run.out)
    rows = {row["name"]: row for row in found["lines"][0]["rows"]}
    assert {"torch", "torch pre-packed", "torch int8 dynamic", "sparse_linear", "read"} <= rows.keys()
    assert all(row["kept"] + row["thrown"] > 0 and row["us"] > 0 for row in rows.values())
    assert found["machine"]["isa"] and found["machine"]["threads"] and len(found["targets"]) == 9


def test_with_gate_missed_targets_are_a_missed_expectation(effc):
    run = effc("bench", "kernels", "--only", "gemv", "--shape", "1x1", "--seconds", "0.01", "--gate", "--format", "json")
    found = json.loads(run.out)
    assert (run.code, found["status"]) == ((4, "error") if any(not t["met"] for t in found["targets"]) else (0, "ok"))
    assert run.code == 4, "one weight can't be read at memory's speed"


@pytest.mark.parametrize("args", [("--only", "gemm"), ("--seconds", "0"), ("--shape", "12"), ("--shape", "0x9"),
                                  ("--shape", "axb"), ("--shape", "9999999x9"), ("--threads", "0")])
def test_what_it_does_not_know_is_a_usage_error(effc, args):
    assert effc("bench", "kernels", *args).code == 2


def test_a_level_that_this_machine_lacks_is_a_sentence(process):
    from effc.kernels import levels

    lacking = next((name for name in levels.NAMES if levels.lacking(name)), None)
    if lacking is None:
        pytest.skip("this machine has every level")
    run = process("bench", "kernels", "--only", "gemv", "--shape", "48x64", EFFC_ISA=lacking)
    assert run.code == 5 and f"EFFC_ISA is {lacking}" in run.err and "Traceback" not in run.err


def test_more_threads_than_processors_run(effc):
    run = effc("bench", "kernels", "--only", "gemv", "--shape", "48x64", "--seconds", "0.01", "--threads", 9)
    assert run.code == 0, run.err
    assert torch.get_num_threads() < 9, "the thread count comes back"


def test_a_race_calls_all_in_turn_and_cycles_through_their_copies():
    order = []
    contenders = [Contender(name, [lambda name=name, i=i: order.append((name, i)) for i in range(3)])
                  for name in ("a", "b")]
    race(contenders, 0.001)
    after = order[2:]                                                        # the first call of each warms up
    assert [name for name, _ in after[:8]] == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert [copy for name, copy in after if name == "a"][:5] == [0, 1, 2, 0, 1]
    assert all(len(c.kept) + len(c.thrown) == len(after) // 2 for c in contenders)


def test_a_table_frees_the_copies_of_a_line(monkeypatch):
    table = Table(0.001, 1)
    found = table.line("nothing", [Contender("a", [lambda: None], 1)], bound=64)
    assert all(not c.calls for c in found.contenders) and found.of_read("read") == pytest.approx(1)
