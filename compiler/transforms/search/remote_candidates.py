"""Candidates that workers score: what they are asked for, and how one of them follows the search that asks."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ...plugin.remote_scorer import TaskSource
from .candidate import Candidate, Cut
from .choice import CutStrategy, Round

if TYPE_CHECKING:
    from ...plugin.remote_scorer import Task


def score_key(cut_index: int, candidate: Candidate) -> str:
    """Key of a score in the journal; `cut_index` is of cuts that were made before."""
    return f"{cut_index}:{candidate.name}"


def scoring_task(cuts: Sequence[Cut], candidate: Candidate) -> "Task":
    """The score of a candidate after these cuts."""
    return {"cuts": [[cut.name, cut.score] for cut in cuts], "candidate": candidate.name}


class ScoringWorker(CutStrategy):
    """In a worker: scores what is asked of a round, and takes the candidate that was chosen elsewhere.

    number   of cuts that were made before this round
    work     layer forwards so far
    """

    def __init__(self, task_source: TaskSource, cut_index: int, work: Callable[[], float]):
        self.task_source, self.number, self.work = task_source, cut_index, work

    def score_and_choose(self, round_: Round) -> Candidate | None:
        known = {candidate.name: candidate for candidate in round_.candidates}
        while True:
            task: Any = self.task_source.next()
            if len(task["cuts"]) > self.number:
                self.task_source.put_back(task)
                name, round_.scores[name] = task["cuts"][self.number]
                return known[name]
            assert len(task["cuts"]) == self.number, "asked about a cut that was made"
            before = self.work()
            (value,) = round_.score([known[task["candidate"]]])
            self.task_source.answer(value, self.work() - before)
