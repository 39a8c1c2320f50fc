"""Sessions: many traces in one request. Values stay on the server between them; only what is saved comes back."""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any

from patchwire import graph as g
from patchwire.connection import Connection
from patchwire.errors import GraphError, here
from patchwire.kept import RECORDER
from patchwire.loops import Batches, Loop
from patchwire.recording import Recorder
from patchwire.running import Block, Request

if TYPE_CHECKING:
    from patchwire.model import Model

_CURRENT: ContextVar[Session | None] = ContextVar("patchwire_session", default=None)


def current_session() -> Session | None:
    """The session that user code is in."""
    return _CURRENT.get()


class Session(Block):
    """Many traces in one request, recorded by the block under it.

    A value of one trace may be used in every later one; it stays on the server. Traces of several models of the same
    server may be mixed. A trace that has ended has ended: editing one of its values later changes the value, not what
    ran. If a trace's block raises, the session is over and nothing is sent, even if the error is caught in between.

    Attributes:
        stats: What the run cost; None until it has ended and its values are here.
        job: The detached job, of a session with `blocking=False`, once the block has ended.
        exact: Whether every invoke of its traces runs in a pass of its own.

    Example:
        >>> with model.session() as session:
        ...     with model.trace("The Eiffel Tower is in Paris"):
        ...         clean = model.layers[3].output
        ...     with model.trace("The Eiffel Tower is in Rome"):
        ...         model.layers[3].output[:, -1] = clean[:, -1]
        ...         logits = model.logits.save()
        >>> session.stats.passes
        1
    """

    _recorder_class: type[Recorder] = Recorder

    def __init__(
        self,
        connection: Connection,
        *,
        progress: bool = True,
        blocking: bool = True,
        exact: bool = False,
        model: Model | None = None,
    ) -> None:
        super().__init__(blocking=blocking, exact=exact)
        self.exact = exact
        self._connection = connection
        self._model = model
        self._progress = progress
        self._token: Token[Session | None] | None = None

    @property
    def request(self) -> Request:
        """What its traces are recorded into."""
        return self._request

    def __enter__(self) -> Session:
        if current_session() is not None:
            raise GraphError(
                "A session cannot be opened inside another.", hint="Write its traces into the outer one.", lines=here()
            )
        self._request = Request(
            self._connection, progress=self._progress, blocking=self._blocking, recorder=self._recorder_class
        )
        if self._model is not None:
            self._request.add(self._model)
        self.stats = None
        self._token = _CURRENT.set(self)
        self._recorder_token = RECORDER.set(self.request.recorder)
        return self

    def repeat(self, count: int) -> Loop:
        """A block that is recorded once and runs `count` times on the server.

        Raises:
            GraphError: `count` is not a number from 1 on, a loop or trace is open, or the session is detached.
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
            GraphError: the data set is empty, `batch_size` is not a number from 1 on, a loop or trace is open, or the
                session is detached.
        """
        return Batches(self._open_request(), dataset, batch_size)

    def _open_request(self) -> Request:
        if current_session() is not self:
            hint = "Write `with model.session() as session:` around it."
            raise GraphError("A loop stands in its session's block.", hint=hint, lines=here())
        if not self._blocking:
            hint = "Leave `blocking=False` out."
            raise GraphError("A detached session cannot loop: nobody waits for it.", hint=hint, lines=here())
        return self._request

    def _end(self, error: BaseException | None) -> g.Graph | None:
        assert self._token is not None
        _CURRENT.reset(self._token)
        RECORDER.reset(self._recorder_token)
        if error is not None:
            self._request.give_up(error)
            return None
        self._request.check_open()
        if not self._request.recorder.request.traces:
            self._request.recorder.open = False
            raise GraphError("The session has no trace.", hint="Write `with model.trace(…):` in it.", lines=here())
        return self._request.finish()
