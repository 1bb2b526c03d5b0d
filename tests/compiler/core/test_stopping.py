"""What is still done when a signal ends a command: once, by whichever thread ends it."""

import threading

import pytest
from effc.compiler.core.stopping import before_stopping, clear_stop_request, request_stop, run_last_actions


def test_an_interrupt_runs_the_action_of_what_it_breaks_off_and_an_end_does_not():
    done = []
    with before_stopping(lambda: done.append("ended")):
        pass
    with pytest.raises(KeyboardInterrupt), before_stopping(lambda: done.append("stopped")):
        raise KeyboardInterrupt
    with pytest.raises(ValueError), before_stopping(lambda: done.append("broke")):
        raise ValueError
    run_last_actions()
    assert done == ["stopped"]


def test_the_thread_that_ends_a_process_runs_it_once_and_waits_for_one_that_runs():
    done, begun, goes_on = [], threading.Event(), threading.Event()

    def action():
        begun.set()
        goes_on.wait(10)
        done.append("written")

    with pytest.raises(KeyboardInterrupt), before_stopping(action):
        ending = threading.Thread(target=lambda: (run_last_actions(), done.append("ended")))
        ending.start()
        assert begun.wait(10)
        threading.Timer(0.05, goes_on.set).start()
        raise KeyboardInterrupt
    ending.join(10)
    assert done == ["written", "ended"]


def test_an_interrupt_that_a_library_turns_into_another_error_runs_it_too():
    done = []
    try:
        with pytest.raises(ImportError), before_stopping(lambda: done.append("stopped")):
            request_stop()
            raise ImportError
    finally:
        clear_stop_request()
    assert done == ["stopped"]
