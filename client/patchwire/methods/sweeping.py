"""Sweeps: the same measurement for many cells, in as few requests as may be.

Every cell is an invoke of its own. Those of one request share passes, and what they have in common is computed once; so
cells are put into one request until it has many tokens, and only then is there a second, and a bar that shows how far
it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from patchwire.model import Model
from patchwire.results import Stats
from patchwire.tracing import Trace

_TOKENS = 1 << 16
"""How many tokens all cells of a request have together."""
_WRITES = 1 << 14
"""How many writes; a server takes so many nodes in a graph, of which each write is a few."""

Cell = TypeVar("Cell")
Runs = TypeVar("Runs")


def sweep(
    model: Model,
    cells: Sequence[Cell],
    tokens: int,
    before: Callable[[Trace], Runs],
    measure: Callable[[Trace, Runs, Cell], Any],
    *,
    writes: int = 1,
    what: str = "cells",
) -> tuple[Tensor, list[Runs], Stats]:
    """Measure every cell.

    Args:
        model: The model.
        cells: What is measured.
        tokens: How many tokens a cell's rows have together.
        before: Records what all cells of a request need; is called once for each request.
        measure: Records a cell and gives its number, or numbers, of the same shape for all.
        writes: How many parts of sites a cell writes.
        what: What the cells are, for the bar.

    Returns:
        The numbers, `[cells, …]`; what `before` gave for each request, whose saved values are there now; and the cost.
    """
    size = max(1, min(_TOKENS // max(1, tokens), _WRITES // max(1, writes)))
    found: list[Any] = []
    runs: list[Runs] = []
    costs: list[Stats] = []
    with _bar(what, len(cells), shown=len(cells) > size) as advance:
        for start in range(0, len(cells), size):
            part = cells[start : start + size]
            with model.trace() as trace:
                common = before(trace)
                found += [measure(trace, common, cell).save() for cell in part]
            assert trace.stats is not None
            runs.append(common)
            costs.append(trace.stats)
            advance(len(part))
    return torch.stack([each.value for each in found]), runs, Stats.sum(costs)


@contextmanager
def _bar(what: str, total: int, *, shown: bool) -> Iterator[Callable[[int], Any]]:
    """A bar on the terminal; nothing if everything is one request."""
    if not shown:
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
