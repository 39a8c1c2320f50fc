"""How a pass meets the model: nnsight's interleaver, with one mediator for each site that somebody waits for.

nnsight puts a controller around every module's forward, which offers each input and output to the interleaver; the
interleaver hands it to the mediators that wait for that location. nnsight's own mediators run user code in a greenlet.
Ours wait for one fixed location and call a function with the value: no greenlet, no code. And a controller is on its
module only during passes in which somebody waits there, so that all others cost what the plain model does.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from nnsight import NNsight
from nnsight.intervention.interleaver import EarlyStopException, Event, Interleaver, Mediator, Pending
from nnsight.intervention.source import STATE
from torch import nn

from patchwire.errors import PatchwireError
from patchwire.sites import INPUT, OUTPUT

Location = tuple[str, str]
"""A module's raw path and a side of it."""

_ROOT = "model"
_ENTRY = f"{_ROOT}.{INPUT}"
T = TypeVar("T")


def provider(location: Location) -> str:
    """nnsight's name of a location."""
    path, side = location
    return f"{_ROOT}.{path}.{side}" if path else f"{_ROOT}.{side}"


def location_of(provider: str) -> Location | None:
    """The location of one of nnsight's names; None for its other hand-overs."""
    path, _, side = provider.rpartition(".")
    if side not in (INPUT, OUTPUT):
        return None
    return path.removeprefix(_ROOT).removeprefix("."), side


class SiteMediator(Mediator):  # type: ignore[misc]
    """Waits for one visit of one location and replaces the value there by what `arrive` returns.

    `arrive` may raise `StopPass` to end the pass after this location.
    """

    def __init__(self, location: Location, arrive: Callable[[Any], Any]) -> None:
        # Mediator's own constructor takes the code to run; there is none.
        self.location = location
        self._wait = Pending(Event.VALUE, provider(location), 0)
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
        self.interleaver.served(provider)
        return self._arrive(value)


StopPass = EarlyStopException
"""Ends a pass after the location at which it is raised: nobody needs what comes after."""


class Stopping:
    """Says whether a pass has to end before it is done, and why."""

    def __init__(self) -> None:
        self.reason: PatchwireError | None = None
        self.interrupted = False
        """Whether loops end after the iteration that they are in."""

    def stop(self, reason: PatchwireError) -> None:
        """End the pass at its next site; the first reason counts."""
        if self.reason is None:
            self.reason = reason


class _Controllers:
    """nnsight's controllers of a model's modules, by path, put on when they are needed."""

    _SLOTS = ("forward", STATE)

    def __init__(self, module: nn.Module, interleaver: Interleaver) -> None:
        before = {each: self._slots(each) for each in module.modules()}
        with warnings.catch_warnings():
            # nnsight says where a module's own name hides behind one of nnsight's; raw paths are not affected.
            warnings.simplefilter("ignore")
            self._envoy = NNsight(module, interleaver=interleaver)
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
    def on(self, paths: Iterable[str]) -> Iterator[None]:
        """Have those of some modules on."""
        before = []
        try:
            for path in paths:
                module, slots = self._by_path[path]
                before.append((module, self._slots(module)))
                self._fill(module, slots)
            yield
        finally:
            for module, slots in reversed(before):
                self._fill(module, slots)

    def _slots(self, module: nn.Module) -> dict[str, Any]:
        return {slot: module.__dict__[slot] for slot in self._SLOTS if slot in module.__dict__}

    def _fill(self, module: nn.Module, slots: dict[str, Any]) -> None:
        for slot in self._SLOTS:
            module.__dict__.pop(slot, None)
        module.__dict__.update(slots)


class PassInterleaver(Interleaver):  # type: ignore[misc]
    """nnsight's interleaver, for passes that can be stopped at module boundaries.

    Attributes:
        boundaries: The modules at which every pass can be stopped, besides those where somebody waits; all, until it is
            said which.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._controllers = _Controllers(module, self)
        self.boundaries: Collection[str] = self._controllers.paths
        self.stopping = Stopping()
        self.observe: Callable[[str, Any], None] | None = None
        self._steps: Mapping[int, Sequence[SiteMediator]] = {}
        self._step = -1
        self._waiting: dict[str, Mediator] = {}
        self.interleaving: bool = False
        self._thread = 0
        self._applying = False

    def handle(self, provider: str, value: Any) -> Any:
        """Offer a value to those that wait for it; the value to go on with."""
        if threading.get_ident() != self._thread:
            return value  # somebody else's forward pass of the same module
        if self.stopping.reason is not None:
            raise self.stopping.reason
        if self._applying:
            return value
        if provider == _ENTRY:
            self._next_step()
        if self.observe is not None:
            self.observe(provider, value)
        if provider not in self.parked:
            return value
        return super().handle(provider, value)

    # One mediator waits for one visit of one location, so a dictionary does what nnsight does by searching its list.

    def reindex(self) -> None:
        """Note who waits for what, at the start of a pass."""
        self.observers: dict[str, Any] = {}
        self.busy = True
        self._step = -1

    def _next_step(self) -> None:
        """The model is called: for the first time, or for the next token. Those wait who wait for this call."""
        self._step += 1
        waiting = self._steps.get(self._step, ())
        self._waiting = {each.pending.provider: each for each in waiting if each.pending is not None}
        self.parked = set(self._waiting)

    def _reindex_parked(self) -> None:
        """Nothing to do: `served` keeps the set."""

    def _ready(self, provider: str) -> list[Mediator]:
        mediator = self._waiting.get(provider)
        return [] if mediator is None else [mediator]

    def served(self, provider: str) -> None:
        """A mediator has got what it waited for."""
        del self._waiting[provider]
        self.parked.discard(provider)

    def run(self, call: Callable[[], T], steps: Mapping[int, Sequence[SiteMediator]], stopping: Stopping) -> T | None:
        """Let a call of the model meet its mediators.

        Args:
            call: Calls the model, once or several times.
            steps: Who waits in which of these calls.
            stopping: Ends it early.

        Returns:
            What `call` returns; None if it was ended by a mediator.

        Raises:
            PatchwireError: it was stopped, or a mediator raised it.
        """
        self.mediators = [each for mediators in steps.values() for each in mediators]
        self._steps = steps
        self.stopping = stopping
        self._thread = threading.get_ident()
        result = None
        try:
            with self._controllers.on({"", *self.boundaries, *(each.location[0] for each in self.mediators)}), self:
                result = call()
        finally:
            self.cancel()
            self._waiting, self._steps = {}, {}
            self.parked = set()
            self.stopping = Stopping()
        return result

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
        try:
            return module(*args, **kwargs)
        finally:
            self._applying = False
