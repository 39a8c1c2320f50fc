"""The blocks that user code writes: `with model.trace(...)` and `with trace.invoke(...)`.

A trace is one call of the model. Entering it starts a recording; leaving it sends the graph, waits for the saved
tensors and hands each to its value (`running.py`). If the block raises, nothing is sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
import torch.fx
from torch import Tensor

from patchwire import graph as g
from patchwire import selecting
from patchwire.cache import Cache
from patchwire.errors import GraphError, InputError, PatchwireError, SiteError, here
from patchwire.kept import RECORDER
from patchwire.proxy import Value
from patchwire.recording import EVERYONE, Recorder
from patchwire.running import Block, Request, Stopped
from patchwire.session import current_session
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
    step: int = 0
    open: bool = False
    stepping: bool = False

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
        return g.Site(self.trace, self.invoke, address, self.step, self.open)


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
    if scope.model._original is not model._original:
        raise GraphError(
            f"`{what}` belongs to {model.name}, but the block traces {scope.model.name}.",
            hint=f"Trace {model.name} in a block of its own; a saved value may be used there.",
            lines=here(),
        )
    return scope


def scope_now() -> Scope | None:
    """The scope that user code is in, if it is inside a block."""
    scope = _CURRENT.get()
    return scope if scope is not None and scope.recorder.open else None


def open_recorder() -> Recorder | None:
    """What records the block that user code is inside of; None if it is in none."""
    scope = scope_now()
    return None if scope is None else scope.recorder


@contextlib.contextmanager
def within(scope: Scope) -> Iterator[None]:
    """Have what is written under it belong to a scope."""
    token = _CURRENT.set(scope)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def move(steps: int) -> None:
    """Have what is written from here on, in this block or invoke, belong to so many steps later."""
    scope = _CURRENT.get()
    assert scope is not None
    _CURRENT.set(replace(scope, step=scope.step + steps))


def recording() -> bool:
    """Whether user code is inside a block."""
    return open_recorder() is not None


class Trace(Block):
    """One call of a model, recorded by the block under it.

    Attributes:
        stats: What the run cost; None until it has ended and its values are here, and in a session, whose `stats` are
            those of all its traces.
        job: The detached job, of a trace with `blocking=False`, once the block has ended.
    """

    _recorder_class: type[Recorder] = Recorder

    def __init__(
        self,
        model: Model,
        given: Any = None,
        generation: g.Generation | None = None,
        *,
        blocking: bool = True,
        exact: bool = False,
    ) -> None:
        super().__init__(blocking=blocking, exact=exact)
        self._model = model
        self._given = given
        self._trace = g.Trace(model.name, generation=generation, exact=exact)
        self._token: Token[Scope | None] | None = None
        self._closed = False
        self._caches: list[Cache] = []
        self._edited_weights: dict[torch.fx.Node, torch.fx.Node] = {}

    def __enter__(self) -> Self:
        if recording():
            raise GraphError(
                "A trace cannot be opened inside another.",
                hint="Give several prompts to one trace with `trace.invoke(prompt)`.",
                lines=here(),
            )
        if self._token is not None:
            raise GraphError("This trace has been used already.", hint="Write `with model.trace(…)`.", lines=here())
        session = current_session()
        if session is not None and not self._blocking:
            raise GraphError(
                "A trace inside a session runs with it.", hint="Write `model.session(blocking=False)`.", lines=here()
            )
        self._own = session is None
        self._trace.exact |= session is not None and session.exact
        request = session.request if session else self._request_alone()
        request.add(self._model)
        self._request = request
        self._recorder = request.active
        self._index = self._recorder.begin(self._trace)
        try:
            invoke = None if self._given is None else self._add(self._given)
        except PatchwireError as error:
            self._request.give_up(error)
            raise
        self._token = _CURRENT.set(Scope(self._model, self._recorder, self._index, invoke))
        self._recorder_token = RECORDER.set(request.recorder)
        request.in_trace, request.unsaved = True, self._unsaved
        return self

    def _request_alone(self) -> Request:
        """The request of a trace that is in no session."""
        model = self._model
        return Request(
            model.connection, progress=model.progress, blocking=self._blocking, recorder=self._recorder_class
        )

    def _add(self, given: Any) -> int:
        if self._closed:
            raise GraphError(
                "An invoke without a prompt is for the rows of those before it; no other can follow.",
                hint="Write it last.",
                lines=here(),
            )
        rows, embeddings = self._model._invoke(given)
        options = self._trace.generation
        if embeddings is not None and options is not None and options.repetition_penalty != 1:
            raise InputError(
                "A repetition_penalty is of tokens, and embeddings have none.",
                hint="Give token ids, or leave `repetition_penalty` out.",
                lines=here(),
            )
        index = len(self._trace.invokes)
        self._trace.invokes.append(rows)
        try:
            if embeddings is not None:
                self._recorder.assign(g.Site(self._index, index, Address("embed.output")), embeddings)
            for edit in self._model._edits:
                edit.into(self._recorder, self._index, index, self._edited_weights)
        except PatchwireError:
            self._trace.invokes.pop()
            raise
        return index

    @contextlib.contextmanager
    def invoke(self, given: Any = None) -> Iterator[Trace]:
        """Rows of this trace with their own input and their own scope.

        Args:
            given: A prompt, as for `model.trace`. Left out, the rows are those of all invokes before, one after the
                other; rows of different lengths end together.

        Values flow between the invokes of a trace, as long as each is written at the site where it was read or later.

        Raises:
            GraphError: the trace was given a prompt itself, or this is inside another invoke.
        """
        if given is None and self._given is not None:
            yield self
            return
        scope = current("invoke", self._model)
        if scope.stepping:
            raise GraphError(
                "An invoke goes through all steps of a generation, and cannot be opened in one of them.",
                hint="Write the loop over steps inside `with gen.invoke(prompt):`.",
                lines=here(),
            )
        if self._given is not None or scope.invoke is not None:
            raise GraphError(
                "An invoke stands directly inside a trace that has no prompt of its own.",
                hint="Write `with model.trace() as trace:` and in it `with trace.invoke(prompt):`.",
                lines=here(),
            )
        if given is None:
            if not self._trace.invokes:
                raise GraphError("There are no rows yet.", hint="Write `trace.invoke(prompt)`.", lines=here())
            index, self._closed = EVERYONE, True
        else:
            index = self._add(given)
        with within(Scope(self._model, self._recorder, self._index, index)):
            yield self

    def stop(self) -> NoReturn:
        """End the block here: what is written below is not recorded, and nothing later is run."""
        current("stop", self._model)
        raise Stopped(self)

    def token_ids(self, invoke: int | None = None) -> Value:
        """The token ids of an invoke as a value, `[batch, seq]` int64, with -1 before rows that are shorter.

        In a loop over batches they are those of each iteration.

        Args:
            invoke: Its position in the trace; left out, the invoke around this line, or the only one.

        Raises:
            GraphError: there are several, and this is in none of them.
        """
        return self._recorder.token_ids(self._index, self._which(invoke))

    def mask(self, invoke: int | None = None) -> Tensor | Value:
        """Which positions hold tokens, `[batch, seq]` bool.

        Rows of different lengths end together; positions before a shorter row's first token hold NaN in every value,
        so that they cannot go unnoticed into a result. In a loop over batches this is a value: that of each iteration.

        Args:
            invoke: Its position in the trace; left out, the invoke around this line, or the only one.

        Raises:
            GraphError: there are several, and this is in none of them.
        """
        invoke = self._which(invoke)
        if self._trace.invokes[invoke].batches:
            return torch.ge(self.token_ids(invoke), 0)  # type: ignore[call-overload, no-any-return]
        lengths = torch.tensor(self._trace.invokes[invoke].lengths)
        longest = int(lengths.max())
        return torch.arange(longest)[None] >= (longest - lengths)[:, None]

    def _which(self, invoke: int | None) -> int:
        """The invoke that is meant."""
        scope, count = scope_now(), len(self._trace.invokes)
        if invoke is None and scope is not None and (scope.recorder, scope.trace) == (self._recorder, self._index):
            invoke = scope.invoke
        if invoke is None or (invoke == EVERYONE and count == 1):
            invoke = 0 if count == 1 else None
        if invoke is None or not 0 <= invoke < count:
            raise GraphError(
                f"It is not clear which of the {count} invokes is meant.",
                hint="Write it inside the invoke, or give its position: `trace.mask(0)`.",
                lines=here(),
            )
        return invoke

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
                list of these; of a value inside a module, its canonical name (`"layers.*.mlp.neurons"`). All layers if
                left out.
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
            selected = selecting.of_modules(catalogue, names, sides)
        except SiteError as error:
            raise SiteError(error.message, hint=error.hint, lines=here()) from None

        def read(each: selecting.Selected) -> Value:
            with within(scope):
                return scope.model._selected(each)

        cache = Cache({name: partial(read, each) for name, each in selected.items()}, dtype)
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
        """The token ids of every row.

        Raises:
            GraphError: they change, as this is in a loop over batches.
        """
        if any(invoke.batches for invoke in self._trace.invokes):
            hint = "Write `trace.token_ids()` for a value, that of each iteration."
            raise GraphError("In a loop over batches, the tokens change.", hint=hint, lines=here())
        return [
            list(row)
            for index, invoke in enumerate(self._trace.invokes)
            if (self._index, index) not in self._recorder.twins
            for row in invoke.rows
        ]

    def _end(self, error: BaseException | None) -> g.Graph | None:
        assert self._token is not None
        _CURRENT.reset(self._token)
        RECORDER.reset(self._recorder_token)
        self._request.in_trace, self._request.unsaved = False, tuple
        if error is not None:
            # In a session too: half of a trace is not what was asked for, and cannot be told from the whole.
            self._request.give_up(error)
            return None
        if not self._trace.invokes:
            nothing = GraphError(
                "The trace has no prompt.", hint='Write `model.trace("…")` or `trace.invoke("…")`.', lines=here()
            )
            self._request.give_up(nothing)
            raise nothing
        for cache in self._caches:
            cache.close()
        self._finish()
        self._recorder.end(self._index)
        return self._graph() if self._own else None

    def _graph(self) -> g.Graph | None:
        """The graph that is to run."""
        return self._request.finish()

    def _finish(self) -> None:
        """The block has ended, and the graph has not been sent."""

    def _unsaved(self) -> list[Value]:
        """What is saved when the block ends, besides what the program saves itself."""
        return [value for cache in self._caches for value in cache.now()]


class Generation(Trace):
    """One generation, recorded by the block under it: a pass over the prompt (step 0), then one for each new token.

    Outside of `iter` and `all`, sites are those of step 0.
    """

    def __init__(
        self,
        model: Model,
        given: Any,
        generation: g.Generation,
        stream: bool | Callable[[list[int]], None],
        *,
        blocking: bool = True,
    ) -> None:
        super().__init__(model, given, generation, blocking=blocking)
        self._options = generation
        self._stream = stream
        self._outputs: dict[int, Value] = {}

    @property
    def iter(self) -> Steps:
        """The steps of the block under it: `for step in gen.iter[2:5]:`, or `gen.iter[3]` for one.

        A step that is named has to be reached; a slice without an end, such as `gen.iter[1:]`, goes as far as the
        generation does, and what was saved in a step that was not reached has no value.
        """
        return Steps(self, self._options.max_new_tokens)

    def all(self) -> Iterator[int]:
        """All steps, as far as the generation goes."""
        return self.iter[:]

    @property
    def output(self) -> Value:
        """The token ids that the generation ends with, the prompt's included: `[batch, seq + new]` int64."""
        scope = current("output", self._model)
        if scope.invoke is None or scope.invoke < 0:
            raise GraphError("The output is that of an invoke.", hint="Read it inside `gen.invoke(…)`.", lines=here())
        return self._generated(scope.invoke)

    def _generated(self, invoke: int) -> Value:
        if invoke not in self._outputs:
            self._outputs[invoke] = self._recorder.generated(self._index, invoke)
        return self._outputs[invoke]

    def _finish(self) -> None:
        if not self._stream:
            return
        for invoke in range(len(self._trace.invokes)):
            self._recorder.save(self._generated(invoke), None)
        tell = self._stream if callable(self._stream) else self._print
        self._request.on_tokens(self._index, lambda _, ids: tell(ids))

    def _unsaved(self) -> list[Value]:
        made = [] if not self._stream else [self._generated(each) for each in range(len(self._trace.invokes))]
        return [*super()._unsaved(), *made]

    def _print(self, ids: list[int]) -> None:
        print(self._model.tokenizer.decode(ids[:1]), end="", flush=True)


