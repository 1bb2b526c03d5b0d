"""Workers that do not answer: told of after a while, given up by what answers of their kind took."""

import pytest
from effc.compiler.driver.response_timeouts import POLL_SECONDS, ResponseTimeouts


def waited(timeouts, place, seconds, is_stopped=False):
    """When there were news of a worker, and when it was given up, in seconds; None where it never was."""
    told = []
    for second in range(1, seconds + 1):
        timeouts.add_waited_seconds(1.0)
        if timeouts.silent_seconds_to_report(place):
            told.append(second)
        if timeouts.is_stale(place, lambda _: is_stopped):
            return told, second
    return told, None


@pytest.mark.parametrize(("longest", "told", "lost"), [(2, [30, 60, 120], 120), (20, [60, 120], 200), (90, [270], 900)])
def test_a_worker_is_given_up_by_the_longest_answer_of_its_kind(longest, told, lost):
    timeouts = ResponseTimeouts(longest={("step", True): longest})
    timeouts.begin_response(0, "step")
    news, end = waited(timeouts, 0, 1000)
    assert news[: len(told)] == told and end == lost


def test_a_first_task_tells_nothing_of_later_ones_and_later_ones_nothing_of_a_first():
    timeouts = ResponseTimeouts()
    timeouts.begin_response(0, "step")
    timeouts.end_response(0, is_measured=True)
    timeouts.begin_response(0, "step")
    assert waited(timeouts, 0, 1000) == ([60, 120, 240, 480, 960], None)
    timeouts.end_response(0, is_measured=False)  # of one that failed nothing is learnt
    timeouts.begin_response(0, "step")
    assert waited(timeouts, 0, 1000)[1] is None
    timeouts.end_response(0, is_measured=True)
    timeouts.begin_greeting(0)
    timeouts.end_response(0, is_measured=True)
    timeouts.begin_response(0, "step")  # by another worker, as its first
    assert waited(timeouts, 0, 1000)[1] == 120


def test_a_process_that_is_seen_to_be_stopped_is_waited_for_a_minute():
    timeouts = ResponseTimeouts()
    timeouts.begin_greeting(0)
    assert waited(timeouts, 0, 1000, is_stopped=True) == ([60], 60)


def test_time_in_which_nobody_looked_is_not_held_against_a_worker():
    timeouts = ResponseTimeouts(longest={("step", True): 1.0})
    timeouts.begin_response(0, "step")
    timeouts.add_waited_seconds(10_000.0)  # who asks was stopped itself
    assert not timeouts.silent_seconds_to_report(0) and timeouts.owed[0].waited == POLL_SECONDS
