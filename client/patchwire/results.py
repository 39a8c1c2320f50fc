"""What a run cost, and how far it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

from rich import get_console
from rich.progress import BarColumn, DownloadColumn, ProgressColumn, TaskID, TextColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress
from torch import Tensor

from patchwire import logs
from patchwire.errors import SourceLine
from patchwire.graph import KeptTensor
from patchwire.v1 import service_pb2

_SHOWN_FROM_BYTES = 32 << 20
_ON_SCREEN = threading.Lock()
"""Held by the one bar that is shown: a terminal has room for no second."""


@dataclass(frozen=True)
class Stats:
    """What a request cost."""

    passes: int = 0
    """Forward passes of models."""
    rows: int = 0
    """Rows in all of them."""
    modules_skipped: int = 0
    """Modules that were left out because nobody needed what came after the last site."""
    seconds_queued: float = 0.0
    """How long it waited."""
    seconds_running: float = 0.0
    """How long it ran."""
    result_bytes: int = 0
    """Bytes of the saved values."""
    forks: int = 0
    """How often rows that were shared forked, to be computed apart from there on."""
    companions: int = 0
    """Requests of others that ran in the same passes."""

    @classmethod
    def from_proto(cls, message: service_pb2.Done) -> Stats:
        """The statistics of a message."""
        return cls(
            message.passes,
            message.rows,
            message.modules_skipped,
            message.seconds_queued,
            message.seconds_running,
            message.result_bytes,
            message.forks,
            message.companions,
        )

    @classmethod
    def sum(cls, costs: Iterable[Stats]) -> Stats:
        """What several requests cost together."""
        known = list(costs)
        return cls(*(sum(getattr(each, one.name) for each in known) for one in fields(cls)))


To = Callable[[Tensor], object] | Tensor
"""Where a saved value goes when it comes: to a function, which is given the tensor, or into the memory of a tensor."""

OnTokens = Callable[[int, int, list[int]], None]
"""Takes new tokens of a generation: its trace, its invoke, and an id for each row."""


@dataclass
class Results:
    """What came back from a request."""

    stats: Stats
    """What it cost."""
    saved: list[Tensor | None]
    """The saved tensors, in the order of the graph's saves; None for what was not reached."""
    kept: list[tuple[KeptTensor, float]]
    """What the server keeps, in the order of the graph's keeps, and for how many seconds from its arrival on."""
    loops: dict[int, list[list[Tensor | None]]]
    """Of each loop, by its position in the graph's traces: the saved tensors of each iteration that it came to."""


class Progress:
    """Shows a bar when a request brings many bytes, and a line when it has to wait."""

    def __init__(self, show: bool = True, on_tokens: OnTokens = lambda *_: None) -> None:
        """
        Args:
            show: Whether to show anything.
            on_tokens: Told the new tokens of a generation: its trace, its invoke, an id for each row.
        """
        self.show = show
        self.tokens = on_tokens
        self._total = 0
        self._done = 0
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def queued(self, position: int) -> None:
        """The request waits behind `position` others."""
        if position and self.show:
            self._describe(f"waiting behind {position}")

    def running(self, number: int, passes: int) -> None:
        """A pass has begun."""
        if self._bar is not None or (passes > 1 and self.show):
            self._describe(f"pass {number} of {passes}")

    def iterated(self, done: int, count: int) -> None:
        """A loop has come so far."""
        if self.show:
            self._describe(f"iteration {done:,} of {count:,}")

    def interrupted(self) -> None:
        """Somebody has pressed Ctrl-C."""
        if self.show:
            self._describe("ending after this iteration; Ctrl-C again to give up")

    def bytes(self, arrived: int, announced: int) -> None:
        """Bytes have arrived, or have been announced."""
        self._done += arrived
        self._total += announced
        if self.show and self._total >= _SHOWN_FROM_BYTES:
            self._describe("receiving")
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, total=self._total)

    def logged(self, text: str, line: SourceLine | None) -> None:
        """A log has come: printed above the bar, if there is one, which takes what is printed meanwhile."""
        print(logs.printed(text, line), flush=True)

    def _describe(self, text: str) -> None:
        if self._bar is None:
            if not _ON_SCREEN.acquire(blocking=False):
                return
            columns: list[ProgressColumn] = [
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
            ]
            console = get_console()  # in a file, a bar would leave nothing but empty lines
            shown = console.is_terminal or console.is_jupyter
            self._bar = RichProgress(*columns, console=console, transient=True, disable=not shown)
            self._bar.start()
            self._task = self._bar.add_task(text, total=None)
        assert self._task is not None
        self._bar.update(self._task, description=text)

    def close(self) -> None:
        """The request has ended."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            _ON_SCREEN.release()
