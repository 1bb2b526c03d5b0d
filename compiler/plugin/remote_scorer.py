"""Interface between a search and its workers, on both sides."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..core.journal import Journal

Task = Mapping[str, Any]  # JSON; all that a value depends on beside the step


class RemoteScorer(ABC):
    """Processes that compute values of the step that runs.

    A value is asked for under the key that it has in the step's journal, and stands there before it is returned: the
    answer is the one that `compute` gives here, whoever computed it, in whatever order.
    """

    @abstractmethod
    def prefetch(self, journal: "Journal", tasks: Mapping[str, Task]) -> None:
        """These values will be asked for soon, the first one first; what was wanted before and not begun is not
        wanted any more."""

    @abstractmethod
    def value_from_workers(self, journal: "Journal", key: str, task: Task, compute: Callable[[], Any]) -> Any:
        """A value, waited for; `compute` where no worker gives it."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of workers."""

    @property
    @abstractmethod
    def work(self) -> float:
        """Total work of all answers, in the unit of the searches' own counts."""


class TaskSource(ABC):
    """In a worker: what the one who runs the same step asks of it. Never returns when the step is over."""

    @abstractmethod
    def next(self) -> Task:
        """The next task, waited for."""

    @abstractmethod
    def put_back(self, task: Task) -> None:
        """Let `next` give a task again."""

    @abstractmethod
    def answer(self, value: Any, layer_forwards: float = 0.0) -> None:
        """Answer the task that `next` gave last; JSON."""
