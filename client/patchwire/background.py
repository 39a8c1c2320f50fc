"""Waiting for a server without blocking an event loop: the call waits on a thread of its own, and can be cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import Protocol, TypeVar

from patchwire.errors import CancelledError

T = TypeVar("T")


class Cancellable(Protocol):
    """What gRPC gives for a call that is under way."""

    def cancel(self) -> object:
        """End it."""


class Cancellation:
    """Says whether a request is still wanted; may be told so from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._call: Cancellable | None = None

    @property
    def cancelled(self) -> bool:
        """Whether it is not wanted any more."""
        return self._cancelled

    def cancel(self) -> None:
        """It is not wanted any more: the call that is under way ends, and no other one begins."""
        with self._lock:
            self._cancelled = True
            call = self._call
        if call is not None:
            call.cancel()

    def watch(self, call: Cancellable) -> None:
        """Remember the call that is under way."""
        with self._lock:
            self._call = call
        if self._cancelled:
            call.cancel()

    def check(self) -> None:
        """Go on only if it is wanted.

        Raises:
            CancelledError: it is not.
        """
        if self._cancelled:
            raise CancelledError("The request was cancelled.")


async def in_thread(work: Callable[[Cancellation], T]) -> T:
    """What `work` returns; the event loop goes on meanwhile.

    Cancelling this cancels the request and does not wait for it. Every call has a thread of its own, so that any number
    of them are under way at once, and none keeps the program from ending.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()
    cancellation = Cancellation()

    def settle(error: BaseException | None, *result: T) -> None:
        if outcome.done():  # cancelled
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(*result)

    def body() -> None:
        try:
            told: tuple[BaseException | None, *tuple[T, ...]] = (None, work(cancellation))
        except BaseException as error:
            told = (error,)
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
            loop.call_soon_threadsafe(settle, *told)

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(body,), name="patchwire-request", daemon=True).start()
    try:
        return await outcome
    except asyncio.CancelledError:
        cancellation.cancel()
        raise
