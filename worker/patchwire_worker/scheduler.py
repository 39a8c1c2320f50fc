"""One queue for each model: requests run in their order on the model's own thread, and those that can share a pass run
together.

The event loop serves RPCs meanwhile; what happens on the thread comes back to it as events.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from patchwire import framing, tensors
from patchwire.errors import BusyError, CancelledError, ConnectionLostError, PatchwireError, TimeoutError
from patchwire_worker.admission import Admitted
from patchwire_worker.config import MIB, Limits
from patchwire_worker.executor import Cost, Execution, Iteration
from patchwire_worker.interleaving import Stopping
from patchwire_worker.kept import KeptStore
from patchwire_worker.placing import Group, Pass, placed
from patchwire_worker.planner import Gathering, Plan
from patchwire_worker.running import run, run_together
from patchwire_worker.waiting import Disk, OnDisk, WaitingFile

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
    """A saved value exists; its chunks follow."""

    node: int
    dtype: torch.dtype
    shape: torch.Size
    iteration: Iteration | None = None


@dataclass(frozen=True)
class Chunk:
    """The next bytes of the value that was saved last."""

    response: bytes | OnDisk
    """The response whose only event is this chunk."""


@dataclass(frozen=True)
class Kept:
    """A value is kept beyond the request."""

    node: int
    handle: bytes
    tensor: Tensor
    seconds: float


@dataclass(frozen=True)
class Absent:
    """A saved value will not exist."""

    node: int
    iteration: Iteration | None = None


@dataclass(frozen=True)
class Iterated:
    """Iterations of a loop are done."""

    loop: int
    done: int
    count: int


@dataclass(frozen=True)
class Tokens:
    """A generation has a new token for each row."""

    trace: int
    invoke: int
    ids: list[int]


@dataclass(frozen=True)
class Logged:
    """What some values look like."""

    node: int
    text: str
    iteration: Iteration | None = None


@dataclass(frozen=True)
class Done:
    """All is done."""

    cost: Cost
    seconds_queued: float


Event = Queued | Running | Saved | Chunk | Kept | Absent | Iterated | Tokens | Logged | Done


_CHUNK_BYTES = MIB
_LOOK_SECONDS = 0.02
_WAKE_BYTES = 64 * 1024
_STOP_SECONDS = 0.1
_TELL_SECONDS = 0.05
_LINGER = 0.25
"""The part of the last pass's time that a request may wait for others that were there."""
_LONGEST_LINGER = 0.1
_LONGEST_GAP = 0.02
"""How long it waits for the next of them, who may have left."""
_LINGER_STEP = 0.0005
_TAKEN_AT_ONCE = 4 * MIB
_AHEAD_BYTES = 64 * MIB
_PATIENCE_SECONDS = 0.5


