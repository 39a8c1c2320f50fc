"""Loops: each iteration is an ordinary graph, the body with this iteration's rows and values from outside.

So it is checked, planned and executed as every other graph is. It is checked again only for shapes that no iteration
before had, and planned again only when its rows change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from patchwire.checking import Checker
from patchwire_worker.admission import Admitted
from patchwire_worker.planner import Plan, plan

_Shape = tuple[int, int, bool]
"""What the fakes of an invoke's sites depend on: its rows, the longest of them, and whether they differ in length."""


class Iterations:
    """What runs in each iteration of a loop."""

    def __init__(self, body: Admitted) -> None:
        self._body = body
        self._checked: set[tuple[_Shape, ...]] = set()
        self._plan: Plan | None = None

    def at(self, number: int, outside: Sequence[Tensor]) -> tuple[Admitted, Plan]:
        """The graph and the passes of an iteration.

        Args:
            number: Which.
            outside: Its values from outside.

        Raises:
            PatchwireError: it does not fit its rows.
        """
        graph = self._body.graph.at(number)
        graph.outside = list(outside)
        rows = [each for trace in graph.traces for each in trace.invokes]
        shapes = tuple((len(each.rows), max(each.lengths), len(set(each.lengths)) > 1) for each in rows)
        checker = Checker(graph, self._body.checker.catalogue, value_bytes=self._body.checker.value_bytes)
        if shapes not in self._checked:
            checker.all()
            self._checked.add(shapes)
        admitted = replace(self._body, graph=graph, checker=checker)
        if self._plan is None or any(each.batches for each in rows):
            self._plan = plan(admitted)
        return admitted, self._plan
