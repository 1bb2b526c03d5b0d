"""Tasks one after another: what is learned now, what of the ones before is kept, and how much was forgotten."""

import math
from collections.abc import Sequence

import numpy as np

from .client import Evaluation
from .history import Round
from .language import CausalLmLearner, Local
from .rows import Rows
from .slots import Slots
from .state import State


def task_index_of_round(round_number: int, n_rounds: int, n_tasks: int) -> int:
    """The task of a round, both from their first: each has as many rounds as the others, or one less."""
    return min(n_tasks - 1, (round_number - 1) * n_tasks // n_rounds)


class Stream(CausalLmLearner):
    """A client whose data sets come one after another: in a task's rounds it learns from that one's rows alone.

    parts    rows to learn from and rows to judge by, for every task; a client may have none of one
    """

    def __init__(self, slots: Slots, task_rows: Sequence[tuple[Rows, Rows]], local: Local, base: str):
        super().__init__(slots, *task_rows[0], local, base)
        self.parts = tuple(task_rows)
        self.tasks, self.anchors = len(self.parts), local.anchor > 0
        self.examples = max(len(rows) for rows, _ in self.parts)  # it has data, if not of the first task
        self.losses: tuple[float, ...] = ()

    def begin(self, round_number: int, rounds: int) -> None:
        self.task = task_index_of_round(round_number, rounds, self.tasks)
        self.rows, self.held_out = self.parts[self.task]
        self.examples = len(self.rows)

    def evaluate(self, state: State, delta: State) -> Evaluation:
        """Mean loss and accuracy over the tasks that the client has met so far, each weighing the same; `losses` has
        them one by one."""
        task_results = []
        for _, validation in self.parts[: self.task + 1]:
            self.held_out = validation
            task_results.append(super().evaluate(state, delta))
        self.losses = tuple(loss for loss, _ in task_results)
        known = [pair for pair in task_results if not math.isnan(pair[0])]
        if not known:
            return Evaluation(math.nan, math.nan)
        loss, right = (math.fsum(values) / len(known) for values in zip(*known, strict=True))
        return Evaluation(loss, right)

    def by_task(self) -> tuple[float, ...]:
        return self.losses


def forgetting_by_task(rounds: Sequence[Round]) -> list[float]:
    """Increase of loss of every task but the last, in nats per token, from the end of its own rounds to the last round:
    the mean over the clients that are known both times. NaN where none is.

    Source: backward transfer with its sign turned, Lopez-Paz and Ranzato 2017 (arXiv 1706.08840).
    """
    last = rounds[-1].updates
    tasks = max((len(result_of.by_task) for result_of in last.values()), default=0)
    result = []
    for task in range(tasks - 1):
        task_rounds = [r for r in rounds if max((len(t.by_task) for t in r.updates.values()), default=0) == task + 1]
        results_then = task_rounds[-1].updates if task_rounds else {}
        both = [(last[c].by_task, results_then[c].by_task) for c in last if c in results_then]
        worse = [a[task] - b[task] for a, b in both if len(a) > task < len(b)]
        worse = [value for value in worse if not np.isnan(value)]
        result.append(math.fsum(worse) / len(worse) if worse else math.nan)
    return result
