"""Times of a front's points: ratios over one time of the original, and limits that nobody can judge."""

from dataclasses import replace

import pytest
from effc.compiler.artifacts.front_kinds import members_with_interleaved_times
from effc.compiler.artifacts.load import POINTS
from effc.compiler.artifacts.manifest import Manifest, Measure
from effc.compiler.driver.judging.comparison import Comparison
from effc.compiler.driver.judging.front_times import rebase_on_median_original
from effc.compiler.driver.judging.gate import judge_bound
from effc.compiler.driver.pick import _best_fitting_point, measures_by_point, point_folder_or_copy
from effc.compiler.driver.point_limits import Limit
from effc.compiler.driver.point_times import point_time_interval, undecided_reason_by_point
from effc.dsl.checker.recipe import Bound
from effc.dsl.checker.values import Duration, MetricRef, Ratio
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import given
from hypothesis import strategies as st

from tests.drafts import write_artifact

SPEED = MetricRef("decode.p50")
positive = st.floats(0.5, 500)


def clocked(original, ratio, outcomes=()):
    row = Measure("decode.p50", "ms", original, original * ratio, ratio, "lower", (ratio, ratio))
    params = Measure("params", "params", 100.0, 50.0, 0.5)
    return Comparison(tuple(outcomes), (row, params), {}, {"decode.p50": (ratio,)})


def bound(limit, baseline, op="<="):
    return Bound(SPEED, op, limit, baseline)


@given(readings=st.lists(st.tuples(positive, st.floats(0.1, 3)), min_size=2, max_size=5))
def test_points_are_told_in_the_order_of_their_ratios_whatever_the_original_took_beside_each(readings):
    told = rebase_on_median_original(
        [(str(n), clocked(original, ratio)) for n, (original, ratio) in enumerate(readings)]
    )
    rows = [compared.measures[0] for _, compared in told]
    (base,) = {row.original for row in rows}
    assert min(o for o, _ in readings) <= base <= max(o for o, _ in readings)
    for row, (_, ratio) in zip(rows, readings, strict=True):
        assert row.compiled == pytest.approx(base * ratio) and row.ratio == ratio
    assert all(compared.measures[1].compiled == 50.0 for _, compared in told)  # what no clock reads stays


@given(original=positive, ratio=st.floats(0.1, 3), factor=st.floats(0.1, 3), beside=positive)
def test_a_bound_on_a_factor_keeps_its_verdict_over_another_base(original, ratio, factor, beside):
    verdict = judge_bound(bound(Ratio(factor), "base"), original, original * ratio, "ms")
    ((_, told), _) = rebase_on_median_original(
        [("a", clocked(original, ratio, [verdict])), ("b", clocked(beside, 1.0))]
    )
    (after,) = told.outcomes
    assert after.passed == verdict.passed and after.value / after.original == pytest.approx(ratio)
    assert after.high / after.original == pytest.approx(factor)


def test_a_bound_on_a_time_and_an_open_one_are_as_they_were_timed():
    on_time = judge_bound(bound(Duration(0.1), None), None, 76.0, "ms")
    open_one = replace(judge_bound(bound(Ratio(0.9), "base"), 100.0, 76.0, "ms"), undecided="after 5 rounds")
    ((_, told), _) = rebase_on_median_original(
        [("a", clocked(100.0, 0.76, [on_time, open_one])), ("b", clocked(200.0, 1.0))]
    )
    assert told.outcomes == (on_time, open_one)


def front(rounds, members=(("small", 9.0), ("large", 9.0)), **run):
    """A front whose points were timed in these rounds of (original, compiled)."""
    timings = {
        f"decode.p50 of {name}": {"unit": "ms", "original": [o for o, _ in pairs], "compiled": [c for _, c in pairs]}
        for name, pairs in rounds.items()
    }
    rows = tuple(Measure(f"decode.p50 of {n}", "ms", 100.0, 100.0 * p[0][1] / p[0][0]) for n, p in rounds.items())
    points = tuple(
        {"name": n, "measures": [["loss", loss, "nats", "lower"], ["decode.p50", 1.0, "ms", "lower"]], "steps": []}
        for n, loss in members
    )
    empty = Manifest("front", "sizes", "0", {}, {})
    return replace(empty, members=points, measures=rows, run={"timings": timings, **run})


