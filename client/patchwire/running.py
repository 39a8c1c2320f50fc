"""What becomes of a recording when its block ends: it runs while the program waits, while its event loop goes on, or
detached, on the server alone.

A `Request` is what is recorded and sent together: a trace of its own is one, a session is one with all its traces.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from patchwire import graph as g
from patchwire.background import Cancellation, in_thread
from patchwire.connection import Connection
from patchwire.errors import GraphError, PatchwireError, here, trim, warn
from patchwire.garbage import Rarely
from patchwire.jobs import Job, submit
from patchwire.plans import Plan
from patchwire.proxy import Value
from patchwire.recording import Recorder
from patchwire.results import Progress, Results, Stats
from patchwire.sites import Catalogue

if TYPE_CHECKING:
    from patchwire.model import Model


class Request:
    """What is recorded and sent together.

    Attributes:
        recorder: Turns what user code does into a graph.
        connection: Where it will run.
        collecting: That garbage is collected rarely, until the recording ends.
    """

    def __init__(
        self, connection: Connection, *, progress: bool, blocking: bool = True, recorder: type[Recorder] = Recorder
    ) -> None:
        self.connection = connection
        self.progress = progress
        self.collecting = Rarely()
        self.recorder = recorder(self._catalogue, value_bytes=connection.limits.value_bytes or None)
        self.recorder.keeps = blocking
        self.failed = False
        self.in_trace = False
        """Whether user code is inside a trace."""
        self.unsaved: Callable[[], Iterable[Value]] = tuple
        """The values that the trace which user code is in saves when it ends."""
        self.home = ""
        """The name of a model that it is of."""
        self._models: dict[str, Model] = {}
        self._on_tokens: dict[int, Callable[[int, list[int]], None]] = {}

    def add(self, model: Model) -> None:
        """Take in a model whose traces belong to it.

        Raises:
            GraphError: it is on another server, or has been given up.
        """
        self.check_open()
        if model.connection is not self.connection:
            raise GraphError(
                f"{model.name} is on another connection than this session.",
                hint="Take both models from one client: `client = patchwire.connect(…)`, `client.model(…)`.",
                lines=here(),
            )
        self._models[model.name] = model
        self.home = self.home or model.name

    @property
    def active(self) -> Recorder:
        """The recorder that new traces belong to: that of the loop's body, inside one."""
        return self.recorder.active

    def _catalogue(self, name: str) -> Catalogue:
        return self._models[name].catalogue

    def on_tokens(self, trace: int, tell: Callable[[int, list[int]], None]) -> None:
        """Have somebody told a generation's tokens as they are made: the invoke, and an id for each row.

        Raises:
            GraphError: it is in a loop.
        """
        if self.active is not self.recorder:
            hint = "Save the output of the generation instead."
            raise GraphError("Tokens are not streamed out of a loop.", hint=hint, lines=here())
        self._on_tokens[trace] = tell

    def _tell_tokens(self, trace: int, invoke: int, ids: list[int]) -> None:
        if trace in self._on_tokens:
            self._on_tokens[trace](invoke, ids)

    def finish(self) -> g.Graph:
        """The graph that is to be sent.

        Warns:
            PatchwireWarning: nothing was saved.
        """
        graph = self.recorder.finish()
        if not self.recorder.asked_for:
            warn("The block saved nothing, so nothing comes back. Write `.save()` on what you want.")
        return graph

    def plan(self) -> Plan:
        """How what has been recorded so far would run.

        Raises:
            GraphError: the block raised, or this is in the body of a loop.
        """
        self.check_open()
        recorder = self.recorder
        if recorder.inner is not None:
            hint = "Write `session.plan()` after the loop."
            raise GraphError("The body of a loop has no plan of its own.", hint=hint, lines=here())
        graph = recorder.so_far(self.unsaved()) if recorder.open else recorder.request
        try:
            return Plan.from_proto(self.connection.plan(graph))
        except PatchwireError as found:
            raise found.with_traceback(None) from None

    def run(self, graph: g.Graph, cancellation: Cancellation) -> Results:
        """Send it and wait: what came back."""
        return self.connection.run(graph, Progress(self.progress, self._tell_tokens), cancellation)

    def check_open(self) -> None:
        """Raise if it has been given up."""
        if self.failed:
            raise GraphError(
                "The session has ended: one of its traces raised an error, so nothing of it runs.",
                hint="Correct that trace, or leave it out; what may fail on its own is a request of its own.",
                lines=here(),
            )

    def give_up(self, error: BaseException) -> None:
        """A block raised: nothing is sent."""
        self.recorder.open = False
        self.failed = True
        self.collecting.end()
        if isinstance(error, PatchwireError):
            trim(error)


