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
from ...dsl.syntax.diagnostics import Fault, Reject
from ..analysis.planning.keys import versions
from ..core.events import Said, Warned
from ..core.journal import Journal
from ..core.quantity import counted, seconds
from ..core.settings import Settings
from ..core.warned import worker_left_out
from ..plugin.remote_scorer import Crew, Task
from .response_timeouts import Silence
from .worker_transport import Hands

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


def facts() -> dict[str, str]:
    """What the bits of a result depend on beside the step's key, and the libraries that the key reads."""
    import torch

    return {**versions(), "processor": torch.backends.cpu.get_cpu_capability(), "node": platform.node()}


@dataclass
class Team:
    """Workers of one compile, hired when they are first asked for.

    recipe   the recipe and what the command line said of it, as workers are told
    facts    versions and processor that theirs are compared with
    idle     places whose worker waits
    pids     of workers, by place, on their own machines
    busy     place -> (key of the step, key of the task); ("", "") of one that has not said yet what it is
    """

    hands: Hands
    settings: Settings
    recipe: Mapping[str, Any]
    facts: Mapping[str, str]
    hired: bool = False
    idle: list[int] = field(default_factory=list)
    busy: dict[int, tuple[str, str]] = field(default_factory=dict)
    lost: dict[int, int] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    work: float = 0.0
    pids: dict[int, int] = field(default_factory=dict)
    silence: Silence = field(default_factory=Silence)

    def hire(self) -> None:
        self.hired = True
        for place in range(self.hands.size):
            self._hire(place)
        self.settings.tell(Said(f"{counted(self.hands.size, 'worker')} of {counted(self.threads, 'thread')} each"))

    @property
    def threads(self) -> int:
        return self.settings.threads or 1

    def check(self) -> None:
        """Raises where the memory or the time that was granted is used up."""
        for bound in (self.settings.watch, self.settings.deadline):
            if bound:
                bound.check()

    def _hire(self, place: int) -> None:
        self.hands.hire(place)
        self.hands.send(place, json.dumps({"hello": True}))
        self.busy[place] = ("", "")
        self.silence.hire(place)

    @property
    def is_alone(self) -> bool:
        """Whether there is no worker left."""
        return self.hired and not self.idle and not self.busy

    def begin(self, place: int, task: tuple[str, str], line: str) -> None:
        self.idle.remove(place)
        self.busy[place] = task
        self.silence.begin(place, task[0])
        self.hands.send(place, line)

    def receive(self, patience: float) -> Sequence[tuple[int, str, bool]]:
        """What has come in, and who is lost; one that is silent for too long is let go, and lost as others are."""
        began = time.monotonic()
        found = list(self.hands.receive(patience))
        self.silence.wait(time.monotonic() - began)
        answered = {place for place, _, _ in found}
        for place in sorted(self.silence.owed.keys() - answered) if patience else ():
            if silent := self.silence.news(place):
                self.settings.tell(Said(f"worker {place + 1} has not answered for {seconds(silent)}"))
            if self.silence.is_lost(place, self.hands.is_stopped):
                self.hands.dismiss(place)
                found.append((place, f"it did not answer for {seconds(self.silence.owed[place].waited)}", False))
        return found

    def greet(self, place: int, theirs: Mapping[str, str]) -> None:
        """Let a worker in whose versions are ours."""
        other = [name for name, version in self.facts.items() if name != "node" and theirs.get(name) != version]
        if not other:
            self.idle.append(place)
            return
        name = other[0]
        self.refuse(place, f"it has {name} {theirs.get(name)}, and here is {self.facts[name]}", theirs.get("node", ""))

    def refuse(self, place: int, why: str, node: str = "") -> None:
        self.idle = [other for other in self.idle if other != place]
        self.refused[place] = why
        where = f" on {node}" if node else ""
        self.settings.tell(Warned(worker_left_out(f"worker {place + 1}{where} is left out: {why}")))
        if len(self.refused) == self.hands.size:
            raise Reject(
                no_workers(
                    f"none of {counted(self.hands.size, 'worker')} can be used: {why}",
                    help="give them the same environment and a shared --cache-dir, or leave --workers out",
                )
            )

    def lose(self, place: int, why: str, key: str) -> None:
        """Say that a worker was lost, and hire another in its place, unless it is lost again and again."""
        self.lost[place] = self.lost.get(place, 0) + 1
        again = self.lost[place] < LOSSES
        then = "its task is done again" if key else "it was doing nothing"
        left = "" if again else "; its place stays empty"
        self.settings.tell(Said(f"worker {place + 1} was lost ({why}): {then}{left}"))
        if again:
            self._hire(place)

    def end(self) -> None:
        if self.hired:
            self.hands.end()


