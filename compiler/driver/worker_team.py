"""The crew of a compile: who computes what, and what happens when one is lost."""

import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...dsl.checker.overrides import PREFIX
from ...dsl.syntax.diagnostics import Fault
from ..analysis.planning.keys import library_versions
from ..core.events import Said, Warned
from ..core.journal import Journal
from ..core.quantity import count_text, duration_text
from ..core.run_state import RunState
from ..core.settings import Settings
from ..core.warned import worker_left_out
from ..plugin.remote_scorer import RemoteScorer, Task
from .response_timeouts import ResponseTimeouts
from .worker_transport import WorkerTransport

no_workers = Fault(
    "no-workers",
    "None of the workers of a compile may work for it.\n\n"
    "Each says which versions it has and whether it reads the same cache; one that would compute something else is "
    "left out, since a result is the same whoever computed it.",
    exit="environment",
)
TOKEN = "crew.json"  # in the step's scratch folder: whoever reads it shares the folder
LOSSES = 3  # of a place or of a task in a row, before it is given up
WAIT = 1.0  # seconds after which a worker that is silent is looked for again


def worker_environment_facts() -> dict[str, str]:
    """Facts that the bits of a result depend on besides the step's key, and the libraries that the key reads."""
    import torch

    return {**library_versions(), "processor": torch.backends.cpu.get_cpu_capability(), "node": platform.node()}


@dataclass
class Team:
    """Workers of one compile, hired when they are first asked for.

    recipe   the recipe and what the command line said of it, as workers are told
    facts    versions and processor that theirs are compared with
    idle     places whose worker waits
    pids     of workers, by place, on their own machines
    busy     place -> (key of the step, key of the task); ("", "") of one that has not said yet what it is
    """

    transport: WorkerTransport
    settings: Settings
    run: RunState
    recipe: Mapping[str, Any]
    facts: Mapping[str, str]
    hired: bool = False
    idle: list[int] = field(default_factory=list)
    busy: dict[int, tuple[str, str]] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)
    rejected: dict[int, str] = field(default_factory=dict)
    work: float = 0.0
    pids: dict[int, int] = field(default_factory=dict)
    timeouts: ResponseTimeouts = field(default_factory=ResponseTimeouts)

    def start_workers(self) -> None:
        self.hired = True
        for index in range(self.transport.size):
            self._start_worker(index)
        self.settings.on_event(
            Said(f"{count_text(self.transport.size, 'worker')} of {count_text(self.threads, 'thread')} each")
        )

    @property
    def threads(self) -> int:
        return self.settings.threads or 1

    def _start_worker(self, index: int) -> None:
        self.transport.start_worker(index)
        self.transport.send(index, json.dumps({"hello": True}))
        self.busy[index] = ("", "")
        self.timeouts.begin_greeting(index)

    @property
    def is_empty(self) -> bool:
        """Whether there is no worker left."""
        return self.hired and not self.idle and not self.busy

    def send_task(self, index: int, step_and_task_key: tuple[str, str], line: str) -> None:
        self.idle.remove(index)
        self.busy[index] = step_and_task_key
        self.timeouts.begin_response(index, step_and_task_key[0])
        self.transport.send(index, line)

    def receive_or_drop_silent(self, timeout_s: float) -> Sequence[tuple[int, str, bool]]:
        """Received answers and lost workers; one that is silent for too long is stopped, and counts as lost."""
        start_time = time.monotonic()
        replies = list(self.transport.receive(timeout_s))
        self.timeouts.add_waited_seconds(time.monotonic() - start_time)
        answered = {index for index, _, _ in replies}
        for index in sorted(self.timeouts.owed.keys() - answered) if timeout_s else ():
            if silent := self.timeouts.silent_seconds_to_report(index):
                self.settings.on_event(Said(f"worker {index + 1} has not answered for {duration_text(silent)}"))
            if self.timeouts.is_stale(index, self.transport.is_stopped):
                self.transport.stop_worker(index)
                replies.append(
                    (index, f"it did not answer for {duration_text(self.timeouts.owed[index].waited)}", False)
                )
        return replies

    def admit_or_refuse_worker(self, index: int, worker_facts: Mapping[str, str]) -> None:
        """Let a worker in whose versions are ours."""
        other = [name for name, version in self.facts.items() if name != "node" and worker_facts.get(name) != version]
        if not other:
            self.idle.append(index)
            return
        name = other[0]
        self.refuse_worker(
            index,
            f"it has {name} {worker_facts.get(name)}, and here is {self.facts[name]}",
            worker_facts.get("node", ""),
        )

    def refuse_worker(self, index: int, reason: str, node: str = "") -> None:
        self.idle = [other for other in self.idle if other != index]
        self.rejected[index] = reason
        where = f" on {node}" if node else ""
        self.settings.on_event(Warned(worker_left_out(f"worker {index + 1}{where} is left out: {reason}")))
        if len(self.rejected) == self.transport.size:
            raise no_workers(
                f"none of {count_text(self.transport.size, 'worker')} can be used: {reason}",
                help="give them the same environment and a shared --cache-dir, or leave --workers out",
            ).rejection()

    def handle_lost_worker(self, index: int, reason: str, task_key: str) -> None:
        """Say that a worker was lost, and hire another in its place, unless it is lost again and again."""
        self.failures[index] = self.failures.get(index, 0) + 1
        is_replaced = self.failures[index] < LOSSES
        then = "its task is done again" if task_key else "it was doing nothing"
        left = "" if is_replaced else "; its place stays empty"
        self.settings.on_event(Said(f"worker {index + 1} was lost ({reason}): {then}{left}"))
        if is_replaced:
            self._start_worker(index)

    def end(self) -> None:
        if self.hired:
            self.transport.end()


