"""Garbage collection, less often while a graph is made.

A graph is tens of thousands of objects that all stay until it has run. Python's collector looks through what is new
again and again, finds nothing, takes it for long-lived, and every few sweeps looks through all that the program has
loaded for it, for a third of a second. So meanwhile it waits for more objects.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

_OBJECTS = 100_000
"""How many new objects it waits for meanwhile: those of a graph of thousands of nodes."""
_LOCK = threading.RLock()  # what ends may end while this is held, on the same thread


class Rarely:
    """From now on it collects more rarely, until the last of these has ended; one that is gone has."""

    _going_on = 0
    _before: tuple[int, int, int] | None = None

    def __init__(self) -> None:
        self._ended = False
        with _LOCK:
            thresholds = gc.get_threshold()
            if not Rarely._going_on and 0 < thresholds[0] < _OBJECTS:  # 0 is never
                Rarely._before = thresholds
                gc.set_threshold(_OBJECTS, *thresholds[1:])
            Rarely._going_on += 1

    def end(self) -> None:
        """It collects as before, if no other goes on."""
        with _LOCK:
            if self._ended:
                return
            self._ended = True
            Rarely._going_on -= 1
            if Rarely._going_on or Rarely._before is None:
                return
            if gc.get_threshold()[0] == _OBJECTS:  # nobody else has changed it
                gc.set_threshold(*Rarely._before)
            Rarely._before = None

    def __del__(self) -> None:
        self.end()


@contextlib.contextmanager
def rarely() -> Iterator[None]:
    """Collect more rarely in a block."""
    going_on = Rarely()
    try:
        yield
    finally:
        going_on.end()
