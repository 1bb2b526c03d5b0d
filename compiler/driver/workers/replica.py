"""A step as the one who asks runs it, in another process: it answers tasks instead of deciding.

A worker is told which recipe and which step, by its key: it reads the recipe, maps the checkpoint and earlier results
from the cache, and runs the same pass. Where the pass would score and choose, it scores what it is asked for, and cuts
what was chosen. The key is over the recipe, data, source and versions, so a worker that would compute anything else
has another one and says so. Messages are lines of JSON; nothing is pickled, and no script of a user is run again.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from ....dsl.syntax.diagnostics import Reject
from ...analysis.planning.machine_profile import profile_named_by, torch_threads_of_profile
from ...analysis.planning.plan import Plan, Stage
from ...core.cache import Cache
from ...core.memory import anonymous_memory_bytes, available_memory_bytes
from ...core.safe_read import read_json
from ...core.settings import Settings
from ...plugin.context import Context
from ...plugin.remote_scorer import Task, TaskSource
from ..api import Session, open_session, plan_all_pipelines
from ..pipeline import Build
from ..worker_team import TOKEN, worker_environment_facts


class WorkerMismatch(Exception):
    """This worker would compute something else, or has not what it takes; the message says why."""


class _Dismissed(BaseException):
    """The step is over, or another one is asked about."""


class Replica(TaskSource):
    """Answers lines with lines; one thread does all of it, so that the pass may wait for tasks in its own loops."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[tuple[str, Callable[[str], None]]] = SimpleQueue()
        self.message: dict[str, Any] | None = None  # that is answered next
        self.reply: Callable[[str], None] = lambda line: None
        self.description: str = ""  # the step that is running
        Thread(target=self._serve_steps, daemon=True).start()

    def submit(self, line: str, reply: Callable[[str], None]) -> None:
        """`reply` hears the answer, from another thread."""
        self.tasks.put((line, reply))

    def answer_line(self, line: str) -> str:
        """The answer, waited for."""
        answers: SimpleQueue[str] = SimpleQueue()
        self.submit(line, answers.put)
        return answers.get()

    # -- for the pass ----------------------------------------------------------------------------------------

    def next(self) -> Task:
        message = self._next_message()
        if message["about"] != self.description:
            raise _Dismissed
        self.message = None
        return message["task"]

    def put_back(self, task: Task) -> None:
        self.message = {"about": self.description, "task": task}

    def answer(self, value: Any, layer_forwards: float = 0.0) -> None:
        self.reply(json.dumps({"value": value, "work": layer_forwards}))

    # -- the thread ------------------------------------------------------------------------------------------

    def _next_message(self) -> dict[str, Any]:
        while self.message is None:
            line, self.reply = self.tasks.get()
            message = json.loads(line)
            if message.get("hello"):
                self.reply(json.dumps({"facts": worker_environment_facts(), "pid": os.getpid()}))
            else:
                self.message = {**message, "about": json.dumps(message["step"], sort_keys=True)}
        return self.message

    def _serve_steps(self) -> None:
        while True:
            message = self._next_message()
            self.description = message["about"]
            try:
                with ExitStack() as stack:
                    _run_pass_as_worker(json.loads(self.description), self, stack)
                raise WorkerMismatch(f"step {json.loads(self.description)['name']} asks no worker")
            except _Dismissed:
                continue
            except WorkerMismatch as mismatch:
                answer = {"misfit": str(mismatch)}
            except Reject as rejection:
                answer = {"failed": "; ".join(d.message for d in rejection.diagnostics)}
            except Exception as error:  # whatever it is, the one who asks computes the value and meets it, too
                answer = {"failed": f"{type(error).__name__}: {error}"}
            self.message, self.description = None, ""
            self.reply(json.dumps(answer))


def _run_pass_as_worker(step: Mapping[str, Any], task_source: TaskSource, stack: ExitStack) -> None:
    """Run a step's pass, which asks `task_source` for what to do."""
    _refuse_unshared_cache(step)
    os.environ.update(step["environment"])
    opened, plan, stage = _plan_and_find_stage(step)
    build = Build(plan, opened.context(plan.recipe, plan.pipeline), Cache(opened.settings.cache_dir))
    outcome = build.load_outcome(stage.source)
    settings = replace(
        opened.settings, max_memory=anonymous_memory_bytes() + available_memory_bytes() // max(1, step["size"])
    )
    workdir = _copy_journals_and_link_folders(Path(step["scratch"]), stack)
    ctx: Context = replace(build.step_context(stage), settings=settings, workdir=workdir, task_source=task_source)
    with torch_threads_of_profile(profile_named_by(stage.call), ctx):
        ctx.registry.make("pass", stage.call).result_of(outcome, ctx)


def _refuse_unshared_cache(step: Mapping[str, Any]) -> None:
    try:
        token = read_json(Path(step["scratch"]) / TOKEN, 1 << 10)
    except (OSError, ValueError, Reject):
        token = None
    if token != step["token"]:
        raise WorkerMismatch(f"{step['settings']['cache_dir']} is not the same folder here: give one that all share")


def _plan_and_find_stage(step: Mapping[str, Any]) -> tuple[Session, Plan, Stage]:
    settings = Settings(**{**step["settings"], "cache_dir": Path(step["settings"]["cache_dir"])})
    params = step["params"]
    try:
        opened = open_session(
            step["recipe"], settings=settings, set=step["set"], params=Path(params) if params else None
        )
        plan_list = plan_all_pipelines(opened)
    except Reject as rejection:
        raise WorkerMismatch(f"the recipe is refused here: {rejection.diagnostics[0].message}") from rejection
    for plan in plan_list:
        for stage in plan.stages:
            if stage.key == step["key"]:
                return opened, plan, stage
    raise WorkerMismatch(f"step {step['name']} has another key here: recipe, data or effc itself are not the same")


def _copy_journals_and_link_folders(coordinator_scratch: Path, stack: ExitStack) -> Path:
    """A folder of our own with what the one who asks knows: journals are copied, since they write to them."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="effc-worker-")))
    for path in coordinator_scratch.iterdir():
        if path.suffix == ".jsonl":
            shutil.copyfile(path, folder / path.name)
        elif path.is_dir():
            (folder / path.name).symlink_to(path.resolve())
    return folder