@dataclass(eq=False)
class _Job:
    admitted: Admitted
    plan: Plan
    queued: bool
    disk: Disk
    ahead: int | None = None
    company: Callable[[], bool] = lambda: False
    """Whether the model has somebody else's requests too."""
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    stopping: Stopping = field(default_factory=Stopping)
    happened: deque[Event | BaseException] = field(default_factory=deque)
    arrived: float = field(default_factory=time.perf_counter)
    started: bool = False
    left: bool = False
    """Whether nobody listens any more."""
    _woken: asyncio.Event = field(default_factory=asyncio.Event)
    _asleep: bool = False
    """Whether the event loop waits for something to happen, and need be woken when it does."""
    _bytes: int = 0
    _untaken: int = 0
    """Bytes of the saved values in memory that have not been sent."""
    _in_hand: int = 0
    """Those of them that are being sent."""
    _slow: bool = False
    """Whether waiting for whoever takes them was in vain."""
    _room: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self._file = WaitingFile(self.disk)

    def wake(self) -> None:
        """Have the event loop look at what happened now; may be called from any thread."""
        # The loop is gone only when the server is, and then nobody listens.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._woken.set)

    def tell(self, event: Event | BaseException) -> None:
        """Add an event, on the model's thread.

        To be woken in the middle of a pass costs it milliseconds, so the loop is woken only where it matters: at the
        end, and when there are bytes to send meanwhile. It sees the rest when it looks by itself.

        Raises:
            LimitError: a saved value has to wait, and there is no room for it on the disk.
            ExecutionError: it cannot be written there.
        """
        if isinstance(event, Chunk):
            response = self._with_room(event.response)
            if response is None:
                return
            event = Chunk(response)
            self._bytes += len(event.response)
        self.happened.append(event)
        if isinstance(event, (Done, BaseException)) or self._bytes >= _WAKE_BYTES:
            self._bytes = 0
            if self._asleep:
                self._asleep = False
                self.wake()

    def _with_room(self, response: bytes | OnDisk) -> bytes | OnDisk | None:
        """A part of a saved value, in memory if it is taken soon, or else on the disk; None if nobody will take it.

        Somebody far away must not hold up the model: it waits a moment for them if nobody else wants it, and after a
        moment in vain not again until they have caught up. Only if it may not get ahead of the disk itself, as that of
        a detached job, it waits for as long as it takes.
        """
        size = len(response)
        with self._room:
            if not self._fits(size) and (self.ahead is not None or not (self._slow or self.company())):
                patient_until = time.monotonic() + (math.inf if self.ahead is not None else _PATIENCE_SECONDS)
                while not self._fits(size) and self.stopping.reason is None and time.monotonic() < patient_until:
                    self._room.wait(min(_STOP_SECONDS, patient_until - time.monotonic()))
            if self._fits(size) or self.ahead is not None:
                self._untaken += size
                return response
            self._slow = True
        assert isinstance(response, bytes)
        return self._file.put(response)

    @property
    def _most_untaken(self) -> int:
        return _AHEAD_BYTES if self.ahead is None else self.ahead

    def _fits(self, size: int) -> bool:
        return not self._untaken or self._untaken + size <= self._most_untaken

    async def news(self, seconds: float | None) -> list[Event | BaseException]:
        """What happened since the last time, which has been sent: waits for something, or so many seconds at most.

        No more than a few chunks at a time, so that they are all that sending keeps in memory.
        """
        if self._in_hand:
            with self._room:
                self._untaken -= self._in_hand
                self._in_hand = 0
                self._slow = self._slow and self._untaken > 0
                # Not for each chunk: to change between threads takes longer than to copy one.
                if self._untaken <= self._most_untaken // 2:
                    self._room.notify()
        self._asleep = True  # before this looks: whatever happens afterwards wakes it
        if not self.happened:
            timer = None if seconds is None else self.loop.call_later(seconds, self._woken.set)
            await self._woken.wait()
            if timer is not None:
                timer.cancel()
        self._asleep = False
        self._woken.clear()
        news: list[Event | BaseException] = []
        taken = 0
        while self.happened and taken < _TAKEN_AT_ONCE:
            news.append(event := self.happened.popleft())
            if isinstance(event, Chunk):
                taken += len(event.response)
                self._in_hand += len(event.response) if isinstance(event.response, bytes) else 0
        return news

    def close(self) -> None:
        """Nobody listens any more."""
        self.left = True
        self._file.close()


