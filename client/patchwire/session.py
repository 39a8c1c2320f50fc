"""Sessions: many traces in one request. Values stay on the server between them; only what is saved comes back."""

from __future__ import annotations

from contextvars import ContextVar, Token

from patchwire import graph as g
from patchwire.connection import Connection
from patchwire.errors import GraphError, here
from patchwire.recording import Recorder
from patchwire.running import Block, Request

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

    _recorder_class: type[Recorder] = Recorder

    def __init__(self, connection: Connection, *, progress: bool = True, blocking: bool = True) -> None:
        super().__init__(blocking=blocking)
        self._connection = connection
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
        self._request = Request(self._connection, progress=self._progress, recorder=self._recorder_class)
        self.stats = None
        self._token = _CURRENT.set(self)
        return self

    def _end(self, error: BaseException | None) -> g.Graph | None:
        assert self._token is not None
        _CURRENT.reset(self._token)
        if error is not None:
            self._request.give_up(error)
            return None
        self._request.check_open()
        if not self._request.recorder.request.traces:
            self._request.recorder.open = False
            raise GraphError("The session has no trace.", hint="Write `with model.trace(…):` in it.", lines=here())
        return self._request.finish()