class Stopped(Exception):
    """Ends a block early, as if it had ended there."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block


class Block(ABC):
    """A block whose recording runs when it ends.

    Attributes:
        stats: What the run cost; None until it has ended and its values are here.
        job: The detached job, of a block with `blocking=False`, once it has ended.
    """

    _request: Request
    _own = True
    """Whether its recording is sent when it ends, and not with that of a block around it."""

    def __init__(self, *, blocking: bool, exact: bool) -> None:
        for name, given in (("blocking", blocking), ("exact", exact)):
            if not isinstance(given, bool):  # "no" would be yes
                raise GraphError(
                    f"`{name}` is True or False, not {given!r}.", hint=f"Write `{name}=True`.", lines=here()
                )
        self._blocking = blocking
        self.stats: Stats | None = None
        self.job: Job | None = None

    @abstractmethod
    def __enter__(self) -> Any:
        """Begin to record."""

    def plan(self) -> Plan:
        """How the server would run what has been recorded so far: in which passes, and what they would cost.

        Nothing runs, and the recording goes on. After the block it is the plan of all of it; `model.scan(…)` is a block
        that is planned and not run. In a session the plan is that of all its traces.

        Raises:
            GraphError: the block has not begun, has raised, or this is in the body of a loop.
            PatchwireError: what a run would be refused with.
        """
        if not hasattr(self, "_request"):
            hint = "Write `with` before it, and `plan()` in the block or after it."
            raise GraphError("There is nothing to plan yet.", hint=hint, lines=here())
        return self._request.plan()

    @abstractmethod
    def _end(self, error: BaseException | None) -> g.Graph | None:
        """Leave the block; the graph that is to run, if one is."""

    def _ended(self, error: BaseException | None) -> g.Graph | None:
        try:
            return self._end(error)
        finally:
            if self._own:
                self._request.collecting.end()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        stopped = isinstance(error, Stopped) and error.block is self
        graph = self._ended(None if stopped else error)
        if graph is not None:
            try:
                self._run(graph, Cancellation())
            except PatchwireError as found:
                # The way through gRPC is of no interest to whoever wrote the block.
                raise found.with_traceback(None) from None
        return stopped

    async def __aenter__(self) -> Any:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        stopped = isinstance(error, Stopped) and error.block is self
        graph = self._ended(None if stopped else error)
        if graph is not None:
            try:
                await in_thread(partial(self._run, graph))
            except PatchwireError as found:
                raise found.with_traceback(None) from None
        return stopped

    def _run(self, graph: g.Graph, cancellation: Cancellation) -> None:
        request = self._request
        if self._blocking:
            self._settle(request.run(graph, cancellation))
            return
        self.job = submit(
            request.connection, graph, settle=self._settle, progress=request.progress, cancellation=cancellation
        )
        request.recorder.detached = True

    def _settle(self, results: Results) -> None:
        self._request.recorder.resolve(results, self._request.connection)
        self.stats = results.stats
        if self._blocking:  # the results of a job may be fetched again
            self._request.recorder.let_go()
