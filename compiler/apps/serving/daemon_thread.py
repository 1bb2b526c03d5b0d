"""Daemon threads that the event loop waits for."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


async def run_in_daemon_thread(function: Callable[..., Result], *arguments: object) -> Result:
    """Result of a function that may take minutes: it holds no worker of asyncio's pool, which all requests share, and
    a process that ends doesn't wait for it."""
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()  # from here on it can't be cancelled, and takes a result for certain

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=f"effc-{function.__name__}", daemon=True).start()
    return await asyncio.wrap_future(future)
