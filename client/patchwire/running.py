"""What becomes of a recording when its block ends: it runs while the program waits, while its event loop goes on, or
detached, on the server alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from types import TracebackType
from typing import Self

from torch import Tensor

from patchwire import graph as g
from patchwire.background import Cancellation, in_thread
from patchwire.connection import Connection
from patchwire.errors import PatchwireError
from patchwire.jobs import Job, submit
from patchwire.recording import Recorder
from patchwire.results import Progress, Stats


class Block(ABC):
    """A block whose recording runs when it ends.

    Attributes:
        stats: What the run cost; None until it has ended and its values are here.
        job: The detached job, of a block with `blocking=False`, once it has ended.
    """

    def __init__(self, recorder: Recorder, connection: Connection, *, progress: bool, blocking: bool) -> None:
        self._recorder = recorder
        self._connection = connection
        self._progress = progress
        self._blocking = blocking
        self.stats: Stats | None = None
        self.job: Job | None = None

    @abstractmethod
    def __enter__(self) -> Self:
        """Begin to record."""

    @abstractmethod
    def _end(self, error: BaseException | None) -> g.Graph | None:
        """Leave the block; the graph that is to run, if one is."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        graph = self._end(error)
        if graph is not None:
            try:
                self._run(graph, Cancellation())
            except PatchwireError as found:
                # The way through gRPC is of no interest to whoever wrote the block.
                raise found.with_traceback(None) from None

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        graph = self._end(error)
        if graph is not None:
            try:
                await in_thread(partial(self._run, graph))
            except PatchwireError as found:
                raise found.with_traceback(None) from None

    def _run(self, graph: g.Graph, cancellation: Cancellation) -> None:
        if self._blocking:
            self._settle(*self._connection.run(graph, Progress(self._progress), cancellation))
            return
        self.job = submit(
            self._connection, graph, settle=self._settle, progress=self._progress, cancellation=cancellation
        )
        self._recorder.detached = True

    def _settle(self, tensors: list[Tensor], stats: Stats) -> None:
        self._recorder.resolve(tensors)
        self.stats = stats