@dataclass
class StepScorer(RemoteScorer):
    """The team at work for one step.

    step       what a worker is told of it
    queue      key -> task, the most wanted first
    failures   tasks that a worker could not do, or that workers were lost in
    """

    team: Team
    step: Mapping[str, Any]
    queue: dict[str, Task] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    running: dict[str, Task] = field(default_factory=dict)
    met: bool = False

    @property
    def size(self) -> int:
        return self.team.transport.size

    @property
    def work(self) -> float:
        return self.team.work

    def prefetch(self, journal: Journal, tasks: Mapping[str, Task]) -> None:
        self._start_workers_and_publish_step_once()
        self.queue = {key: t for key, t in tasks.items() if key not in journal.known and not self._is_running(key)}
        self._send_and_receive_once(journal, 0.0)

    def value_from_workers(self, journal: Journal, key: str, task: Task, compute: Callable[[], Any]) -> Any:
        if key not in journal.known and not self._is_running(key):
            self._start_workers_and_publish_step_once()
            self.queue = {key: task, **self.queue}
        while key not in journal.known:
            if self.team.is_empty or self.failures.get(key, 0) >= LOSSES:
                self.queue.pop(key, None)
                break
            self._send_and_receive_once(journal, WAIT)
        return journal.get_or_compute(key, compute)

    def _is_running(self, key: str) -> bool:
        return (self.step["key"], key) in self.team.busy.values()

    def _start_workers_and_publish_step_once(self) -> None:
        """Send a worker what it needs before the first task; workers start when a step first needs them."""
        if self.met:
            return
        self.met = True
        (Path(self.step["scratch"]) / TOKEN).write_text(json.dumps(self.step["token"]))
        if not self.team.hired:
            self.team.start_workers()
        self.step = {**self.step, "size": self.size}

    def _send_and_receive_once(self, journal: Journal, timeout_s: float) -> None:
        """Hand out what is wanted, and take what has come in."""
        self._send_tasks_to_idle()
        if timeout_s:
            self.team.run.check()
        for index, text, alive in self.team.receive_or_drop_silent(timeout_s):
            step, key = self.team.busy.pop(index, ("", ""))
            key = key if step == self.step["key"] else ""  # of an earlier step nothing is wanted any more
            answer = json.loads(text) if alive else {}
            self.team.timeouts.end_response(index, is_measured="value" in answer or "facts" in answer)
            if alive:
                self._handle_answer(journal, index, key, answer)
                continue
            self.team.idle = [other for other in self.team.idle if other != index]
            self._requeue(key)
            self.team.handle_lost_worker(index, text, key)
        self._send_tasks_to_idle()

    def _send_tasks_to_idle(self) -> None:
        while self.queue and self.team.idle:
            key = next(iter(self.queue))
            self.running[key] = self.queue.pop(key)
            line = json.dumps({"step": self.step, "task": self.running[key]})
            self.team.send_task(self.team.idle[0], (self.step["key"], key), line)

    def _handle_answer(self, journal: Journal, index: int, key: str, answer: Mapping[str, Any]) -> None:
        if "facts" in answer:
            self.team.pids[index] = answer["pid"]
            self.team.admit_or_refuse_worker(index, answer["facts"])
            return
        if "misfit" in answer:
            self._requeue(key, is_failure=False)
            self.team.refuse_worker(index, answer["misfit"])
            return
        self.team.idle.append(index)
        if "failed" in answer:  # whoever asked computes it, and meets the same
            self.failures[key] = LOSSES
            return
        self.team.failures.pop(index, None)
        self.team.work += answer["work"]
        if key in self.running:
            journal.get_or_compute(key, lambda: answer["value"])

    def _requeue(self, key: str, is_failure: bool = True) -> None:
        if key in self.running:
            self.queue = {key: self.running.pop(key), **self.queue}
            self.failures[key] = self.failures.get(key, 0) + is_failure


def make_step_message(name: str, key: str, scratch: Path, team: Team) -> dict[str, Any]:
    """Message that tells a worker about a step."""
    environment = {n: value for n, value in os.environ.items() if n.startswith(PREFIX)}
    return {
        **team.recipe,
        "name": name,
        "key": key,
        "scratch": str(scratch.resolve()),
        "token": secrets.token_hex(8),
        "environment": environment,
    }
