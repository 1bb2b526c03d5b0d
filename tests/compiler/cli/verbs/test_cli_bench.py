"""bench kernels: a small race, its answer as text and JSON, and what it refuses."""

import json
import time

import pytest
import torch
from effc.compiler.transforms.lowering import racing
from effc.compiler.transforms.lowering.contenders import DYNAMIC, EAGER, GROUPED, PREPACKED
from effc.compiler.transforms.lowering.kernel_goals import Tiles, Vectors
from effc.compiler.transforms.lowering.kernel_table import KernelRace, Table, goals_summary
from effc.compiler.transforms.lowering.racing import Contender, race_and_record_times
from effc.kernels import levels
from effc.kernels.ops import KERNELS

from tests.worlds import torch_packs_bfloat16


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """A machine with a tiny cache: copies that exceed a real one would take the test's time."""
    monkeypatch.setattr(racing, "last_level_cache_bytes", lambda: 1 << 16)


def goals_of_one_row() -> int:
    return 4 if Table().goals is Tiles else 8 + torch_packs_bfloat16()


def made(*names: str) -> KernelRace:
    """A race in which the first took twice as long as the others, which took what reading takes."""
    contenders = [Contender(name, [], 64, times=[2.0 if i == 0 else 1.0]) for i, name in enumerate(names)]
    return KernelRace("made", tuple(contenders), 64.0)


@pytest.mark.parametrize(("goals", "count"), [(Vectors, 20), (Tiles, 17)])
def test_goals_of_every_processor_are_judged_on_any(goals, count):
    table = Table(goals=goals)
    line = made(EAGER, PREPACKED, DYNAMIC, GROUPED, *KERNELS)
    for sparsity in (0.5, 0.7, 0.8, 0.9):
        goals.add_gemv_goals(table, line, "1 x 1", sparsity)
    for rows in (2, 4):
        goals.add_row_goals(table, line, rows)
    goals.add_prefill_goals(table, line)
    goals.add_attention_goals(table, line, "attention")
    assert len(table.targets) == count
    missed = [t.text for t in table.targets if not t.met]
    assert any("of read" in t.text and t.met for t in table.targets) and all("of read" not in text for text in missed)


def test_tiles_have_goals_of_their_own():
    with levels.at_forced_level(levels.MODEL):
        assert Table().goals is Tiles
    with levels.at_forced_level("portable"):
        assert Table().goals is Vectors


def test_it_prints_a_line_for_each_race_and_the_targets(effc):
    run = effc("bench", "kernels", "--only", "gemv", "--shape", "48x64", "--seconds", "0.01", "--threads", 1)
    assert run.code == 0, run.err
    assert "48 x 64, 50% zeros, 1 row   read " in run.out and "thrown" in run.out
    assert (
        run.out.count("48 x 64 50%") == goals_of_one_row()
        and "of read" in run.out
        and "load" in run.out.splitlines()[0]
    )


def test_the_json_answer_holds_samples_machine_and_targets(effc):
    run = effc("bench", "kernels", "--only", "gemv", "--shape", "48x64", "--seconds", "0.01", "--format", "json")
    found = json.loads(run.out)
    rows = {row["name"]: row for row in found["lines"][0]["rows"]}
    assert {"torch", "torch int8 dynamic", "sparse_linear", "read"} <= rows.keys()
    assert ("torch pre-packed" in rows) == torch_packs_bfloat16()
    assert all(row["kept"] + row["thrown"] > 0 and row["us"] > 0 for row in rows.values())
    assert found["machine"]["isa"] and found["machine"]["threads"] and len(found["targets"]) == goals_of_one_row()


def test_with_gate_missed_targets_are_a_missed_expectation(effc):
    run = effc(
        "bench", "kernels", "--only", "gemv", "--shape", "1x1", "--seconds", "0.01", "--gate", "--format", "json"
    )
    found = json.loads(run.out)
    assert (run.code, found["status"]) == ((4, "error") if any(not t["met"] for t in found["targets"]) else (0, "ok"))
    assert run.code == 4, "one weight can't be read at memory's speed"


@pytest.mark.parametrize(
    "args",
    [
        ("--only", "gemm"),
        ("--seconds", "0"),
        ("--shape", "12"),
        ("--shape", "0x9"),
        ("--shape", "axb"),
        ("--shape", "9999999x9"),
        ("--threads", "0"),
    ],
)
def test_what_it_does_not_know_is_a_usage_error(effc, args):
    assert effc("bench", "kernels", *args).code == 2


@pytest.mark.slow
def test_a_level_that_this_machine_lacks_is_a_sentence(process):
    lacking = next((name for name in levels.NAMES if levels.level_unavailability_reason(name)), None)
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
    contenders = [
        Contender(name, [lambda name=name, i=i: order.append((name, i)) for i in range(3)]) for name in ("a", "b")
    ]
    race_and_record_times(contenders, 0.001)
    after = order[2:]  # the first call of each warms up
    assert [name for name, _ in after[:8]] == ["b", "b", "a", "a", "a", "a", "b", "b"]
    assert [copy for name, copy in after if name == "a"][:5] == [0, 1, 2, 0, 1]
    assert all(len(c.times) + len(c.thrown) == len(after) // 4 for c in contenders), "every second call is timed"


def test_a_race_times_no_call_that_follows_one_of_another_contender():
    """Calls behind another contender's are slow here; whoever stands between two others would pay for both."""
    last = []

    def call(name: str) -> None:
        if last[-1:] != [name]:
            time.sleep(0.002)
        last.append(name)

    contenders = [Contender(name, [lambda name=name: call(name)]) for name in ("a", "b", "c")]
    race_and_record_times(contenders, 0.01)
    assert all(c.seconds < 0.001 for c in contenders)


def test_a_table_frees_the_copies_of_a_line(monkeypatch):
    table = Table(0.001, 1)
    found = table.run_race_and_add_line("nothing", [Contender("a", [lambda: None], 1)], read_roofline_bytes=64)
    assert all(not c.calls for c in found.contenders) and found.of_read("read") == pytest.approx(1)


def test_a_missed_target_says_what_memory_allows_and_whether_that_was_enough():
    """Reading takes 1 us for 1000 bytes; torch takes 4 us for 2000, our kernel 3 us for 1000."""
    times = {"torch": (4e-6, 2000), "ours": (3e-6, 1000), "read": (1e-6, 1000)}
    line = KernelRace("a race", tuple(Contender(name, [], size, [s]) for name, (s, size) in times.items()), 1e9)
    table = Table()
    for wanted in (1.2, 2.5, 4.5):
        table.add_ratio_goal(f"at least {wanted}", line, "torch", "ours", wanted)
    met, reachable, beyond = goals_summary(table.targets).splitlines()[1:4]
    assert "met " in met and "1.33 of 1.2" in met and "memory" not in met
    assert "MISSED" in reachable and reachable.endswith("memory allows 4.00")
    assert "MISSED" in beyond and beyond.endswith("memory allows 4.00, less than the target")
    assert goals_summary(table.targets).endswith(
        "1 of 3 targets met; 1 of the 2 missed ask for more than memory allows here"
    )
    assert [t.to_json()["memory_allows"] for t in table.targets] == [4, 4, 4]


def test_without_a_race_against_reading_nothing_is_said_of_memory():
    line = KernelRace("a race", (Contender("torch", [], 1, [1.0]), Contender("ours", [], 1, [1.0])), 0.0)
    table = Table()
    table.add_ratio_goal("twice", line, "torch", "ours", 2)
    assert "memory" not in goals_summary(table.targets) and table.targets[0].to_json()["memory_allows"] is None
