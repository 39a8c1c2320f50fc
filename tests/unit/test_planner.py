"""Planning: invokes that cannot share a pass run one after the other, and nobody's number of them makes it slow."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch.fx

from patchwire import graph as g
from patchwire import ops
from patchwire.checking import Checker
from patchwire.errors import LimitError, OrderError, SourceLine
from patchwire.sites import Address
from patchwire_worker import planner
from patchwire_worker.admission import Admitted
from patchwire_worker.planner import Plan, plan


class Request:
    """A graph of one trace whose invokes have one row each, for a model that takes rows of one length only."""

    def __init__(self, catalogue: Any, *lengths: int) -> None:
        self.catalogue = catalogue
        self.graph = g.Graph(traces=[g.Trace("tiny", [g.Invoke(((1,) * each,)) for each in lengths])])
        self.checker = Checker(self.graph, lambda name: catalogue)

    def add(self, target: Any, *args: Any) -> torch.fx.Node:
        operation = ops.OPERATIONS.get(target) if isinstance(target, str) else None
        node = self.graph.fx.call_function(operation.function if operation else target, args)
        node.meta |= {"operation": operation, "line": SourceLine("user.py", len(self.graph.nodes), "code")}
        self.checker.node(node)
        return node

    def site(self, invoke: int, layer: int) -> g.Site:
        return g.Site(0, invoke, Address(f"layers.{layer}.output"))

    def carry(self, source: int, target: int, layer: int = 0) -> None:
        """Write into one invoke what is computed from another."""
        mean = self.add("torch.mean", self.add(g.read, self.site(source, layer)))
        old = self.add(g.read, self.site(target, layer))
        self.add(g.write, self.site(target, layer), self.add("torch.add", old, mean))

    def plan(self) -> Plan:
        for invoke in range(len(self.graph.traces[0].invokes)):
            self.add(g.save, self.add(g.read, g.Site(0, invoke, Address("logits"))), None)
        nodes = self.graph.nodes
        leaves = {node.args[0]: self.checker.leaf(node.args[0]) for node in nodes if node.target in (g.read, g.write)}
        model = SimpleNamespace(
            pads=False,
            trimmed=None,
            narrowed=None,
            overwritten=frozenset(),
            catalogue=self.catalogue,
            entries=[],
            entries_after_past=[],
            looking_back=frozenset(),
            noted_at=None,
            seconds_like=lambda rows, seq, end: rows * seq * end,
            fits=lambda size: True,
            interleaver=SimpleNamespace(goes_stepwise=lambda ways: False),
        )
        positions = {node: index for index, node in enumerate(nodes)}
        return plan(Admitted(self.graph, [model], self.checker, leaves, positions))


def lengths_of(planned: Plan) -> list[int]:
    return [each.ids.shape[1] for each in planned.passes]


def test_invokes_that_depend_on_none_run_in_their_order(catalogue):
    assert lengths_of(Request(catalogue, 3, 4, 5).plan()) == [3, 4, 5]


def test_an_invoke_runs_after_those_whose_values_it_takes(catalogue):
    request = Request(catalogue, 3, 4, 5)
    request.carry(source=2, target=1)
    request.carry(source=1, target=0, layer=1)

    assert lengths_of(request.plan()) == [5, 4, 3]


def test_an_invoke_may_take_values_of_its_own(catalogue):
    request = Request(catalogue, 3, 4)
    request.carry(source=0, target=0)

    assert lengths_of(request.plan()) == [3, 4]


def test_invokes_that_take_values_of_each_other_are_refused_naming_both_lines(catalogue):
    request = Request(catalogue, 3, 4)
    request.carry(source=0, target=1, layer=0)
    request.carry(source=1, target=0, layer=1)

    with pytest.raises(OrderError, match="write values of each other") as caught:
        request.plan()
    assert [line.line for line in caught.value.lines] == [5, 10]


def test_a_long_chain_of_invokes_is_ordered_at_once(catalogue):
    request = Request(catalogue, *[3, 4] * 1000)
    for source in reversed(range(1, 2000)):
        request.carry(source, source - 1)

    start = time.process_time()
    planned = request.plan()

    assert lengths_of(planned) == [4, 3] * 1000
    assert time.process_time() - start < 20


def test_too_many_invokes_that_depend_on_each_other_are_refused_naming_a_line(catalogue, monkeypatch):
    monkeypatch.setattr(planner, "_MAX_ENTRIES", 50)
    request = Request(catalogue, *[3, 4] * 20)
    for source in range(39):
        request.carry(source, source + 1)

    with pytest.raises(LimitError, match="Too many invokes") as caught:
        request.plan()
    assert caught.value.lines
    assert "in a second" in caught.value.hint
