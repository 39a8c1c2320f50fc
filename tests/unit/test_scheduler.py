"""A model's queue: whose turn it is, how a run ends, and that nothing of it stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from patchwire import framing
from patchwire.errors import (
    BusyError,
    ConnectionLostError,
    ExecutionError,
    LimitError,
    PatchwireError,
    TimeoutError,
)
from patchwire_worker import scheduler
from patchwire_worker.config import Limits
from patchwire_worker.executor import Cost
from patchwire_worker.planner import Plan
from patchwire_worker.scheduler import Chunk, Done, InternalError, Queued, Saved, Scheduler
from patchwire_worker.waiting import Disk, OnDisk, WaitingFile


class Value:
    """Stands for what a run computes."""


@pytest.fixture
def work(monkeypatch) -> Callable[[Callable[..., Any]], None]:
    """Says what an execution does: a function of its admitted graph and of what stops it."""

    def use(function: Callable[..., Any]) -> None:
        class Execution:
            def __init__(self, admitted, plan, listener, stopping, *, result_bytes, store) -> None:
                self.given = (admitted, stopping)

        def run(execution: Execution, between: Callable[[], None]) -> Cost:
            function(*execution.given)
            return Cost()

        monkeypatch.setattr(scheduler, "Execution", Execution)
        monkeypatch.setattr(scheduler, "run", run)

    return use


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What goes away here does so because nobody refers to it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def within(coroutine) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def events(queue: Scheduler, admitted: Any = None) -> list[Any]:
    return [event async for news in queue.run(admitted, Plan([], set())) for event in news]


async def slowly(queue: Scheduler) -> None:
    """Take what a run tells, one after the other, with time between them."""
    async for _ in queue.run(None, Plan([], set())):
        await asyncio.sleep(0.1)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("raised", "arrives"),
    [(ExecutionError("no"), ExecutionError), (OSError("no"), InternalError)],
    ids=["ours", "other"],
)
def test_an_error_keeps_nothing_of_the_run(work, no_collector, monkeypatch, raised, arrives):
    monkeypatch.setattr(scheduler.log, "disabled", True)  # pytest keeps what is logged
    values: list[weakref.ref] = []

    def fail(*_) -> None:
        value = Value()
        values.append(weakref.ref(value))
        try:
            raise KeyError(value)
        except KeyError as error:
            raise raised from error

    async def run() -> BaseException:
        with pytest.raises(arrives) as caught:
            await events(Scheduler("tiny", Limits()))
        return caught.value

    work(fail)
    error = within(run())

    assert values[0]() is None
    assert error.__cause__ is error.__context__ is None


def test_an_error_goes_when_nobody_handles_it_any_more(work, no_collector):
    def fail(admitted, stopping) -> None:
        stopping.stop(ExecutionError("no"))
        raise stopping.reason

    async def run() -> None:
        admitted = Value()
        found = weakref.ref(admitted)
        with contextlib.suppress(PatchwireError):
            await events(Scheduler("tiny", Limits()), admitted)
        del admitted
        await until(lambda: found() is None)  # the model's thread may be in its last step

    work(fail)
    within(run())


def test_an_error_of_another_kind_is_logged_with_where_it_was(work, caplog):
    def fail(*_) -> None:
        raise OSError("the disk is gone")

    work(fail)
    with pytest.raises(InternalError, match="OSError"):
        within(events(Scheduler("tiny", Limits())))

    assert "the disk is gone" in caplog.text
    assert "in fail" in caplog.text


def test_where_nobody_may_wait_one_runs_and_the_next_is_refused(work):
    go = threading.Event()
    work(lambda *_: go.wait(60))

    async def run() -> None:
        queue = Scheduler("tiny", Limits(queued=0))
        first = asyncio.create_task(events(queue))
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await events(queue)
        go.set()
        assert isinstance((await first)[-1], Done)
        assert isinstance((await events(queue))[-1], Done)

    within(run())


def test_whoever_leaves_the_queue_keeps_nothing_in_it(work, no_collector):
    go = threading.Event()
    work(lambda *_: go.wait(60))

    async def run() -> None:
        queue = Scheduler("tiny", Limits())
        first = asyncio.create_task(events(queue))
        await until(lambda: queue._running)
        admitted = Value()
        found = weakref.ref(admitted)
        second = queue.run(admitted, Plan([], set()))
        assert await anext(second) == [Queued(1)]
        await second.aclose()
        del admitted, second
        await asyncio.sleep(0)
        assert found() is None
        third = asyncio.create_task(events(queue))
        await asyncio.sleep(0)
        go.set()
        await first
        assert [type(each) for each in await third] == [Queued, Done]

    within(run())


def test_a_run_that_is_late_ends(work):
    def wait(admitted, stopping) -> None:
        while stopping.reason is None:
            threading.Event().wait(0.001)
        raise stopping.reason

    work(wait)
    with pytest.raises(TimeoutError, match=r"0\.01 seconds"):
        within(events(Scheduler("tiny", Limits(seconds=0.01))))


class TestARunThatMayNotGetFarAhead:
    SIZE = 1 << 18
    AHEAD = 2 * len(framing.response(bytes(SIZE)))

    @pytest.fixture
    def made(self, monkeypatch) -> list[int]:
        """The values that the run has saved so far; it saves fifty of them."""
        made: list[int] = []

        class Execution:
            def __init__(self, admitted, plan, listener, stopping, *, result_bytes, store) -> None:
                self.listener, self.stopping = listener, stopping

        def run(execution: Execution, between: Callable[[], None]) -> Cost:
            for number in range(50):
                if execution.stopping.reason is not None:
                    raise execution.stopping.reason
                made.append(number)
                execution.listener.saved(number, torch.zeros(TestARunThatMayNotGetFarAhead.SIZE, dtype=torch.uint8))
            return Cost()

        monkeypatch.setattr(scheduler, "Execution", Execution)
        monkeypatch.setattr(scheduler, "run", run)
        return made

    def test_waits_for_whoever_takes_its_values(self, made):
        async def run() -> list[int]:
            taken = []
            async for news in Scheduler("tiny", Limits()).run(None, Plan([], set()), ahead=self.AHEAD):
                taken += [each.node for each in news if isinstance(each, Saved)]
                await asyncio.sleep(0.005)  # long enough for all of them, if nothing held it up
                assert len(made) <= len(taken) + 3
            return taken

        assert within(run()) == list(range(50))

    def test_waits_in_the_middle_of_a_value_too(self, made, monkeypatch):
        chunk = self.SIZE // 8
        ahead = 2 * len(framing.response(bytes(chunk)))
        monkeypatch.setattr(scheduler, "_CHUNK_BYTES", chunk)
        monkeypatch.setattr(scheduler, "_TAKEN_AT_ONCE", chunk)

        async def run() -> int:
            queue, taken = Scheduler("tiny", Limits()), 0
            async for news in queue.run(None, Plan([], set()), ahead=ahead):
                taken += sum(isinstance(each, Chunk) for each in news)
                (job,) = queue._jobs
                assert sum(len(each.response) for each in list(job.happened) if isinstance(each, Chunk)) <= ahead
            return taken

        assert within(run()) == 50 * 8

    def test_ends_when_nobody_takes_them(self, made):
        async def run() -> None:
            queue = Scheduler("tiny", Limits())
            async with contextlib.aclosing(queue.run(None, Plan([], set()), ahead=self.AHEAD)) as first:
                await anext(first)
                await until(lambda: len(made) >= 3)
            await until(lambda: not queue._running)

        within(run())
        assert len(made) < 50


class TestARunWhoseValuesAreTakenSlowly:
    CHUNK = 1 << 18
    SIZE = len(framing.response(bytes(CHUNK)))
    COUNT = 50

    @pytest.fixture
    def ended(self, work, monkeypatch) -> threading.Event:
        """Set when a run has saved all of its values, more than may wait in memory."""
        monkeypatch.setattr(scheduler, "_AHEAD_BYTES", 4 * self.SIZE)
        monkeypatch.setattr(scheduler, "_PATIENCE_SECONDS", 0.01)
        ended = threading.Event()
        size, count = self.CHUNK, self.COUNT

        class Execution:
            def __init__(self, admitted, plan, listener, stopping, *, result_bytes, store) -> None:
                self.listener = listener

        def run(execution: Execution, between: Callable[[], None]) -> Cost:
            for number in range(count):
                execution.listener.saved(number, torch.full((size,), number, dtype=torch.uint8))
            ended.set()
            return Cost()

        monkeypatch.setattr(scheduler, "Execution", Execution)
        monkeypatch.setattr(scheduler, "run", run)
        return ended

    def test_ends_all_the_same_and_they_come_in_order_from_the_disk(self, ended):
        async def run() -> None:
            disk = Disk(1 << 30)
            taken, most = [], 0
            async for news in Scheduler("tiny", Limits(), disk=disk).run(None, Plan([], set())):
                await until(ended.is_set)
                most = max(most, disk.taken)
                for each in news:
                    if isinstance(each, Chunk):
                        on_disk = isinstance(each.response, OnDisk)
                        response = each.response.read() if on_disk else each.response
                        assert framing.chunk_of(response) == bytes([len(taken)]) * self.CHUNK
                        taken.append(on_disk)
            assert taken == [False] * 4 + [True] * (self.COUNT - 4)
            assert most == taken.count(True) * self.SIZE
            assert disk.taken == 0

        within(run())

    def test_gives_back_the_disk_when_nobody_takes_them_any_more(self, ended):
        async def run() -> None:
            disk = Disk(1 << 30)
            queue = Scheduler("tiny", Limits(), disk=disk)
            async with contextlib.aclosing(queue.run(None, Plan([], set()))) as values:
                await anext(values)
                await until(ended.is_set)
                assert disk.taken > 0
            assert disk.taken == 0

        within(run())

    def test_is_refused_more_than_the_disk_may_hold(self, ended, monkeypatch):
        monkeypatch.setattr(scheduler, "_TAKEN_AT_ONCE", 1)  # or they are taken nearly as fast as they are made

        async def run() -> None:
            disk = Disk(10 * self.SIZE)
            with pytest.raises(LimitError, match="that nobody has taken yet"):
                await slowly(Scheduler("tiny", Limits(), disk=disk))
            assert disk.taken == 0

        within(run())

    def test_fails_when_the_disk_fails(self, ended, tmp_path):
        async def run() -> None:
            disk = Disk(1 << 30, tmp_path / "missing")
            with pytest.raises(ExecutionError, match="could not write a saved value to its disk"):
                await slowly(Scheduler("tiny", Limits(), disk=disk))

        within(run())

    def test_says_so_when_they_cannot_be_read_back(self):
        file = WaitingFile(Disk(1 << 30))
        value = file.put(bytes(self.SIZE))
        file.close()

        with pytest.raises(ExecutionError, match="cannot be read back"):
            value.read()
        assert file.put(bytes(self.SIZE)) is None


class TestClosing:
    def test_ends_at_once_what_runs_and_what_waits(self, work):
        go = threading.Event()
        work(lambda *_: go.wait(60))

        async def run() -> None:
            queue = Scheduler("tiny", Limits())
            jobs = [asyncio.create_task(events(queue)) for _ in range(3)]
            await until(lambda: queue._running is not None and len(queue._waiting) == 2)
            queue.close()
            for each in jobs:
                with pytest.raises(ConnectionLostError, match="shutting down"):
                    await each
            go.set()

        within(run())

    def test_takes_nothing_more(self):
        async def run() -> None:
            queue = Scheduler("tiny", Limits())
            queue.close()
            for _ in range(2):
                with pytest.raises(ConnectionLostError, match="shutting down"):
                    await events(queue)
            assert not queue._waiting

        within(run())