@dataclass
class StepCrew(Crew):
    """The team at work for one step.

    step       what a worker is told of it
    queue      key -> task, the most wanted first
    failures   tasks that a worker could not do, or that workers were lost in
    """

    team: Team
    step: Mapping[str, Any]
    queue: dict[str, Task] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    begun: dict[str, Task] = field(default_factory=dict)
    met: bool = False

    @property
    def size(self) -> int:
        return self.team.hands.size

    @property
    def work(self) -> float:
        return self.team.work

    def want(self, journal: Journal, tasks: Mapping[str, Task]) -> None:
        self._meet()
        self.queue = {key: t for key, t in tasks.items() if key not in journal.known and not self._is_begun(key)}
        self._look(journal, 0.0)

    def fetch(self, journal: Journal, key: str, task: Task, compute: Callable[[], Any]) -> Any:
        if key not in journal.known and not self._is_begun(key):
            self._meet()
            self.queue = {key: task, **self.queue}
        while key not in journal.known:
            if self.team.is_alone or self.failures.get(key, 0) >= LOSSES:
                self.queue.pop(key, None)
                break
            self._look(journal, WAIT)
        return journal.remember(key, compute)

    def _is_begun(self, key: str) -> bool:
        return (self.step["key"], key) in self.team.busy.values()

    def _meet(self) -> None:
        """What a worker needs before the first task; workers are hired when a step first asks for some."""
        if self.met:
            return
        self.met = True
        (Path(self.step["scratch"]) / TOKEN).write_text(json.dumps(self.step["token"]))
        if not self.team.hired:
            self.team.hire()
        self.step = {**self.step, "size": self.size}

    def _look(self, journal: Journal, patience: float) -> None:
        """Hand out what is wanted, and take what has come in."""
        self._hand_out()
        if patience:
            self.team.check()
        for place, text, alive in self.team.receive(patience):
            step, key = self.team.busy.pop(place, ("", ""))
            key = key if step == self.step["key"] else ""  # of an earlier step nothing is wanted any more
            answer = json.loads(text) if alive else {}
            self.team.silence.end(place, measures="value" in answer or "facts" in answer)
            if alive:
                self._take(journal, place, key, answer)
                continue
            self.team.idle = [other for other in self.team.idle if other != place]
            self._again(key)
            self.team.lose(place, text, key)
        self._hand_out()

    def _hand_out(self) -> None:
        while self.queue and self.team.idle:
            key = next(iter(self.queue))
            self.begun[key] = self.queue.pop(key)
            line = json.dumps({"step": self.step, "task": self.begun[key]})
            self.team.begin(self.team.idle[0], (self.step["key"], key), line)

    def _take(self, journal: Journal, place: int, key: str, answer: Mapping[str, Any]) -> None:
        if "facts" in answer:
            self.team.pids[place] = answer["pid"]
            self.team.greet(place, answer["facts"])
            return
        if "misfit" in answer:
            self._again(key, counts=False)
            self.team.refuse(place, answer["misfit"])
            return
        self.team.idle.append(place)
        if "failed" in answer:  # whoever asked computes it, and meets the same
            self.failures[key] = LOSSES
            return
        self.team.lost.pop(place, None)
        self.team.work += answer["work"]
        if key in self.begun:
            journal.remember(key, lambda: answer["value"])

    def _again(self, key: str, counts: bool = True) -> None:
        if key in self.begun:
            self.queue = {key: self.begun.pop(key), **self.queue}
            self.failures[key] = self.failures.get(key, 0) + counts


def step_of(name: str, key: str, scratch: Path, team: Team) -> dict[str, Any]:
    """What a worker is told of a step."""
    environment = {n: value for n, value in os.environ.items() if n.startswith(PREFIX)}
    return {
        **team.recipe,
        "name": name,
        "key": key,
        "scratch": str(scratch.resolve()),
        "token": secrets.token_hex(8),
        "environment": environment,
    }
