"""The blocks that user code writes: `with model.trace(...)` and `with trace.invoke(...)`.

A trace is one call of the model. Entering it starts a recording; leaving it sends the graph, waits for the saved
tensors and hands each to its value. If the block raises, nothing is sent.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchwire import graph as g
from patchwire import selecting
from patchwire.cache import Cache
from patchwire.errors import GraphError, PatchwireError, PatchwireWarning, SiteError, here, trim, user_frame
from patchwire.recording import Recorder
from patchwire.results import Progress, Stats
from patchwire.sites import INPUT, OUTPUT, Address

if TYPE_CHECKING:
    from patchwire.model import Model


@dataclass(frozen=True)
class Scope:
    """Where user code is: in which recording, which trace of it, and which invoke of that."""

    model: Model
    recorder: Recorder
    trace: int
    invoke: int | None

    def site(self, address: Address) -> g.Site:
        """The site of an address, for the rows of this scope.

        Raises:
            GraphError: the trace has several invokes and this is in none of them.
        """
        if self.invoke is None:
            raise GraphError(
                f"`{address.spelled}` is read outside of the trace's invokes, so it is not clear for which rows.",
                hint="Write `with trace.invoke(prompt):` around it, or give the prompt to `trace`.",
                lines=here(),
            )
        return g.Site(self.trace, self.invoke, address)


_CURRENT: ContextVar[Scope | None] = ContextVar("patchwire_scope", default=None)


def current(what: str, model: Model) -> Scope:
    """The scope that user code is in.

    Raises:
        GraphError: it is in none, or in one of another model.
    """
    scope = _CURRENT.get()
    if scope is None or not scope.recorder.open:
        raise GraphError(
            f"`{what}` has a value only while the model runs.",
            hint='Write it inside a block: `with model.trace("…"):`.',
            lines=here(),
        )
    if scope.model is not model:
        raise GraphError(
            f"`{what}` belongs to {model.name}, but the block traces {scope.model.name}.",
            hint=f"Trace {model.name} in a block of its own; a saved value may be used there.",
            lines=here(),
        )
    return scope


def open_recorder() -> Recorder | None:
    """What records the block that user code is inside of; None if it is in none."""
    scope = _CURRENT.get()
    return scope.recorder if scope is not None and scope.recorder.open else None


def recording() -> bool:
    """Whether user code is inside a block."""
    return open_recorder() is not None


class Trace:
    """One call of a model, recorded by the block under it.

    Attributes:
        stats: What the run cost; None until the block has ended.
    """

    def __init__(self, model: Model, given: Any = None) -> None:
        self._model = model
        self._given = given
        self._recorder = model._recorder()
        self._trace = g.Trace(model.name)
        self._token: Token[Scope | None] | None = None
        self._caches: list[Cache] = []
        self.stats: Stats | None = None

    def __enter__(self) -> Trace:
        if recording():
            raise GraphError(
                "A trace cannot be opened inside another.",
                hint="Give several prompts to one trace with `trace.invoke(prompt)`.",
                lines=here(),
            )
        if self._token is not None:
            raise GraphError("This trace has been used already.", hint="Write `with model.trace(…)`.", lines=here())
        self._index = len(self._recorder.request.traces)
        self._recorder.request.traces.append(self._trace)
        invoke = None if self._given is None else self._add(self._given)
        self._token = _CURRENT.set(Scope(self._model, self._recorder, self._index, invoke))
        return self

    def _add(self, given: Any) -> int:
        self._trace.invokes.append(self._model._invoke(given))
        return len(self._trace.invokes) - 1

    @contextlib.contextmanager
    def invoke(self, given: Any) -> Iterator[Trace]:
        """Rows of this trace with their own input and their own scope.

        Args:
            given: A prompt, as for `model.trace`.

        Values flow between the invokes of a trace, as long as each is written at the site where it was read or later.

        Raises:
            GraphError: the trace was given a prompt itself, or this is inside another invoke.
        """
        if self._given is not None or current("invoke", self._model).invoke is not None:
            raise GraphError(
                "An invoke stands directly inside a trace that has no prompt of its own.",
                hint="Write `with model.trace() as trace:` and in it `with trace.invoke(prompt):`.",
                lines=here(),
            )
        token = _CURRENT.set(Scope(self._model, self._recorder, self._index, self._add(given)))
        try:
            yield self
        finally:
            _CURRENT.reset(token)

    def mask(self, invoke: int = 0) -> Tensor:
        """Which positions hold tokens, `[batch, seq]` bool.

        Rows of different lengths end together; positions before a shorter row's first token hold NaN in every value,
        so that they cannot go unnoticed into a result.
        """
        lengths = torch.tensor(self._trace.invokes[invoke].lengths)
        longest = int(lengths.max())
        return torch.arange(longest)[None] >= (longest - lengths)[:, None]

    def cache(
        self,
        modules: Any = None,
        *,
        outputs: bool = True,
        inputs: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Cache:
        """Save what many modules return, or are given, for the rows of this scope: `cache["layers.3.output"]`.

        Args:
            modules: Which: a module, a name, a pattern over canonical names and raw paths (`"layers.*.mixer"`), or a
                list of these. All layers if left out.
            outputs: Whether their outputs are saved; of a tuple, each tensor: `"transformer.h.3.attn.output[0]"`.
            inputs: Whether their first arguments are saved.
            dtype: Send the tensors in this element type.

        Returns:
            A mapping by address, filled when the block has ended, with the edits of the whole block.

        Raises:
            SiteError: there is no such module, or it has no value.
        """
        scope = current("cache", self._model)
        scope.recorder.not_in_a_branch("save a value")
        catalogue = self._model.catalogue
        if modules is None:
            modules = [f"layers.{index}" for index in range(catalogue.num_layers)]
        chosen = modules if isinstance(modules, (list, tuple)) else [modules]
        sides = [side for side, wanted in ((OUTPUT, outputs), (INPUT, inputs)) if wanted]
        try:
            names = [each if isinstance(each, str) else each._name for each in chosen]
            addresses = selecting.of_modules(catalogue, names, sides)
        except SiteError as error:
            raise SiteError(error.message, hint=error.hint, lines=here()) from None
        cache = Cache(scope.recorder, {name: scope.site(address) for name, address in addresses.items()}, dtype)
        self._caches.append(cache)
        return cache

    def log(self, *parts: Any) -> None:
        """Print texts and values, with this line, when the values exist: `trace.log("norm", hidden.norm())`.

        Small tensors are printed in full, large ones as PyTorch abbreviates them.

        Raises:
            GraphError: the block has ended, this is in a branch of `patchwire.cond`, or a text is too long.
        """
        self._recorder.log(parts)

    @property
    def tokens(self) -> list[list[int]]:
        """The token ids of every row."""
        return [list(row) for invoke in self._trace.invokes for row in invoke.rows]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._token is not None
        _CURRENT.reset(self._token)
        if error is not None:
            self._recorder.open = False
            if isinstance(error, PatchwireError):
                trim(error)
            return
        if not self._trace.invokes:
            self._recorder.open = False
            raise GraphError(
                "The trace has no prompt.", hint='Write `model.trace("…")` or `trace.invoke("…")`.', lines=here()
            )
        for cache in self._caches:
            cache.close()
        self._run()

    def _run(self) -> None:
        if not self._recorder.saved and not self._recorder.logs:
            frame = user_frame()
            warnings.warn_explicit(
                PatchwireWarning("The block saved nothing, so nothing comes back. Write `.save()` on what you want."),
                None,
                frame.f_code.co_filename if frame else "<block>",
                frame.f_lineno if frame else 1,
            )
        graph = self._recorder.finish()
        try:
            tensors, self.stats = self._model.connection.run(graph, Progress(self._model.progress))
        except PatchwireError as found:
            # The way through gRPC is of no interest to whoever wrote the block.
            raise found.with_traceback(None) from None
        self._recorder.resolve(tensors)
