"""Waiting for a run costs one process, and ends with the run or with a process that it needs."""

import os
import signal
import sys
import threading
import time

import pytest
from effc.compiler.apps.federation import deployment
from effc.compiler.apps.federation.deployment import Deployment, RunStatus, wait_for_run_or_dead_process
from effc.compiler.apps.federation.grid import LONGEST_POLL, LocalGrid, Message, poll_interval_s, send_and_receive
from effc.compiler.apps.federation.identities import write_keys_and_certificates
from effc.compiler.apps.federation.processes import start_process, terminate_live_processes
from effc.compiler.cli.verbs.federate import _traffic_sentence
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("cryptography")

FLWR = """#!{python}
import json, pathlib, sys, time
folder = pathlib.Path({folder!r})
with open(folder / "calls", "a") as calls:
    calls.write(sys.argv[1] + chr(10))
if sys.argv[1] == "log":
    if not (folder / "stable").exists():
        sys.exit("connection lost")
    while not (folder / "over").exists():
        time.sleep(0.05)
else:
    word = "finished:completed" if (folder / "over").exists() else "running"
    traffic = {{"inbound-bytes": 3000, "outbound-bytes": 9000}}
    print(json.dumps({{"success": True, "runs": [
        {{"run-id": "7", "status": word, "status-details": "N/A", "elapsed": 120.0, "network-traffic": traffic}}]}}))
"""


@pytest.fixture
def running(tmp_path, monkeypatch):
    """A deployment of processes that sleep, and a `flwr` whose stream lasts until the file `over` is there."""
    (tmp_path / "flwr").write_text(FLWR.format(python=sys.executable, folder=str(tmp_path)))
    (tmp_path / "flwr").chmod(0o700)
    monkeypatch.setattr(deployment, "flower_command_folder", lambda: tmp_path)
    monkeypatch.setattr(deployment, "POLL_SECONDS", 0.1)
    write_keys_and_certificates(tmp_path / "keys", 1)
    sleep = (sys.executable, "-c", "import time; time.sleep(120)")
    processes = tuple(start_process(name, sleep, os.environ, tmp_path) for name in ("superlink", "server", "node0"))
    yield Deployment(tmp_path, 9, processes, "7")
    terminate_live_processes(processes)


def ends_later(running, seconds=2.0):
    threading.Timer(seconds, (running.folder / "over").touch).start()


@pytest.mark.slow
def test_a_wait_is_one_stream_and_one_question_however_long_it_takes(running):
    (running.folder / "stable").touch()
    ends_later(running)
    assert wait_for_run_or_dead_process(running) == RunStatus("finished:completed", "N/A", 120.0, 3000, 9000)
    assert (running.folder / "calls").read_text().split() == ["log", "ls"]


@pytest.mark.slow
def test_a_stream_that_breaks_off_is_begun_again(running):
    threading.Timer(1.0, (running.folder / "stable").touch).start()
    ends_later(running)
    assert wait_for_run_or_dead_process(running).is_over
    assert (running.folder / "calls").read_text().split()[:3] == ["log", "ls", "log"]


@pytest.mark.slow
def test_a_stream_that_says_nothing_more_is_left_and_the_run_itself_asked(running, monkeypatch):
    (running.folder / "stable").touch()
    monkeypatch.setattr(deployment, "LONGEST_STREAM", 0.2)
    ends_later(running, 1.5)
    assert wait_for_run_or_dead_process(running).is_over


@pytest.mark.parametrize("lost", [0, 1])
def test_a_wait_ends_with_a_process_that_no_run_goes_on_without(running, lost):
    (running.folder / "stable").touch()
    process = running.processes[lost].pid
    threading.Timer(0.5, os.killpg, (process, signal.SIGKILL)).start()
    threading.Timer(0.7, os.waitpid, (process, 0)).start()
    started = time.monotonic()
    assert wait_for_run_or_dead_process(running) is None and time.monotonic() - started < 60


def test_a_wait_goes_on_without_a_node(running):
    (running.folder / "stable").touch()
    os.killpg(running.processes[2].pid, signal.SIGKILL)
    os.waitpid(running.processes[2].pid, 0)
    ends_later(running, 0.5)
    assert wait_for_run_or_dead_process(running).is_over


def test_bytes_are_said_a_minute_and_node_and_what_is_not_among_them():
    status = RunStatus("finished:completed", "", 120.0, 2048, 6144)
    said = _traffic_sentence(status, 2)
    assert said == "Flower counts 2.00 KiB up, 6.00 KiB down: 2.00 KiB a minute and node, without polls, HTTP and TLS"
    at_once = status._replace(seconds=0.0, bytes_up=1, bytes_down=0)
    assert "60 B a minute and node" in _traffic_sentence(at_once, 0)  # of a second at least, and of a node


@given(waited=st.floats(0, 1e6), first=st.floats(0.001, 1))
def test_looks_for_replies_cost_at_most_a_fiftieth_of_the_wait(waited, first):
    pause = poll_interval_s(waited, first)
    assert first <= pause <= max(first, LONGEST_POLL) and pause <= max(first, waited / 50)


@pytest.mark.slow
def test_replies_are_taken_when_they_come_and_a_late_one_is_left():
    class Looks(LocalGrid):
        count = 0

        def pull_messages(self, message_ids):
            self.count += 1
            return super().pull_messages(message_ids)

    def slow(message, memory):
        time.sleep(float(message.config["seconds"]))
        raise ValueError("done")

    grid = Looks([slow, slow], workers=2)
    messages = [Message(1, "train", 1, {}, {"seconds": 0.6}), Message(2, "train", 1, {}, {"seconds": 5.0})]
    started = time.monotonic()
    replies = send_and_receive(grid, messages, 2.0, 0.001)
    assert [r.error for r in replies] == ["done"] and 2.0 <= time.monotonic() - started < 4.0
    assert grid.count < 400  # of a thousandth of a second each there would be 2,000
