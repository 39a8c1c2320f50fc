"""One queue for each model: requests run one after the other, each on the model's own thread.

The event loop serves RPCs meanwhile; what happens on the thread comes back to it as events.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor

from patchwire.errors import BusyError, CancelledError, TimeoutError
from patchwire_worker.admission import Admitted
from patchwire_worker.config import Limits
from patchwire_worker.executor import Cost, Execution
from patchwire_worker.interleaving import Stopping
from patchwire_worker.planner import Plan


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


@dataclass
class _Job:
    admitted: Admitted
    plan: Plan
    stopping: Stopping = field(default_factory=Stopping)
    events: asyncio.Queue[Event | BaseException] = field(default_factory=asyncio.Queue)
    arrived: float = field(default_factory=time.perf_counter)
    timer: asyncio.TimerHandle | None = None


class Scheduler:
    """The queue of one model."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.limits = limits
        self._waiting: list[_Job] = []
        self._running: _Job | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"model-{name}")

    def close(self) -> None:
        """Stop what runs and take nothing more."""
        for job in (*self._waiting, *([self._running] if self._running else [])):
            job.stopping.stop(CancelledError("The server is shutting down."))
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def run(self, admitted: Admitted, plan: Plan) -> AsyncGenerator[Event, None]:
        """Run a plan when its turn has come, and tell what happens.

        Leaving the iteration early stops the pass at its next site.

        Raises:
            BusyError: too many requests wait.
            PatchwireError: of the kind of what went wrong.
        """
        if len(self._waiting) >= self.limits.queued:
            raise BusyError("The server's queue is full.", hint="Try again in a while.")
        job = _Job(admitted, plan)
        loop = asyncio.get_running_loop()
        position = len(self._waiting) + (self._running is not None)
        self._waiting.append(job)
        loop.run_in_executor(self._thread, self._execute, job, loop)
        try:
            if position:
                yield Queued(position)
            while True:
                event = await job.events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Done):
                    return
        finally:
            if job.timer is not None:
                job.timer.cancel()
            job.stopping.stop(CancelledError("The request was cancelled."))
            self._leave(job)

    def _leave(self, job: _Job) -> None:
        """Out of the queue: its turn has come, or nobody waits for it any more."""
        with contextlib.suppress(ValueError):
            self._waiting.remove(job)

    def _start_timer(self, job: _Job, loop: asyncio.AbstractEventLoop) -> None:
        late = TimeoutError(
            f"The request ran longer than the server's {self.limits.seconds:g} seconds.",
            hint="Ask for less in one trace.",
        )
        job.timer = loop.call_later(self.limits.seconds, job.stopping.stop, late)

    def _execute(self, job: _Job, loop: asyncio.AbstractEventLoop) -> None:
        """On the model's thread: run the job and send its events to the loop."""

        def send(event: Event | BaseException) -> None:
            # The loop is gone only when the server is, and then nobody listens.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(job.events.put_nowait, event)

        self._leave(job)
        self._running = job
        outcome: Event | BaseException
        try:
            if job.stopping.reason is not None:
                raise job.stopping.reason
            queued = time.perf_counter() - job.arrived
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._start_timer, job, loop)
            execution = Execution(
                job.admitted,
                job.plan,
                lambda node, tensor: send(Saved(node, tensor)),
                job.stopping,
                result_bytes=self.limits.result_bytes,
            )
            outcome = Done(execution.run(_told(send)), queued)
        except BaseException as error:
            outcome = error
        # In this order: whoever asks after hearing of the end finds the model free.
        self._running = None
        send(outcome)


def _told(send: Callable[[Event], None]) -> Callable[[int, int], None]:
    return lambda number, passes: send(Running(number, passes))