class _Teller:
    """Listens to an execution and tells its job."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._told = 0.0

    def running(self, number: int, passes: int) -> None:
        self._job.tell(Running(number, passes))

    def saved(self, node: int, tensor: Tensor, iteration: Iteration | None = None) -> None:
        responses = framing.responses(tensors.pieces(tensor, _CHUNK_BYTES))
        # Copied before anything is told: what is small goes in one message with what announces it.
        response = next(responses, None)
        self._job.tell(Saved(node, tensor.dtype, tensor.shape, iteration))
        while response is not None and not self._job.left:
            self._job.tell(Chunk(response))
            response = next(responses, None)

    def kept(self, node: int, handle: bytes, tensor: Tensor, seconds: float) -> None:
        self._job.tell(Kept(node, handle, tensor, seconds))

    def absent(self, node: int, iteration: Iteration | None = None) -> None:
        self._job.tell(Absent(node, iteration))

    def iterated(self, loop: int, done: int, count: int, *, last: bool) -> None:
        now = time.perf_counter()
        if last or now - self._told > _TELL_SECONDS:
            self._told = now
            self._job.tell(Iterated(loop, done, count))

    def tokens(self, trace: int, invoke: int, ids: list[int]) -> None:
        self._job.tell(Tokens(trace, invoke, ids))

    def logged(self, node: int, text: str, iteration: Iteration | None = None) -> None:
        self._job.tell(Logged(node, text, iteration))


class Scheduler:
    """The queue of one model. Belongs to one event loop."""

    def __init__(self, name: str, limits: Limits, kept: KeptStore | None = None, disk: Disk | None = None) -> None:
        self.limits = limits
        self._disk = disk or Disk(limits.waiting_bytes)
        self._kept = kept
        self._jobs: set[_Job] = set()
        self._waiting: list[_Job] = []
        self._running: list[_Job] = []
        self._moving = threading.Lock()
        self._last = (0, 0.0)
        self._closed: PatchwireError | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"model-{name}")

    def close(self) -> None:
        """End what runs and what waits, and take nothing more."""
        if self._closed is not None:
            return
        self._closed = ConnectionLostError("The server is shutting down.")
        for job in self._jobs:
            job.stopping.stop(self._closed)
            job.happened.append(ConnectionLostError(self._closed.message))
            job.wake()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def check_room(self) -> int:
        """How many come before the next one.

        Raises:
            BusyError: too many requests wait.
            ConnectionLostError: the server is shutting down.
        """
        if self._closed is not None:
            raise ConnectionLostError(self._closed.message)
        position = self._ahead()
        if position > self.limits.queued:
            raise BusyError("The server's queue is full.", hint="Try again in a while.")
        return position

    def position(self, plan: Plan) -> int | None:
        """How many come before the request of a plan; None if it does not wait."""
        with self._moving:
            places = (index for index, each in enumerate(self._waiting) if each.plan is plan)
            place = next(places, None)
            return None if place is None else place + bool(self._running)

    async def run(
        self, admitted: Admitted, plan: Plan, stopping: Stopping | None = None, *, ahead: int | None = None
    ) -> AsyncGenerator[list[Event], None]:
        """Run a plan when its turn has come, and tell what happens, several events at a time.

        Args:
            admitted: The graph.
            plan: Its passes.
            stopping: By which somebody else may stop or interrupt it.
            ahead: Bytes of saved values that may wait to be taken, before the pass waits for whoever takes them. None
                never has it wait for long: beyond some that wait in memory, they wait on the disk.

        What has been told is taken for sent when the next is asked for. Leaving the iteration early stops the pass at
        its next site.

        Raises:
            BusyError: too many requests wait.
            ConnectionLostError: the server is shutting down.
            InternalError: something failed in a way that it must not.
            PatchwireError: of the kind of what went wrong.
        """
        position = self.check_room()
        job = _Job(
            admitted,
            plan,
            queued=position > 0,
            disk=self._disk,
            ahead=ahead,
            company=lambda: len(self._jobs) > 1,
            stopping=stopping or Stopping(),
        )
        try:
            self._jobs.add(job)
            self._waiting.append(job)
            job.loop.run_in_executor(self._thread, self._next)
            if job.queued:
                yield [Queued(position)]
            while True:
                news = await job.news(None if job.queued and not job.started else _LOOK_SECONDS)
                events = [each for each in news if not isinstance(each, BaseException)]
                errors = [each for each in news if isinstance(each, BaseException)]
                done = bool(events) and isinstance(events[-1], Done)
                del news  # whoever is given the events may drop them as they are sent
                if events:
                    yield events
                for error in errors:
                    try:
                        raise error
                    finally:
                        del error, errors  # or the error would keep this frame, and this frame the error
                if done:
                    return
        finally:
            job.stopping.stop(CancelledError("The request was cancelled."))
            self._jobs.discard(job)
            self._leave(job)
            job.close()
            self._forget_untold(job)
            del job

    def _ahead(self) -> int:
        """How many come before the next one."""
        with self._moving:
            return len(self._waiting) + bool(self._running)

    def _leave(self, job: _Job) -> None:
        """Out of the queue: nobody waits for it any more."""
        with self._moving, contextlib.suppress(ValueError):
            self._waiting.remove(job)

    def _forget_untold(self, job: _Job) -> None:
        """Forget what was kept for somebody who left before hearing of it."""
        while job.happened:
            with contextlib.suppress(IndexError):  # it may be done on two threads
                event = job.happened.popleft()
                if isinstance(event, Kept) and self._kept is not None:
                    self._kept.forget([event.handle])

    def _next(self) -> None:
        """On the model's thread: run the job whose turn it is, with those behind it that can share its pass."""
        self._linger()
        with self._moving:
            if not self._waiting:  # somebody has left, or has run with others
                return
            first = self._waiting.pop(0)
            jobs, gathering = self._together(first)
            self._running = jobs
        self._run_jobs(jobs, gathering)

    def _let_past(self, job: _Job) -> None:
        """Between two passes of a job: run those that wait for one pass, once, so that they do not wait for all."""
        with self._moving:
            # While a gradient is taken, parameters are told apart by it, and PyTorch may round otherwise.
            exact = not job.plan.differentiated
            first = next((each for each in self._waiting if _is_short(each, exact=exact)), None)
            if first is None:
                return
            self._waiting.remove(first)
            jobs, gathering = self._together(first)
        began = time.perf_counter()
        self._run_jobs(jobs, gathering)
        job.stopping.pause(time.perf_counter() - began)

    def _run_jobs(self, jobs: Sequence[_Job], gathering: Gathering) -> None:
        late = TimeoutError(
            f"The request ran longer than the server's {self.limits.seconds:g} seconds.",
            hint="Ask for less in one trace.",
        )
        for job in jobs:
            job.stopping.stop_after(self.limits.seconds, late)
            job.started = True
            if job.queued:
                job.wake()
        began = time.perf_counter()
        outcomes = self._outcomes(jobs, gathering)
        self._last = len(jobs) + len(self._waiting), time.perf_counter() - began
        # In this order: whoever asks after hearing of the end finds the model free.
        self._running = [each for each in self._running if each not in jobs]
        for job, outcome in zip(jobs, outcomes, strict=True):
            job.tell(outcome)
            if job.left:
                self._forget_untold(job)

    def _together(self, first: _Job) -> tuple[list[_Job], Gathering]:
        """A job, and those that wait and can share its pass; they wait no longer."""
        try:
            gathering = Gathering(*_joinable(first))
            jobs = [first]
            for each in list(self._waiting) if gathering.groups else ():
                groups = _joinable(each)
                if groups and gathering.takes(groups[0]):
                    jobs.append(each)
        except Exception as error:
            log.error("requests could not be put together, and run one by one", exc_info=error)
            return [first], Gathering()
        self._waiting = [each for each in self._waiting if each not in jobs]
        return jobs, gathering

    def _linger(self) -> None:
        """Wait a little for those who were there when the last pass ended, of whom most will ask again at once.

        Whoever waits already waits for a small part of what a pass takes, and only while more come. A lone user never
        waits.
        """
        count, seconds = self._last
        now = last = time.perf_counter()
        until, gap = now + min(seconds * _LINGER, _LONGEST_LINGER), min(seconds * _LINGER, _LONGEST_GAP)
        waiting = len(self._waiting)
        while 0 < waiting < count and now < until and now - last < gap:
            time.sleep(_LINGER_STEP)
            now, before, waiting = time.perf_counter(), waiting, len(self._waiting)
            if waiting != before:
                last = now

    def _outcomes(self, jobs: Sequence[_Job], gathering: Gathering) -> list[Done | Exception]:
        queued = [time.perf_counter() - job.arrived for job in jobs]
        found: Sequence[Cost | BaseException]
        try:
            executions = [
                Execution(
                    job.admitted,
                    job.plan,
                    _Teller(job),
                    job.stopping,
                    result_bytes=self.limits.result_bytes,
                    store=self._kept,
                )
                for job in jobs
            ]
            if len(jobs) > 1:
                found = run_together(executions, placed(gathering.groups))
            elif jobs[0].stopping.reason is not None:
                raise jobs[0].stopping.reason
            else:
                found = [run(executions[0], partial(self._let_past, jobs[0]))]
        except BaseException as error:
            found = [error for _ in jobs]
        return [
            Done(each, seconds) if isinstance(each, Cost) else _told(each)
            for each, seconds in zip(found, queued, strict=True)
        ]


