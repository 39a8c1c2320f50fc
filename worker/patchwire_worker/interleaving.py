"""How a pass meets the model: nnsight's interleaver, with one mediator for each site that somebody waits for.

nnsight puts a controller around every module's forward, which offers each input and output to the interleaver; the
interleaver hands it to the mediators that wait for that location. nnsight's own mediators run user code in a greenlet.
Ours wait for one fixed location and call a function with the value: no greenlet, no code. And a controller is on its
module only during passes in which somebody waits there, so that all others cost what the plain model does.

The same goes for operations inside a forward: nnsight's copy of the forward, which offers the arguments and the result
of every call and every assignment, is the module's body only during passes in which somebody waits inside it. Where
somebody waits inside a function that such an operation calls, its copy is made when the call happens, for only then is
it known which function that is.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from nnsight import NNsight
from nnsight.intervention.backward import BackwardTracer
from nnsight.intervention.interleaver import EarlyStopException, Event, Interleaver, Mediator, Pending
from nnsight.intervention.source import STATE, Compiled, SourceNotAvailable, install_source, instrument, make_op
from torch import nn

from patchwire.errors import PatchwireError, SiteError, first_line
from patchwire.sites import INPUT, SOURCE, Inside, Location
from patchwire_worker.models.texts import needs_steps, only_eager, step_by_step, transparent

_ROOT = "model"
_ENTRY = f"{_ROOT}.{INPUT}"
T = TypeVar("T")
_FUNCTION = "fn"
"""The last part of nnsight's name for the hand-over of a function that is about to be called."""
INSTEAD = "skip"
"""The place between a module's sides, where what is returned is its output, and the module does not run."""
OUTSIDE = "What it is given and what it returns can be read and written; what is inside it cannot."


def base(module: str, operations: tuple[str, ...] = ()) -> str:
    """nnsight's name of a module, or of an operation in its forward."""
    parts = [_ROOT, module] if module else [_ROOT]
    return ".".join([*parts, *(part for each in operations for part in (SOURCE, each))])


def provider(location: Location) -> str:
    """nnsight's name of a location, the same for all its occurrences."""
    return f"{base(location.module, location.operations)}.{location.side}"


def _backward_block(
    tracer: BackwardTracer, source: str, line: int, find: Callable[..., Any] = BackwardTracer.parse
) -> ast.With | ast.AsyncWith | None:
    """The `with` at a line, if it is one over a call of `backward`; None for any other."""
    node: ast.With | ast.AsyncWith | None = find(tracer, source, line)
    over = [each for item in node.items for each in ast.walk(item.context_expr)] if node else []
    return node if any(isinstance(each, ast.Attribute) and each.attr == "backward" for each in over) else None


# nnsight's import changes `Tensor.backward` for the whole program, and an embedded server runs in one that is not ours.
# There `with hooked(model): loss.backward()`, on one line, would be taken for nnsight's own `with loss.backward():`,
# and be left out without a word. That is the statement which nnsight is to look for, and no other.
BackwardTracer.parse = _backward_block


class SiteMediator(Mediator):  # type: ignore[misc]
    """Waits for one visit of one location and replaces the value there by what `arrive` returns.

    `arrive` may raise `StopPass` to end the pass after this location.
    """

    def __init__(self, location: Location, arrive: Callable[[Any], Any]) -> None:
        # Mediator's own constructor takes the code to run; there is none.
        self.location = location
        self._wait = Pending(Event.VALUE, provider(location), location.occurrence)
        self._arrive = arrive
        self.interleaver: Any = None
        self.batch_group = None
        self.worker = None
        self.pending: Pending | None = None
        self.iteration = 0
        self.counts_at_start: dict[str, int] = {}
        self.caches: list[Any] = []
        self.transform = None
        self.exception = None

    def start(self, interleaver: Any = None) -> None:
        """Begin to wait."""
        self.interleaver = interleaver
        name = self._wait.provider
        self.counts_at_start = {name: interleaver.counts.get(name, 0)}
        self.pending = self._wait

    def handle(self, provider: str, value: Any) -> Any:
        """Take the value and give the one to go on with."""
        self.pending = None
        self.interleaver.served(provider, self.location.occurrence)
        return self._arrive(value)


