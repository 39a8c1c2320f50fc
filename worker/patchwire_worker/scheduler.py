"""One queue for each model: requests run one after the other, each on the model's own thread.

The event loop serves RPCs meanwhile; what happens on the thread comes back to it as events.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from patchwire.errors import BusyError, CancelledError, ConnectionLostError, PatchwireError, TimeoutError
from patchwire_worker.admission import Admitted
from patchwire_worker.config import Limits
from patchwire_worker.executor import Cost, Execution
from patchwire_worker.interleaving import Stopping
from patchwire_worker.planner import Plan

log = logging.getLogger(__name__)

E = TypeVar("E", bound=BaseException)


class InternalError(Exception):
    """A request failed in a way that it must not; the log has it."""


@dataclass(frozen=True)
class Queued:
    """The request waits behind so many others."""

    position: int


@dataclass(frozen=True)
class Running:
    """A pass begins."""

    number: int
    passes: int


@dataclass(frozen=True)
class Saved:
    """A saved value exists."""

    node: int
    tensor: Tensor


@dataclass(frozen=True)
class Done:
    """All is done."""

    cost: Cost
    seconds_queued: float


Event = Queued | Running | Saved | Done


@dataclass(eq=False)
class _Job:
    admitted: Admitted
    plan: Plan
    stopping: Stopping = field(default_factory=Stopping)
    events: asyncio.Queue[Event | BaseException] = field(default_factory=asyncio.Queue)
    arrived: float = field(default_factory=time.perf_counter)
    announced: bool = False
    timer: asyncio.TimerHandle | None = None


class Scheduler:
    """The queue of one model. Belongs to one event loop."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.limits = limits
        self._jobs: set[_Job] = set()
        self._waiting: list[_Job] = []
        self._running: _Job | None = None
        self._moving = threading.Lock()
        self._closed: PatchwireError | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"model-{name}")

    def close(self) -> None:
        """End what runs and what waits, and take nothing more."""
        if self._closed is not None:
            return
        self._closed = ConnectionLostError("The server is shutting down.")
        for job in self._jobs:
            job.stopping.stop(self._closed)
            job.events.put_nowait(ConnectionLostError(self._closed.message))
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def run(self, admitted: Admitted, plan: Plan) -> AsyncGenerator[Event, None]:
        """Run a plan when its turn has come, and tell what happens.

        Leaving the iteration early stops the pass at its next site.

        Raises:
            BusyError: too many requests wait.
            ConnectionLostError: the server is shutting down.
            InternalError: something failed in a way that it must not.
            PatchwireError: of the kind of what went wrong.
        """
        if self._closed is not None:
            raise ConnectionLostError(self._closed.message)
        position = self._ahead()
        if position > self.limits.queued:
            raise BusyError("The server's queue is full.", hint="Try again in a while.")
        job = _Job(admitted, plan)
        loop = asyncio.get_running_loop()
        try:
            self._jobs.add(job)
            self._waiting.append(job)
            # To be woken in the middle of a pass costs milliseconds: what can be said and set before it is done here.
            job.announced = position == 0 and bool(plan.passes)
            if position == 0:
                self._start_timer(job, loop)
            loop.run_in_executor(self._thread, self._next, loop)
            if position:
                yield Queued(position)
            elif job.announced:
                yield Running(1, len(plan.passes))
            while True:
                event = await job.events.get()
                if isinstance(event, BaseException):
                    try:
                        raise event
                    finally:
                        del event  # or the error would keep this frame, and this frame the error
                yield event
                if isinstance(event, Done):
                    return
        finally:
            if job.timer is not None:
                job.timer.cancel()
                job.timer = None
            job.stopping.stop(CancelledError("The request was cancelled."))
            self._jobs.discard(job)
            self._leave(job)
            del job

    def _ahead(self) -> int:
        """How many come before the next one."""
        with self._moving:
            return len(self._waiting) + (self._running is not None)

    def _leave(self, job: _Job) -> None:
        """Out of the queue: nobody waits for it any more."""
        with self._moving, contextlib.suppress(ValueError):
            self._waiting.remove(job)

    def _start_timer(self, job: _Job, loop: asyncio.AbstractEventLoop) -> None:
        if job.stopping.reason is not None:  # it has ended already
            return
        late = TimeoutError(
            f"The request ran longer than the server's {self.limits.seconds:g} seconds.",
            hint="Ask for less in one trace.",
        )
        job.timer = loop.call_later(self.limits.seconds, job.stopping.stop, late)

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        """On the model's thread: run the job whose turn it is and send its events to the loop."""
        with self._moving:
            if not self._waiting:  # somebody has left
                return
            job = self._running = self._waiting.pop(0)

        def send(event: Event | BaseException) -> None:
            # The loop is gone only when the server is, and then nobody listens.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(job.events.put_nowait, event)

        if job.timer is None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._start_timer, job, loop)
        outcome = self._outcome(job, send)
        # In this order: whoever asks after hearing of the end finds the model free.
        self._running = None
        send(outcome)

    def _outcome(self, job: _Job, send: Callable[[Event], None]) -> Done | Exception:
        queued = time.perf_counter() - job.arrived
        try:
            if job.stopping.reason is not None:
                raise job.stopping.reason
            execution = Execution(
                job.admitted,
                job.plan,
                lambda node, tensor: send(Saved(node, tensor)),
                job.stopping,
                result_bytes=self.limits.result_bytes,
            )
            return Done(execution.run(_told(send, job.announced)), queued)
        except PatchwireError as error:
            return _without_frames(error)
        except BaseException as error:
            log.error("a request failed in a way that it must not", exc_info=error)
            _without_frames(error)
            return InternalError(type(error).__name__)


def _told(send: Callable[[Event], None], announced: bool) -> Callable[[int, int], None]:
    """Sends the beginning of each pass; of the first only if it was not announced."""

    def tell(number: int, passes: int) -> None:
        if number > 1 or not announced:
            send(Running(number, passes))

    return tell


def _without_frames(error: E) -> E:
    """The same error, without the frames that it and its causes came through: they hold the values of the run."""
    chain: list[BaseException] = [error]
    while chain:
        each = chain.pop()
        chain += [other for other in (each.__cause__, each.__context__) if other is not None]
        each.__traceback__ = each.__cause__ = each.__context__ = None
    return error
