"""Sessions: many traces in one request. Values stay on the server between them; only what is saved comes back.

A `Request` is what is recorded and sent together: a trace of its own is one, a session is one with all its traces.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Any

from patchwire.connection import Connection
from patchwire.errors import GraphError, PatchwireError, PatchwireWarning, here, trim, user_frame
from patchwire.kept import RECORDER
from patchwire.loops import Batches, Loop
from patchwire.recording import Recorder
from patchwire.results import Progress, Stats
from patchwire.sites import Catalogue

if TYPE_CHECKING:
    from patchwire.model import Model


class Request:
    """What is recorded and sent together.

    Attributes:
        recorder: Turns what user code does into a graph.
        connection: Where it will run.
    """

    def __init__(self, connection: Connection, *, progress: bool) -> None:
        self.connection = connection
        self.progress = progress
        self.recorder = Recorder(self._catalogue, value_bytes=connection.limits.value_bytes or None)
        self.in_trace = False
        """Whether user code is inside a trace."""
        self.home = ""
        """The name of a model that it is of."""
        self._models: dict[str, Model] = {}
        self._on_tokens: dict[int, Callable[[int, list[int]], None]] = {}

    def add(self, model: Model) -> None:
        """Take in a model whose traces belong to it.

        Raises:
            GraphError: it is on another server.
        """
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

    def run(self) -> Stats:
        """Send it, wait for the saved tensors, and hand each to its value."""
        if not self.recorder.asked_for:
            frame = user_frame()
            warnings.warn_explicit(
                PatchwireWarning("The block saved nothing, so nothing comes back. Write `.save()` on what you want."),
                None,
                frame.f_code.co_filename if frame else "<block>",
                frame.f_lineno if frame else 1,
            )
        graph = self.recorder.finish()
        try:
            results = self.connection.run(graph, Progress(self.progress), self._tell_tokens)
        except PatchwireError as found:
            # The way through gRPC is of no interest to whoever wrote the block.
            raise found.with_traceback(None) from None
        self.recorder.resolve(results, self.connection)
        return results.stats

    def give_up(self, error: BaseException) -> None:
        """The block raised: nothing is sent."""
        self.recorder.open = False
        if isinstance(error, PatchwireError):
            trim(error)


_CURRENT: ContextVar[Session | None] = ContextVar("patchwire_session", default=None)


def current_session() -> Session | None:
    """The session that user code is in."""
    return _CURRENT.get()


class Session:
    """Many traces in one request, recorded by the block under it.

    A value of one trace may be used in every later one; it stays on the server. Traces of several models of the same
    server may be mixed.

    Attributes:
        stats: What the run cost; None until the block has ended.

    Example:
        >>> with model.session() as session:
        ...     with model.trace("The Eiffel Tower is in Paris"):
        ...         clean = model.layers[3].output
        ...     with model.trace("The Eiffel Tower is in Rome"):
        ...         model.layers[3].output[:, -1] = clean[:, -1]
        ...         logits = model.logits.save()
        >>> session.stats.passes
        2
    """

    def __init__(self, connection: Connection, *, progress: bool = True, model: Model | None = None) -> None:
        self._connection = connection
        self._model = model
        self._progress = progress
        self._token: Token[Session | None] | None = None
        self.request: Request | None = None
        self.stats: Stats | None = None

    def __enter__(self) -> Session:
        if current_session() is not None:
            raise GraphError(
                "A session cannot be opened inside another.", hint="Write its traces into the outer one.", lines=here()
            )
        self.request = Request(self._connection, progress=self._progress)
        if self._model is not None:
            self.request.add(self._model)
        self.stats = None
        self._token = _CURRENT.set(self)
        self._recorder_token = RECORDER.set(self.request.recorder)
        return self

    def repeat(self, count: int) -> Loop:
        """A block that is recorded once and runs `count` times on the server.

        Raises:
            GraphError: `count` is not a number from 1 on, or a loop or trace is open.
        """
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count < 2**32:
            hint = "Write for example `session.repeat(100)`."
            raise GraphError(f"A loop cannot run {count!r} times.", hint=hint, lines=here())
        return Loop(self._open_request(), count)

    def over(self, dataset: Any, *, batch_size: int = 1) -> Batches:
        """A block that is recorded once and runs on the server for each batch of a data set.

        Args:
            dataset: Texts, lists of token ids, or a tensor of token ids `[rows, seq]`; in the block, a trace of
                `batches.prompt` runs on `batch_size` of them.
            batch_size: How many rows an iteration has; the last may have fewer.

        Raises:
            GraphError: the data set is empty, `batch_size` is not a number from 1 on, or a loop or trace is open.
        """
        return Batches(self._open_request(), dataset, batch_size)

    def _open_request(self) -> Request:
        if self.request is None or current_session() is not self:
            hint = "Write `with model.session() as session:` around it."
            raise GraphError("A loop stands in its session's block.", hint=hint, lines=here())
        return self.request

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._token is not None
        assert self.request is not None
        _CURRENT.reset(self._token)
        RECORDER.reset(self._recorder_token)
        if error is not None:
            self.request.give_up(error)
            return
        if not self.request.recorder.request.traces:
            self.request.recorder.open = False
            raise GraphError("The session has no trace.", hint="Write `with model.trace(…):` in it.", lines=here())
        self.stats = self.request.run()