class Steps:
    """Steps of a generation, to be chosen by an index."""

    def __init__(self, generation: Trace, count: int) -> None:
        """
        Args:
            generation: Whose steps they are.
            count: How many there are at most.
        """
        self._generation = generation
        self._count = count

    def __getitem__(self, which: int | slice | Sequence[int]) -> Iterator[int]:
        """Go through the steps; sites in the loop's body are those of the step."""
        self._here()
        endless = isinstance(which, slice) and which.stop is None
        steps = self._chosen(which)
        for step in steps:
            if not 0 <= step < self._count:
                raise GraphError(
                    f"There is no step {step}.",
                    hint=f"The generation has the steps 0 to {self._count - 1}.",
                    lines=here(),
                )
        return self._run(steps, endless)

    def _here(self) -> Scope:
        """The scope that the steps are gone through in.

        Raises:
            GraphError: it is that of another block, or of other steps.
        """
        scope, generation = current("iter", self._generation._model), self._generation
        if (scope.recorder, scope.trace) != (generation._recorder, generation._index) or scope.stepping:
            raise GraphError(
                "The steps of a generation are gone through in its own block, one after the other.",
                hint="Write `for step in gen.all():` directly in `with model.generate(…) as gen:`, or in an invoke.",
                lines=here(),
            )
        return scope

    def count(self, which: int | slice | Sequence[int]) -> int:
        """How many steps a choice has."""
        return len(self._chosen(which))

    def _chosen(self, which: int | slice | Sequence[int]) -> list[int]:
        if isinstance(which, slice):
            if which.stop is None or which.stop < 0 or (which.step or 1) < 0:
                return list(range(self._count))[which]
            start = which.start or 0
            return list(range(start if start >= 0 else max(start + self._count, 0), which.stop, which.step or 1))
        return [which] if isinstance(which, int) else list(which)

    def _run(self, steps: list[int], endless: bool) -> Iterator[int]:
        before = self._here()
        try:
            for step in steps:
                self._here()
                _CURRENT.set(replace(before, step=step, open=endless and step > 0, stepping=True))
                yield step
                _CURRENT.set(before)
        finally:
            now = _CURRENT.get()  # another block's, if this one was left and the iterator is still held by a name
            if now is not None and now.recorder is before.recorder and now.trace == before.trace:
                _CURRENT.set(before)