QUIET = front({"small": [(100.0, 50.0), (101.0, 50.5)] * 4, "large": [(100.0, 80.0), (99.0, 79.2)] * 4})
NOISY = front({"small": [(47.0, 23.5)] * 8, "large": [(187.0, 149.6)] * 8})


def test_times_of_the_report_are_those_of_the_points_and_what_a_table_added_up_stays():
    assert [m["measures"][1][1] for m in members_with_interleaved_times(QUIET)] == [50.0, 80.0]
    assert members_with_interleaved_times(QUIET)[0]["measures"][0] == ["loss", 9.0, "nats", "lower"]
    searched = replace(QUIET, steps=({"decisions": [{"latency_error": 0.1}]},))
    assert [m["measures"][1][1] for m in members_with_interleaved_times(searched)] == [1.0, 1.0]


def test_a_quiet_machine_knows_which_points_keep_a_limit_and_a_noisy_one_says_that_it_does_not():
    limits = (Limit("decode.p50", "70ms"),)
    assert undecided_reason_by_point(QUIET, measures_by_point(QUIET), limits) == {}
    said = undecided_reason_by_point(NOISY, measures_by_point(NOISY), limits)
    assert set(said) == {"small", "large"}  # 23.5 to 93.5 ms, and 37.6 to 149.6 ms
    assert (
        "the machine was too noisy to know whether `small` keeps decode.p50=70ms: 23.5 ms to 93.5 ms" in said["small"]
    )
    assert (
        undecided_reason_by_point(NOISY, measures_by_point(NOISY), (Limit("decode.p50", "1s"), Limit("loss", "9")))
        == {}
    )
    assert _best_fitting_point(QUIET, limits) == "small"


def test_a_point_that_is_run_by_a_limit_on_a_time_comes_with_the_same_note(tmp_path):
    def build(folder):
        for name in ("small", "large"):
            (folder / POINTS / name).mkdir(parents=True)
            (folder / POINTS / name / "weights").write_bytes(b"0")
        members = tuple({**m, "edits": [], "profile": {}} for m in NOISY.members)
        return replace(NOISY, members=members)

    write_artifact(tmp_path / "front", build=build)
    notes = []
    folder = point_folder_or_copy(tmp_path / "front", "decode.p50=70ms", on_note=notes.append)
    assert folder == tmp_path / "front" / POINTS / "small"
    assert notes == list(
        undecided_reason_by_point(NOISY, measures_by_point(NOISY), (Limit("decode.p50", "70ms"),)).values()
    )


def test_where_no_point_keeps_a_limit_it_is_said_that_the_nearest_one_may():
    with pytest.raises(Reject) as refused:
        _best_fitting_point(NOISY, (Limit("decode.p50", "40ms"),))
    assert "`small` keeps decode.p50=40ms" in refused.value.diagnostics[0].note


@pytest.mark.parametrize(
    "timings",
    [
        5,
        [],
        {"decode.p50 of small": 3},
        {"decode.p50 of small": {"original": 1, "compiled": []}},
        {"decode.p50 of small": {"original": [0.0], "compiled": [1.0]}},
        {"decode.p50 of small": {"original": ["1"], "compiled": [1.0]}},
        {"decode.p50 of small": {"original": [float("nan")], "compiled": [1.0]}},
        {"decode.p50 of small": {"original": [True], "compiled": [1.0]}},
    ],
)
def test_a_record_of_rounds_that_is_none_says_nothing(timings):
    strange = replace(QUIET, run={"timings": timings})
    assert point_time_interval(strange, "small", "decode.p50") is None
    assert undecided_reason_by_point(strange, measures_by_point(strange), (Limit("decode.p50", "70ms"),)) == {}
