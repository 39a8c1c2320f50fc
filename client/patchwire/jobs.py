"""Detached jobs: requests that run while nobody waits for them, on a server that keeps their results.

`model.trace(prompt, blocking=False)` makes one, `trace.job`. It survives the program that made it: note its `id`, and
`client.job(id)` finds it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from patchwire import graph as g
from patchwire.background import Cancellation, in_thread
from patchwire.connection import Connection, Expected, Place
from patchwire.errors import ConnectionFailedError, ConnectionLostError, PatchwireError, TimeoutError, VersionError
from patchwire.results import Progress, Results, Stats, To
from patchwire.v1 import job_pb2 as pb

_POLL_SECONDS = 2.0
_AWAY_SECONDS = 60.0
_RETRY_SECONDS = 1.0

_STATES: Mapping[pb.JobState, str] = {
    pb.JOB_STATE_QUEUED: "queued",
    pb.JOB_STATE_RUNNING: "running",
    pb.JOB_STATE_DONE: "done",
    pb.JOB_STATE_FAILED: "failed",
    pb.JOB_STATE_CANCELLED: "cancelled",
    pb.JOB_STATE_EXPIRED: "expired",
}
_UNENDED = ("queued", "running")

Settle = Callable[[Results], None]
"""Takes what came back from a run."""


class JobStatus(str):
    """How far a job is: "queued", "running", "done", "failed", "cancelled" or "expired".

    Attributes:
        position: Of a queued job, how many requests are before it.
        number: Of a running job, which pass runs, from 1; 0 before the first.
        passes: Of a running job, how many passes it has; 0 before the first.
        error: Of a failed job, what happened, in short.
    """

    position: int
    number: int
    passes: int
    error: str

    @classmethod
    def from_proto(cls, job: pb.Job) -> JobStatus:
        """The status of a message.

        Raises:
            VersionError: the server knows more states than this client.
        """
        if job.state not in _STATES:
            raise VersionError(
                f"The job is in state {job.state}, which this version does not know.",
                hint="Install the same version of patchwire on both sides.",
            )
        status = cls(_STATES[job.state])
        status.position, status.error = job.position, job.error
        status.number, status.passes = job.running.number, job.running.passes
        return status

    @property
    def ended(self) -> bool:
        """Whether it will not change any more, except that it expires."""
        return self not in _UNENDED

    @property
    def text(self) -> str:
        """All that is known, in words: "queued behind 3", "running, pass 2 of 5"."""
        if self == "queued" and self.position:
            return f"queued behind {self.position}"
        if self == "running" and self.passes:
            return f"running, pass {self.number} of {self.passes}"
        return f"failed: {self.error}" if self == "failed" else str(self)

    def __repr__(self) -> str:
        return f"<{self.text}>"


class Job:
    """A request that runs, or has run, on a server while nobody waits for it.

    `await job` is `job.fetch()` without blocking the event loop.

    Attributes:
        id: Its name on the server; `client.job(id)` finds it from any program.
        model: The model that it runs.
        submitted: When it was submitted.
        stats: What it cost; None until it has been fetched.
    """

    def __init__(
        self,
        connection: Connection,
        message: pb.Job,
        *,
        progress: bool = True,
        expected: Mapping[int, Expected | None] | None = None,
        takers: Mapping[Place, To] | None = None,
        settle: Settle | None = None,
    ) -> None:
        """
        Args:
            connection: The connection to the server.
            message: What the server says of it.
            progress: Whether to show progress bars.
            expected: What each save brings, by its position in the graph, as far as that is known here.
            takers: Where saved values go when they come.
            settle: Given the results when they are fetched.
        """
        self.id = message.id
        self.model = message.model
        self.submitted = datetime.fromtimestamp(message.submitted_seconds, UTC)
        self.stats: Stats | None = None
        self._connection = connection
        self._message = message
        self._progress = progress
        self._expected = expected
        self._takers = takers or {}
        self._settle = settle

    def _refresh(self, wait_seconds: float = 0.0) -> pb.Job:
        self._message = self._connection.job(self.id, wait_seconds)
        return self._message

    @property
    def status(self) -> JobStatus:
        """How far it is now.

        Raises:
            JobError: the server does not have it any more.
        """
        return JobStatus.from_proto(self._refresh())

    @property
    def seen(self) -> JobStatus:
        """How far it was when the server was last asked."""
        return JobStatus.from_proto(self._message)

    @property
    def expires(self) -> datetime:
        """When the server drops its results, in UTC; its end puts that off.

        Raises:
            JobError: the server does not have it any more.
        """
        return datetime.fromtimestamp(self._refresh().expires_seconds, UTC)

    @property
    def result_bytes(self) -> int:
        """Bytes that its results took on the server when it was last asked."""
        return self._message.result_bytes

    def wait(self, timeout: float | None = None) -> JobStatus:
        """Wait until it has ended, well or not.

        Args:
            timeout: Seconds after which to give up waiting; the job goes on.

        Returns:
            How it ended: "done", "failed", "cancelled" or "expired".

        A server that does not answer is waited for, a minute at most.

        Raises:
            TimeoutError: it has not ended in time.
            JobError: the server does not have it any more.
        """
        return self._wait(timeout, Cancellation())

    def _wait(self, timeout: float | None, cancellation: Cancellation) -> JobStatus:
        progress = Progress(self._progress)
        start = heard = time.monotonic()
        try:
            while True:
                cancellation.check()
                left = _POLL_SECONDS if timeout is None else start + timeout - time.monotonic()
                try:
                    status = JobStatus.from_proto(self._refresh(min(max(left, 0.0), _POLL_SECONDS)))
                    heard = time.monotonic()
                except (ConnectionFailedError, ConnectionLostError):
                    if time.monotonic() - heard > _AWAY_SECONDS or left <= 0:
                        raise
                    time.sleep(min(_RETRY_SECONDS, left))
                    continue
                if status.ended:
                    return status
                if left <= 0:
                    raise TimeoutError(
                        f"The job has not ended within {timeout:g} seconds: it is {status.text}.",
                        hint="It goes on: wait again, or stop it with `job.cancel()`.",
                    )
                if status == "queued":
                    progress.queued(status.position)
                elif status.passes:
                    progress.running(status.number, status.passes)
        finally:
            progress.close()

    def fetch(self) -> list[Tensor | None]:
        """Get the saved values, once the job has ended; the values of its block have their tensors then.

        Returns:
            The saved tensors, in the order in which the block saved them; None for one of a step that a generation did
            not reach. They stay on the server too, until the job
            expires or `forget`.

        Raises:
            JobError: the server does not have it any more, or it has expired.
            CancelledError: it was cancelled.
            PatchwireError: of the kind of what went wrong when it ran, with the line that caused it.
        """
        return self._fetch(Cancellation())

    def _fetch(self, cancellation: Cancellation) -> list[Tensor | None]:
        try:
            self._wait(None, cancellation)
            results = self._connection.fetch(
                self.id, self._expected, Progress(self._progress), cancellation, takers=self._takers
            )
        except PatchwireError as found:
            raise found.with_traceback(None) from None
        self.stats = results.stats
        if self._settle is not None:
            self._settle(results)
        return results.saved

    def __await__(self) -> Generator[Any, None, list[Tensor | None]]:
        return in_thread(self._fetch).__await__()

    def cancel(self) -> JobStatus:
        """Stop it, at the next site of its pass; if it has ended, it stays as it is.

        Raises:
            JobError: the server does not have it any more.
        """
        self._message = self._connection.cancel_job(self.id)
        return self.seen

    def forget(self) -> None:
        """Have the server remove it and its results; stops it first if it has not ended.

        Raises:
            JobError: the server does not have it any more.
        """
        self._connection.forget_job(self.id)

    def __repr__(self) -> str:
        return f"<job {self.id} of {self.model}, {self.seen.text}>"


def submit(
    connection: Connection, graph: g.Graph, *, settle: Settle, progress: bool, cancellation: Cancellation
) -> Job:
    """Put a graph into its model's queue and return.

    Args:
        connection: The connection to the server.
        graph: What to run.
        settle: Given the results when they are fetched.
        progress: Whether to show progress bars.
        cancellation: Says whether it is still wanted.

    Raises:
        PatchwireError: of the kind that the server says.
    """
    message, expected, takers = connection.submit(graph, cancellation)
    return Job(connection, message, progress=progress, expected=expected, takers=takers, settle=settle)