StopPass = EarlyStopException
"""Ends a pass after the location at which it is raised: nobody needs what comes after."""


class Stopping:
    """Says whether a pass has to end before it is done, and why."""

    def __init__(self) -> None:
        self.interrupted = False
        """Whether loops end after the iteration that they are in."""
        self._reason: PatchwireError | None = None
        self._late: tuple[float, PatchwireError] | None = None

    def stop(self, reason: PatchwireError) -> None:
        """End the pass at its next site; the first reason counts."""
        if self._reason is None:
            self._reason = reason

    def stop_after(self, seconds: float, reason: PatchwireError) -> None:
        """End it when so many seconds have passed."""
        self._late = time.perf_counter() + seconds, reason

    def pause(self, seconds: float) -> None:
        """Give it so many seconds more, in which others had the model."""
        if self._late is not None:
            self._late = self._late[0] + seconds, self._late[1]

    @property
    def reason(self) -> PatchwireError | None:
        """Why it has to end now, if it has to."""
        if self._reason is None and self._late is not None and time.perf_counter() > self._late[0]:
            self._reason = self._late[1]
        return self._reason


class _Controllers:
    """nnsight's controllers of a model's modules, by path, put on when they are needed."""

    _SLOTS = ("forward", STATE)

    def __init__(self, module: nn.Module, interleaver: Interleaver) -> None:
        before = {each: self._slots(each) for each in module.modules()}
        with warnings.catch_warnings():
            # nnsight says where a module's own name hides behind one of nnsight's; raw paths are not affected.
            warnings.simplefilter("ignore")
            self._envoy = NNsight(module, interleaver=interleaver)
        self._interleaver = interleaver
        self._forwards: dict[str, tuple[Callable[..., Any], Compiled]] = {}
        self._by_path: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
        for each, slots in before.items():
            for route in each.__dict__[STATE].routes:
                if route[0]() is interleaver:
                    self._by_path[route[1].removeprefix(_ROOT).removeprefix(".")] = (each, self._slots(each))
            self._fill(each, slots)

    @property
    def paths(self) -> Collection[str]:
        """Where there are any."""
        return self._by_path.keys()

    @contextlib.contextmanager
    def on(self, paths: Iterable[str], opened: Collection[str] = ()) -> Iterator[None]:
        """Have those of some modules on, and instrumented forwards in some of these.

        Raises:
            SiteError: the text of a forward is not to be had.
        """
        before, states = [], []
        try:
            for path in {*paths, *opened}:
                module, slots = self._by_path[path]
                before.append((module, self._slots(module)))
                forward = module.__dict__.get("forward")
                self._fill(module, slots)
                if inspect.ismethod(forward) and forward.__self__ is module:  # one that it has for this pass
                    states.append(state := module.__dict__[STATE])
                    state.body = forward.__func__
            for path in opened:
                state = self._by_path[path][0].__dict__[STATE]
                states.append(state)
                state.body, _ = self.forward(path)
            yield
        finally:
            for state in states:
                state.body = state.original
            for module, slots in reversed(before):
                self._fill(module, slots)

    def forward(self, path: str) -> tuple[Callable[..., Any], Compiled]:
        """The instrumented forward of a module whose controller is on, and what is known of it."""
        if path not in self._forwards:
            module, _ = self._by_path[path]
            with available(f"the forward of {type(module).__name__}"):
                compiled = install_source(self._interleaver.envoys[id(module)])
            state = module.__dict__[STATE]
            self._forwards[path] = state.body, compiled
        return self._forwards[path]

    def _slots(self, module: nn.Module) -> dict[str, Any]:
        return {slot: module.__dict__[slot] for slot in self._SLOTS if slot in module.__dict__}

    def _fill(self, module: nn.Module, slots: dict[str, Any]) -> None:
        for slot in self._SLOTS:
            module.__dict__.pop(slot, None)
        module.__dict__.update(slots)


