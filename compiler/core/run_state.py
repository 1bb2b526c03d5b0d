"""State of a compile: the limits on what runs now."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from .deadline import Deadline
from .memory import MemoryWatch


@dataclass
class RunState:
    """State of a compile, one object for its driver, its passes and its workers.

    deadline   of its searches, where they have one
    watch      of the memory of the running stage
    """

    deadline: Deadline | None = None
    watch: MemoryWatch | None = None

    def check(self) -> None:
        """Raises Reject (memory-bound) where the stage holds more than it may, and DeadlineExceeded in searches."""
        if self.watch:
            self.watch.refuse_exceeded_limit()
        if self.deadline:
            self.deadline.check()

    def interruptible_search(self) -> AbstractContextManager[None]:
        """Context in which `check` raises DeadlineExceeded once the time of a search is over."""
        return self.deadline.may_interrupt_search() if self.deadline else nullcontext()
