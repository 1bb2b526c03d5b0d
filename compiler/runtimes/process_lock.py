"""A lock that a child process begins with anew."""

import os
import threading
from contextlib import AbstractContextManager
from typing import Any


class ProcessLock:
    """A lock of one process: who held it in a parent process is not in a child. Copies of a model share it."""

    def __init__(self) -> None:
        self._lock, self._process = threading.RLock(), os.getpid()

    def of_this_process(self) -> AbstractContextManager[Any]:
        if self._process != os.getpid():
            self._lock, self._process = threading.RLock(), os.getpid()
        return self._lock
