"""Runs that are killed at some moment, whatever else the machine does."""

import os
import random
import signal
import time
import traceback
from collections.abc import Callable


def kill_often(run: Callable[[], object], again: Callable[[], object], span: float, seed: int, times: int = 3) -> None:
    """Start `run` in forked processes and kill each, until so many were killed in it, the last one too.

    A run that goes on where the one before was killed ends some day: then `again` forgets all, and moments come
    nearer, since this machine is quicker than when `span`, the seconds of a whole run, was taken.
    """
    moments, killed = random.Random(seed), 0
    while killed < times:
        process = os.fork()
        if process == 0:
            try:
                run()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        time.sleep(moments.uniform(0.1, 0.6) * span)
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        if os.WIFSIGNALED(status):
            killed += 1
            continue
        assert os.WEXITSTATUS(status) == 0, "the run failed"
        again()
        span /= 2
        assert span > 1e-3, "no run lasts long enough to be killed in it"
