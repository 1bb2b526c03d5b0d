"""Timed bounds: decided by an interval that holds the median, or left open; never a wrong yes."""

import itertools
import random

import pytest
from effc.compiler.driver.judging.comparison import original_and_result_values
from effc.compiler.driver.judging.gate import BoundVerdict, judge_bound, unmet_bound_diagnostics
from effc.compiler.driver.judging.timed_bounds import interval_decides, metric_confidence_interval, undecided_reason
from effc.compiler.evaluation.confidence import CONFIDENCE, STUDENT_99, median_interval
from effc.compiler.evaluation.timing import InterleavedTimes
from effc.dsl.checker.recipe import Bound
from effc.dsl.checker.values import Duration, MetricRef, Range

P50 = MetricRef("decode.p50")
HALF = Bound(P50, "<=", 0.5, "base")


def turns(ratios, original=10.0):
    """Rounds in which the original took 10 ms."""
    rounds = tuple({"original": original, "compiled": original * r} for r in ratios)
    ordered = sorted(ratios)
    return InterleavedTimes(
        {"original": original, "compiled": original * ordered[len(ordered) // 2]}, ordered[len(ordered) // 2], rounds
    )


@pytest.mark.parametrize("n", range(max(STUDENT_99) + 1, 13))
def test_the_interval_holds_the_median_as_often_as_it_says(n):
    """Exactly: each of n coins says whether a value lies below the median; all 2^n outcomes are counted."""
    ends = median_interval(list(range(n)))
    assert ends is not None
    low, high = int(ends[0]), int(ends[1])  # as ranks
    inside = sum(low < sum(coins) <= high for coins in itertools.product((0, 1), repeat=n))
    assert inside / 2**n >= CONFIDENCE


def test_rounds_that_all_lie_on_one_side_decide():
    assert interval_decides(HALF, turns([0.45] * 6), 10.0, "ms") and interval_decides(
        HALF, turns([0.55] * 6), 10.0, "ms"
    )


@pytest.mark.parametrize("n", [3, 4, 5])
@pytest.mark.parametrize("draw", ["lognormvariate", "gammavariate"])
def test_the_interval_of_few_rounds_holds_the_median_as_often_as_it_says(n, draw):
    """Also where times are not spread as it supposes."""
    rng = random.Random(n)
    args, median = {"lognormvariate": ((0.0, 0.3), 1.0), "gammavariate": ((4.0, 1.0), 3.672)}[draw]
    drawn = [median_interval([getattr(rng, draw)(*args) for _ in range(n)]) for _ in range(4000)]
    assert sum(low <= median <= high for low, high in drawn) / len(drawn) >= CONFIDENCE


def test_three_rounds_decide_a_bound_that_is_far_off():
    assert interval_decides(HALF, turns([0.113, 0.122, 0.123]), 10.0, "ms")
    assert not interval_decides(HALF, turns([0.4, 0.43, 0.45]), 10.0, "ms")


def test_two_rounds_decide_nothing_however_clear_they_look():
    assert not interval_decides(HALF, turns([0.1] * 2), 10.0, "ms")
    assert median_interval([0.0, 1.0, 2.0]) is None  # a clock that stood still


def test_rounds_on_both_sides_leave_a_bound_open_and_say_how_far_they_lie():
    seen = turns([0.3, 0.4, 0.45, 0.55, 0.6, 0.9])
    assert not interval_decides(HALF, seen, 10.0, "ms")
    said = "after 6 rounds it lies between 3.0 ms and 9.0 ms with 95% confidence; the limit is 5.0 ms"
    assert undecided_reason(HALF, seen, 10.0, "ms") == said


def test_one_slow_round_among_many_decides_nothing_else():
    assert interval_decides(HALF, turns([0.4] * 11 + [3.0]), 10.0, "ms")


@pytest.mark.parametrize(
    "ratios, sure",
    [
        ([0.4] * 6, True),
        ([0.9] * 6, True),
        ([0.1, 0.1, 0.1, 0.9, 0.9, 0.9], False),
        ([0.4, 0.4, 0.4, 0.9, 0.9, 0.9], False),
    ],
)
def test_a_range_is_decided_inside_or_beside_it(ratios, sure):
    bound = Bound(P50, "in", Range(0.3, 0.5), "base")
    assert interval_decides(bound, turns(ratios), 10.0, "ms") == sure


def test_a_bound_without_a_baseline_goes_by_the_times_themselves():
    bound = Bound(P50, "<=", Duration(0.005))
    assert metric_confidence_interval(bound, turns([0.4] * 6), 10.0) == (4.0, 4.0)
    assert interval_decides(bound, turns([0.4] * 6), 10.0, "ms")


def test_an_open_bound_is_no_yes_unless_it_is_let_through():
    verdict = BoundVerdict(HALF, 5.0, 10.0, "ms", passed=False, undecided="after 6 rounds nothing is sure")
    (refused,), (allowed,) = unmet_bound_diagnostics([verdict]), unmet_bound_diagnostics([verdict], "pass")
    assert (refused.fault.slug, refused.exit) == ("bound-undecided", 4) and allowed.severity == "warning"
    assert verdict.state == "undecided" and judge_bound(HALF, 10.0, 5.0, "ms").state == "ok"


def test_a_table_says_what_the_original_takes_whichever_bound_is_written_last():
    """Of two bounds on one time only the first names the original."""
    plain = judge_bound(Bound(P50, "<=", Duration(0.001)), None, 5.0, "ms")
    half = judge_bound(HALF, 10.0, 5.0, "ms")
    assert (
        original_and_result_values([half, plain], {})
        == original_and_result_values([plain, half], {})
        == {P50: (10.0, 5.0)}
    )
    assert original_and_result_values([plain], {P50: (10.0, 5.0)}) == {P50: (10.0, 5.0)}
    assert original_and_result_values([plain], {}) == {P50: (None, 5.0)}
