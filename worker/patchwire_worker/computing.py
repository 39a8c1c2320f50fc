"""Where a process computes on its cores: on one thread for each model, and elsewhere only for a while.

OpenMP keeps a team of threads for every thread that ever computed something large. While all of them together are no
more than there are cores, a team waits awake for its next operation; with one more, every team goes to sleep between
operations, and a forward pass of many small ones takes a quarter longer. So a model is loaded and learnt on threads
that end, and take their teams with them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def apart(work: Callable[[], T]) -> T:
    """What `work` returns or raises, done on a thread that ends with it."""
    future = Future[T]()
    threading.Thread(target=_run, args=(work, future), name="apart", daemon=True).start()
    try:
        return future.result()
    finally:
        del future  # or an error would keep this frame, and this frame the error


def _run(work: Callable[[], T], future: Future[T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
    finally:
        del future
