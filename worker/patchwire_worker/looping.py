"""Loops: each iteration is an ordinary graph, the body with this iteration's rows and values from outside.

So it is checked, planned and executed as every other graph is. It is checked again only when its rows are of other
lengths than those before, and planned again only when they are other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from patchwire import graph as g
from patchwire.checking import Checker
from patchwire_worker.admission import Admitted
from patchwire_worker.planner import Plan, plan


class Iterations:
    """What runs in each iteration of a loop."""

    def __init__(self, body: Admitted) -> None:
        self._body = body
        self._lengths: list[list[int]] | None = None
        self._rows: list[g.Invoke] | None = None
        self._checker = body.checker
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
        lengths = [each.lengths for each in rows]
        if lengths != self._lengths:
            before = self._checker
            self._checker = Checker(graph, before.catalogue, value_bytes=before.value_bytes)
            self._checker.all()
            self._lengths = lengths
        admitted = replace(self._body, graph=graph, checker=self._checker)
        if self._plan is None or any(each.batches for each in rows):
            self._plan = plan(admitted)
        return admitted, self._plan
