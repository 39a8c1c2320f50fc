"""Detached jobs: what a run tells is written to a file while it runs, and read from there when somebody asks.

A job is a directory of two files: `record`, a `JobRecord` that says what and whose it is and how it ended, and
`results`, the responses of its run, each after its length. So results outlive the client and the server's process, and
never are in memory all at once. A job whose run had not ended when the server was stopped is reported as failed and not
run again: it may be what ended the server, and whoever submitted it can do so once more.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import shutil
import struct
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

from google.protobuf.message import DecodeError

from patchwire import framing
from patchwire.errors import (
    CancelledError,
    ExecutionError,
    GraphError,
    JobError,
    LimitError,
    PatchwireError,
)
from patchwire.status import error_from_proto, error_to_proto
from patchwire.v1 import job_pb2 as pb
from patchwire.version import VERSION
from patchwire_worker.config import MIB, Limits

log = logging.getLogger(__name__)

T = TypeVar("T")

_DIRECTORY = re.compile(r"[0-9a-f]{64}")
_LENGTH = struct.Struct("<I")
_LARGEST_RECORD = MIB
_LARGEST_RESPONSE = 8 * MIB
_LONGEST_ID = 100
_LONGEST_WAIT_SECONDS = 60.0
_SWEEP_SECONDS = 60.0
_STOP_SECONDS = 2.0
_SHOWN_OF_ERROR = 300

_UNENDED = (pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING)


def stopped() -> ExecutionError:
    """The error of a job whose server was stopped before it ended."""
    return ExecutionError(
        "The server was stopped before the job had ended.", hint="Run the block again to submit it again."
    )


@dataclass(eq=False)
class _Job:
    record: pb.JobRecord
    path: Path
    reserved: int = 0
    """Bytes of the disk that it counts for."""
    written: int = 0
    position: Callable[[], int | None] | None = None
    """How many are before it, while it has not ended; None once it runs."""
    task: asyncio.Task[None] | None = None
    stopped_as: pb.JobState = pb.JOB_STATE_CANCELLED
    """What it becomes if its task is cancelled."""
    ending: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def results(self) -> Path:
        return self.path / "results"

    def snapshot(self) -> pb.Job:
        """The job as it is now."""
        job = pb.Job()
        job.CopyFrom(self.record.job)
        job.result_bytes = self.written
        if self.position is not None:
            position = self.position()
            job.state = pb.JOB_STATE_RUNNING if position is None else pb.JOB_STATE_QUEUED
            job.position = position or 0
        return job


class Jobs:
    """The jobs of a server. Belongs to one event loop."""

    def __init__(self, directory: Path | None, limits: Limits) -> None:
        """
        Args:
            directory: Where to keep them; None makes a directory that goes when the server does.
            limits: How many, how large and how long.

        Raises:
            PatchwireError: the directory cannot be used, or another server uses it.
        """
        self.limits = limits
        self._own = None if directory else tempfile.TemporaryDirectory(prefix="patchwire-jobs-")
        self.directory = Path(directory or self._own.name)  # type: ignore[union-attr]
        self._jobs: dict[bytes, _Job] = {}
        self._bytes = 0
        self._sweeper: asyncio.Task[None] | None = None
        # One thread, so that what is done to a file is done in the order in which it was asked for.
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="jobs")
        self._lock = self._locked()
        for path in sorted(self.directory.iterdir()):
            if _DIRECTORY.fullmatch(path.name) and path.is_dir():
                self._load(path)

    def _locked(self) -> IO[bytes]:
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = open(self.directory / "lock", "wb")  # noqa: SIM115  held until `close`
        except OSError as error:
            raise PatchwireError(f"Jobs cannot be kept in {self.directory}: {error.strerror}.") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise PatchwireError(
                f"Another server keeps its jobs in {self.directory}.", hint="Give each server a directory of its own."
            ) from error
        return lock

    def _load(self, path: Path) -> None:
        """Take over a job that an earlier server has left."""
        try:
            with open(path / "record", "rb") as file:
                record = pb.JobRecord.FromString(file.read(_LARGEST_RECORD))
            if _digest(record.job.id).hex() != path.name:
                raise ValueError("the job is another one")
            if record.job.state in _UNENDED:
                _fail(record, stopped())
                _write_record(path, record)
                (path / "results").unlink(missing_ok=True)
            length = (path / "results").stat().st_size if record.job.state == pb.JOB_STATE_DONE else 0
        except (OSError, ValueError, DecodeError) as error:
            log.warning("%s holds no job that can be read, and is left alone: %s", path, error)
            return
        job = self._jobs[_digest(record.job.id)] = _Job(record, path, reserved=length, written=length)
        job.ended.set()
        self._bytes += length

    def start(self) -> None:
        """From now on drop what expires."""
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """Write down how everything ended, and let go of the directory; the queues have been closed before."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        tasks = [each.task for each in self._jobs.values() if each.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=_STOP_SECONDS)
        self._disk.shutdown(wait=True)
        self._lock.close()
        if self._own is not None:
            self._own.cleanup()

    # --- what clients ask ---------------------------------------------------------------------------------------------

    async def submit(
        self,
        owner: str,
        model: str,
        responses: AsyncGenerator[pb.FetchJobResponse | bytes, None],
        *,
        expected_bytes: int,
        position: Callable[[], int | None],
    ) -> pb.Job:
        """Begin a job.

        Args:
            owner: Whose it is.
            model: The model that it runs.
            responses: Runs it, and tells what happens. Raises only errors that messages have a kind for.
            expected_bytes: What its results will take, as far as that is known.
            position: How many are before it in the queue; None if it does not wait.

        Raises:
            LimitError: there are too many jobs, or they take too much.
        """
        self._make_room(expected_bytes)
        # The prefix keeps a command line from taking it for an option.
        name, now = f"job-{secrets.token_urlsafe(16)}", time.time()
        record = pb.JobRecord(
            owner=owner,
            job=pb.Job(
                id=name,
                model=model,
                state=pb.JOB_STATE_QUEUED,
                submitted_seconds=now,
                expires_seconds=now + self.limits.job_seconds,
            ),
        )
        job = _Job(record, self.directory / _digest(name).hex(), reserved=expected_bytes, position=position)
        self._jobs[_digest(name)] = job
        self._bytes += job.reserved
        try:
            results = await self._apart(lambda: _create(job.path, record))
        except BaseException:
            self._remove(job)
            raise
        job.task = asyncio.create_task(self._run(job, responses, results))
        await asyncio.sleep(0)  # it has its place in the queue before anybody knows of it
        return job.snapshot()

    async def get(self, owner: str, name: str, wait_seconds: float = 0.0) -> pb.Job:
        """A job, once it has ended or so many seconds have passed.

        Raises:
            JobError: there is none of this name that belongs to the owner.
            GraphError: the seconds are no number of seconds.
        """
        job = self._look_up(owner, name)
        if not wait_seconds >= 0:
            raise GraphError("A time to wait is a number of seconds.")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(job.ended.wait(), min(wait_seconds, _LONGEST_WAIT_SECONDS))
        return job.snapshot()

    def of(self, owner: str) -> list[pb.Job]:
        """The jobs of an owner, the newest first."""
        mine = [each.snapshot() for each in self._jobs.values() if each.record.owner == owner]
        return sorted(mine, key=lambda each: each.submitted_seconds, reverse=True)

    async def fetch(self, owner: str, name: str) -> AsyncGenerator[pb.FetchJobResponse | bytes, None]:
        """What a job told, from its file.

        Raises:
            JobError: there is none of this name that belongs to the owner, it has not ended, or it has expired.
            CancelledError: it was cancelled.
            PatchwireError: of the kind of what went wrong in it.
        """
        job = self._look_up(owner, name)
        match job.record.job.state:
            case pb.JOB_STATE_FAILED:
                raise error_from_proto(job.record.error)
            case pb.JOB_STATE_CANCELLED:
                raise CancelledError("The request was cancelled.")
            case pb.JOB_STATE_EXPIRED:
                raise self._expired()
            case pb.JOB_STATE_DONE:
                pass
            case _:
                raise JobError("The job has not ended.", hint="Wait for it: `job.wait()`.")
        try:
            file = await self._apart(partial(_open, job.results))
        except FileNotFoundError:  # meanwhile
            raise self._expired() from None
        try:
            while (response := await self._apart(lambda: _read(file))) is not None:
                yield response
        finally:
            file.close()

    async def cancel(self, owner: str, name: str) -> pb.Job:
        """Stop a job if it has not ended.

        Raises:
            JobError: there is none of this name that belongs to the owner.
        """
        job = self._look_up(owner, name)
        await self._stop(job, pb.JOB_STATE_CANCELLED)
        return job.snapshot()

    async def forget(self, owner: str, name: str) -> None:
        """Remove a job.

        Raises:
            JobError: there is none of this name that belongs to the owner.
        """
        job = self._look_up(owner, name)
        await self._stop(job, pb.JOB_STATE_CANCELLED)
        self._remove(job)

    def _expired(self) -> JobError:
        return JobError(
            "The job has expired: its results are gone.",
            hint=f"Run it again; this server keeps results for {self.limits.job_seconds / 3600:g} hours.",
        )

    def _look_up(self, owner: str, name: str) -> _Job:
        # Looked up by the digest, so that the time it takes says nothing about how much of a guess was right.
        job = self._jobs.get(_digest(name)) if len(name) <= _LONGEST_ID else None
        if job is None or not hmac.compare_digest(job.record.owner.encode(), owner.encode()):
            raise JobError(
                f"The server has no job {name[:_LONGEST_ID]!r}.",
                hint="It may have been forgotten, or have expired; `client.jobs()` lists those that there are.",
            )
        return job

    # --- a job's life -------------------------------------------------------------------------------------------------

    def _make_room(self, expected_bytes: int) -> None:
        expired = [each for each in self._jobs.values() if each.record.job.state == pb.JOB_STATE_EXPIRED]
        for each in expired[: max(len(self._jobs) + 1 - self.limits.jobs, 0)]:
            self._remove(each)
        if len(self._jobs) >= self.limits.jobs:
            raise LimitError(
                f"The server keeps {self.limits.jobs:,} jobs already.",
                hint="`job.forget()` those that have been fetched.",
            )
        self._check_room(expected_bytes)

    def _check_room(self, more: int) -> None:
        if self._bytes + more > self.limits.job_bytes:
            raise LimitError(
                f"The results of jobs would take {self._bytes + more:,} bytes; the server keeps "
                f"{self.limits.job_bytes:,}.",
                hint="`job.forget()` those that have been fetched, or save less.",
            )

    async def _run(
        self, job: _Job, responses: AsyncGenerator[pb.FetchJobResponse | bytes, None], results: IO[bytes]
    ) -> None:
        state, error = pb.JOB_STATE_DONE, None
        try:
            async with contextlib.aclosing(responses):
                async for response in responses:
                    for event in [] if isinstance(response, bytes) else response.events:
                        if event.HasField("running"):
                            job.record.job.running.CopyFrom(event.running)
                    await self._append(job, results, response)
        except asyncio.CancelledError:
            state = job.stopped_as
        except PatchwireError as found:
            state, error = pb.JOB_STATE_FAILED, found
        except OSError as found:
            state, error = pb.JOB_STATE_FAILED, _not_written(found)
        job.ending = True
        try:
            await self._apart(results.close)  # which writes what is left
        except OSError as found:
            if state == pb.JOB_STATE_DONE:
                state, error = pb.JOB_STATE_FAILED, _not_written(found)
        await self._end(job, state, error)

    async def _append(self, job: _Job, results: IO[bytes], response: pb.FetchJobResponse | bytes) -> None:
        data = framing.serialize(response)
        length = _LENGTH.size + len(data)
        more = max(job.written + length - job.reserved, 0)
        self._check_room(more)
        self._bytes += more
        job.reserved += more
        job.written += length

        def write() -> None:
            results.write(_LENGTH.pack(len(data)))
            results.write(data)

        await self._apart(write)

    async def _end(self, job: _Job, state: pb.JobState, error: PatchwireError | None = None) -> None:
        """Write down how a job ended, then let it be known."""
        record = pb.JobRecord()
        record.CopyFrom(job.record)
        record.job.state = state
        record.job.expires_seconds = time.time() + self.limits.job_seconds
        record.job.ClearField("running")
        if error is not None:
            _fail(record, error)
        if state != pb.JOB_STATE_DONE:
            job.written = 0
            await self._quietly(lambda: job.results.unlink(missing_ok=True))
        await self._quietly(lambda: _write_record(job.path, record))
        self._bytes -= job.reserved - job.written
        job.reserved = job.written
        job.record, job.position, job.task = record, None, None
        job.ended.set()

    async def _stop(self, job: _Job, state: pb.JobState) -> None:
        """Have a job ended; it becomes `state` if it is not at its end already."""
        if job.task is not None and not job.ending:
            job.stopped_as = state
            job.task.cancel()
        await job.ended.wait()

    def _remove(self, job: _Job) -> None:
        if self._jobs.pop(_digest(job.record.job.id), None) is not None:
            self._bytes -= job.reserved
            job.reserved = 0
            self._disk.submit(shutil.rmtree, job.path, ignore_errors=True)

    async def _sweep(self) -> None:
        """Drop what has expired: first the results, and after as long again what is known of the job."""
        while True:
            now = time.time()
            for job in list(self._jobs.values()):
                if job.record.job.expires_seconds > now:
                    continue
                if job.record.job.state == pb.JOB_STATE_EXPIRED:
                    self._remove(job)
                elif job.ended.is_set():
                    await self._end(job, pb.JOB_STATE_EXPIRED)
                else:
                    await self._stop(job, pb.JOB_STATE_EXPIRED)
            # Nothing that is submitted meanwhile expires sooner.
            soonest = min((each.record.job.expires_seconds for each in self._jobs.values()), default=float("inf"))
            await asyncio.sleep(min(max(soonest - time.time(), 0.0), self.limits.job_seconds, _SWEEP_SECONDS))

    async def _quietly(self, work: Callable[[], object]) -> None:
        try:
            await self._apart(work)
        except OSError as error:
            log.error("the end of a job could not be written down: %s", error)

    async def _apart(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogatepass")).digest()


def _not_written(error: OSError) -> ExecutionError:
    log.error("the results of a job could not be written: %s", error)
    return ExecutionError(
        f"The server could not write the results to its disk: {error.strerror}.",
        hint="Whoever runs the server has to make room there; then run it again, or save less.",
    )


def _fail(record: pb.JobRecord, error: PatchwireError) -> None:
    record.job.state = pb.JOB_STATE_FAILED
    record.job.error = error.message[:_SHOWN_OF_ERROR]
    record.error.CopyFrom(error_to_proto(error, VERSION))


def _create(path: Path, record: pb.JobRecord) -> IO[bytes]:
    path.mkdir(mode=0o700)
    _write_record(path, record)
    return open(path / "results", "wb")


def _write_record(path: Path, record: pb.JobRecord) -> None:
    """Replace the record as a whole, so that there always is one."""
    fresh = path / "record.new"
    fresh.write_bytes(record.SerializeToString())
    os.replace(fresh, path / "record")


def _open(path: Path) -> IO[bytes]:
    return open(path, "rb")


def _read(file: IO[bytes]) -> pb.FetchJobResponse | bytes | None:
    """The next response; None at the end."""
    head = file.read(_LENGTH.size)
    if not head:
        return None
    try:
        length: int = _LENGTH.unpack(head)[0]
        data = file.read(length) if length <= _LARGEST_RESPONSE else b""
        if len(data) != length:
            raise ValueError(f"{len(data)} of {length} bytes")
        return data if framing.chunk_of(data) is not None else pb.FetchJobResponse.FromString(data)
    except (struct.error, ValueError, DecodeError) as error:
        log.error("%s is damaged: %s", file.name, error)
        raise ExecutionError("The results of the job are damaged on the server's disk.", hint="Run it again.") from None