@contextlib.contextmanager
def available(what: str) -> Iterator[None]:
    """Say what it means if the text of a function cannot be had, or not be understood.

    Raises:
        SiteError: so it is.
    """
    try:
        yield
    except SourceNotAvailable as error:
        raise SiteError(f"{what} has no text in Python.", hint=OUTSIDE) from error
    except Exception as error:  # Python code comes in many forms, and a copy of some of them cannot be made
        raise SiteError(f"{what} has no source that can be followed ({first_line(error)}).", hint=OUTSIDE) from error


class PassInterleaver(Interleaver):  # type: ignore[misc]
    """nnsight's interleaver, for passes that can be stopped at module boundaries.

    Attributes:
        boundaries: The modules at which every pass can be stopped, besides those where somebody waits; all, until it is
            said which.
        observe: Told of everything that is handed over, in passes that only look.
        looked_into: In such passes: the operations whose functions are handed over, too.
        steps_are_exact: Whether attention may be computed step by step in passes in which somebody looks inside: not if
            the model's own code for that gives other numbers.
    """

    def __init__(self, module: nn.Module) -> None:
        self._thread = 0
        super().__init__()
        self.sourced: dict[str, Any] = {}
        self.module = module
        self._controllers = _Controllers(module, self)
        self.boundaries: Collection[str] = self._controllers.paths
        self.stopping = Stopping()
        self.observe: Callable[[str, Any], None] | None = None
        self.looked_into: Collection[str] = ()
        self.steps_are_exact = True
        self._steps: Mapping[int, Sequence[SiteMediator]] = {}
        self._step = -1
        self._waiting: dict[str, dict[int, Mediator]] = {}
        self._opened: dict[str, tuple[Any, Compiled] | None] = {}
        self.interleaving: bool = False
        self._applying = False

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> bool:
        """The end of a pass; that it was ended early is no error."""
        if exc_type is StopPass:
            # nnsight's frame keeps it, and it that frame and all of the model's: their tensors would stay for long.
            exc_value.__traceback__ = None
        return bool(super().__exit__(exc_type, exc_value, traceback))

    @property
    def busy(self) -> bool:
        """Whether a call of a module is part of the pass: on another thread it is somebody else's."""
        return threading.get_ident() == self._thread

    @busy.setter
    def busy(self, value: bool) -> None:
        """nnsight's own account of it, which knows nothing of threads."""

    def handle(self, provider: str, value: Any) -> Any:
        """Offer a value to those that wait for it; the value to go on with."""
        if self.stopping.reason is not None:
            raise self.stopping.reason
        if self._applying:
            return value
        if provider == _ENTRY:
            self._next_step()
        if self.observe is not None:
            self.observe(provider, value)
        if self._opened and provider.endswith(f".{_FUNCTION}"):
            name = provider.removesuffix(f".{_FUNCTION}")
            if name in self._opened:
                self._open(name, value)
            return value
        if provider not in self.parked:
            return value
        return super().handle(provider, value)

    def _open(self, name: str, function: Any) -> None:
        """Have the function that an operation is about to call instrumented: another one each time, for all we know."""
        known = self._opened[name]
        if known is not None and known[0] is function:
            return
        with available(f"`{getattr(function, '__qualname__', type(function).__name__)}`"):
            entry = instrument(
                transparent(function), make_op(lambda: (self, name) if self.interleaving else (None, None))
            )
        self.sourced[name] = entry
        self._opened[name] = function, entry[1]

    def compiled(self, inside: Inside) -> Compiled | None:
        """What the last pass that looked inside a function found there; None if it did not come by."""
        module, operations = inside
        if not operations:
            return self._controllers.forward(module)[1]
        found = self._opened.get(base(module, operations))
        return None if found is None else found[1]

    # One mediator waits for one visit of one location, so a dictionary does what nnsight does by searching its list.

    def reindex(self) -> None:
        """Note who waits for what, at the start of a pass."""
        self.observers: dict[str, Any] = {}
        self._step = -1

    def _next_step(self) -> None:
        """The model is called: for the first time, or for the next token. Those wait who wait for this call."""
        self._step += 1
        self.counts: dict[str, int] = {}
        self._waiting = {}
        for each in self._steps.get(self._step, ()):
            if each.pending is not None:
                self._waiting.setdefault(each.pending.provider, {})[each.pending.iteration] = each
        self.parked = set(self._waiting)

    def _reindex_parked(self) -> None:
        """Nothing to do: `served` keeps the set."""

    def _ready(self, provider: str) -> list[Mediator]:
        waiting = self._waiting.get(provider)
        if waiting is None:
            return []
        mediator = waiting.get(next(iter(waiting.values())).occurrence(provider))
        return [] if mediator is None else [mediator]

    def served(self, provider: str, occurrence: int) -> None:
        """A mediator has got what it waited for."""
        waiting = self._waiting[provider]
        del waiting[occurrence]
        if not waiting:
            del self._waiting[provider]
            self.parked.discard(provider)

    def run(
        self,
        call: Callable[[], T],
        steps: Mapping[int, Sequence[SiteMediator]],
        stopping: Stopping,
        opened: Collection[Inside] = (),
        stepwise: bool = False,
    ) -> T | None:
        """Let a call of the model meet its mediators.

        Args:
            call: Calls the model, once or several times.
            steps: Who waits in which of these calls.
            stopping: Ends it early.
            opened: Functions to instrument, besides those that mediators wait in.
            stepwise: Whether attention is computed step by step even if nobody waits where it has to be.

        Returns:
            What `call` returns; None if it was ended by a mediator.

        Raises:
            PatchwireError: it was stopped, or a mediator raised it.
        """
        self.mediators = [each for mediators in steps.values() for each in mediators]
        self._steps = steps
        self.stopping = stopping
        self._thread = threading.get_ident()
        self.counts = {}
        result = None
        places = [each.location for each in self.mediators]
        inside = {(each.module, each.operations[:-1]) for each in places if each.operations} | set(opened)
        self._opened = {base(path, way[: end + 1]): None for path, way in inside for end in range(len(way))}
        ways = {(each.module, each.operations) for each in places} | {(path, (*way, "")) for path, way in opened}
        stepwise |= self.goes_stepwise(ways)
        try:
            modules = {"", *self.boundaries, *(each.module for each in places)}
            if self.observe is not None:
                modules |= set(self._controllers.paths)
            attention = step_by_step(self.module) if stepwise else contextlib.nullcontext()
            with attention, self._controllers.on(modules, {path for path, _ in inside}), self:
                self.sourced |= dict.fromkeys((*self._opened, *self.looked_into))
                result = call()
        finally:
            self.cancel()
            self.sourced.clear()
            self._waiting, self._steps = {}, {}
            self.parked = set()
            self.stopping = Stopping()
        return result

    def goes_stepwise(self, ways: Iterable[tuple[str, Sequence[str]]]) -> bool:
        """Whether attention is computed step by step because of where somebody waits: in modules, at operations."""
        return self.steps_are_exact and any(
            needs_steps(self.module.get_submodule(path), operations) for path, operations in ways
        )

    def switches(self, path: str) -> bool:
        """Whether a module's forward has operations for the sake of which attention is computed step by step."""
        return self.steps_are_exact and bool(only_eager(self.module.get_submodule(path)))

    @property
    def calls(self) -> int:
        """How often the model was called in the last run."""
        return self._step + 1

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Apply a module, in the middle of a pass or outside of one, without its sites being seen.

        Raises:
            PatchwireError: the pass was stopped.
        """
        self._applying = True
        sourced, self.sourced = self.sourced, {}
        try:
            return module(*args, **kwargs)
        finally:
            self.sourced = sourced
            self._applying = False