def _is_short(job: _Job, *, exact: bool) -> bool:
    """Whether a request takes one forward pass of one model, which is exact only if that may be."""
    only = job.plan.passes[0] if len(job.plan.passes) == 1 else None
    if not isinstance(only, Pass) or only.generation is not None or len(job.admitted.all_models) > 1:
        return False
    return exact or not any(group.trace.exact for group in only.groups)


def _joinable(job: _Job) -> list[Group]:
    """The group of a request that may run with others in one pass; none if it may not."""
    only = job.plan.passes[0] if len(job.plan.passes) == 1 else None
    if not isinstance(only, Pass) or len(job.admitted.all_models) > 1 or job.stopping.reason is not None:
        return []
    return [group for group in only.groups if group.shares and not group.past]


def _told(error: BaseException) -> Exception:
    """What whoever asked is told of an error."""
    if isinstance(error, PatchwireError):
        return _without_frames(error)
    log.error("a request failed in a way that it must not", exc_info=error)
    _without_frames(error)
    return InternalError(type(error).__name__)


def _without_frames(error: E) -> E:
    """The same error, without the frames that it and its causes came through: they hold the values of the run."""
    chain: list[BaseException] = [error]
    while chain:
        each = chain.pop()
        chain += [other for other in (each.__cause__, each.__context__) if other is not None]
        each.__traceback__ = each.__cause__ = each.__context__ = None
    return error
