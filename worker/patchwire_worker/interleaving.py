"""How a pass meets the model: nnsight's interleaver, with one mediator for each site that somebody waits for.

nnsight puts a controller around every module's forward, which offers each input and output to the interleaver; the
interleaver hands it to the mediators that wait for that location. nnsight's own mediators run user code in a greenlet.
Ours wait for one fixed location and call a function with the value: no greenlet, no code.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from nnsight.intervention.interleaver import EarlyStopException, Event, Interleaver, Mediator, Pending
from torch import nn

from patchwire.errors import PatchwireError
from patchwire.sites import INPUT, OUTPUT

Location = tuple[str, str]
"""A module's raw path and a side of it."""

_ROOT = "model"


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

    def stop(self, reason: PatchwireError) -> None:
        """End the pass at its next site; the first reason counts."""
        if self.reason is None:
            self.reason = reason


class PassInterleaver(Interleaver):  # type: ignore[misc]
    """nnsight's interleaver, for passes that can be stopped at every module boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.stopping = Stopping()
        self.observe: Callable[[str, Any], None] | None = None
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
        if self.observe is not None:
            self.observe(provider, value)
        if provider not in self.parked:
            return value
        return super().handle(provider, value)

    # One mediator waits for one visit of one location, so a dictionary does what nnsight does by searching its list.

    def reindex(self) -> None:
        """Note who waits for what, at the start of a pass."""
        self.observers: dict[str, Any] = {}
        self._waiting = {each.pending.provider: each for each in self.mediators if each.pending is not None}
        self.parked = set(self._waiting)
        self.busy = True

    def _reindex_parked(self) -> None:
        """Nothing to do: `served` keeps the set."""

    def _ready(self, provider: str) -> list[Mediator]:
        mediator = self._waiting.get(provider)
        return [] if mediator is None else [mediator]

    def served(self, provider: str) -> None:
        """A mediator has got what it waited for."""
        del self._waiting[provider]
        self.parked.discard(provider)

    def run(self, module: nn.Module, mediators: list[SiteMediator], stopping: Stopping, **inputs: Any) -> None:
        """One forward pass of `module` with these mediators.

        Raises:
            PatchwireError: it was stopped, or a mediator raised it.
        """
        self.mediators = mediators
        self.stopping = stopping
        self._thread = threading.get_ident()
        try:
            with self:
                module(**inputs)
        finally:
            self.cancel()
            self._waiting = {}
            self.parked = set()
            self.stopping = Stopping()

    def call(self, module: nn.Module, stopping: Stopping, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Apply a module, in the middle of a pass or outside of one, without its sites being seen.

        Raises:
            PatchwireError: it was stopped.
        """
        before = (self.interleaving, self.busy, self.stopping, self._thread)
        self.interleaving, self.busy, self.stopping, self._thread = True, True, stopping, threading.get_ident()
        self._applying = True
        try:
            return module(*args, **kwargs)
        finally:
            self._applying = False
            self.interleaving, self.busy, self.stopping, self._thread = before
