"""Planning: from a graph to the passes that give what it asks for.

A trace becomes one pass: the rows of its invokes, padded on the right, and for every location that matters the reads
and writes there. What nobody needs is left out: a read whose value reaches no saved value, a write after the last read
that matters. The pass ends after the last location that is left. Invokes whose rows cannot share a pass get passes of
their own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field

import torch
import torch.fx
from torch import Tensor

from patchwire import graph as g
from patchwire.errors import OrderError
from patchwire.sites import Axis, Leaf
from patchwire_worker.admission import Admitted
from patchwire_worker.interleaving import Location
from patchwire_worker.rows import Rows


@dataclass(frozen=True)
class Access:
    """A read or write of one tensor for the rows of one invoke."""

    node: torch.fx.Node
    leaf: Leaf
    rows: Rows


@dataclass
class Work:
    """What happens at one location: first everything is read, then everything is written."""

    location: Location
    order: int
    reads: list[Access] = field(default_factory=list)
    writes: list[Access] = field(default_factory=list)


@dataclass(frozen=True)
class Pass:
    """One forward pass of the model."""

    ids: Tensor
    """Token ids `[batch, seq]`, short rows padded on the right."""
    works: list[Work]
    """What happens where, in the order of the forward pass; it ends after the last."""
    modules_skipped: int
    """How many modules come after that."""


@dataclass(frozen=True)
class Plan:
    """What a request needs."""

    passes: list[Pass]
    """In the order in which they run."""
    needed: set[torch.fx.Node]
    """The nodes that have to be evaluated."""


def plan(admitted: Admitted) -> Plan:
    """The passes of a graph.

    Raises:
        OrderError: invokes that cannot share a pass need values of each other.
    """
    needed = _needed(admitted)
    passes: list[Pass] = []
    for index, trace in enumerate(admitted.graph.traces):
        for invokes in _groups(admitted, index, trace, needed):
            made = _pass(admitted, index, trace, invokes, needed)
            if made.works:
                passes.append(made)
    return Plan(passes, needed)


def _needed(admitted: Admitted) -> set[torch.fx.Node]:
    """Every node that a saved value depends on, through the graph or through the model."""
    needed: set[torch.fx.Node] = set()

    def need(node: torch.fx.Node) -> None:
        stack = [node]
        while stack:
            each = stack.pop()
            if each not in needed:
                needed.add(each)
                stack.extend(each.all_input_nodes)

    accesses: dict[int, list[torch.fx.Node]] = defaultdict(list)
    for node in admitted.graph.fx.nodes:
        if node.target is g.save:
            need(node)
        elif node.target in (g.read, g.write):
            accesses[node.args[0].trace].append(node)
    for trace in sorted(accesses, reverse=True):
        # From the last location to the first: a write matters if something is read after it that matters.
        last_read = -1
        for node in sorted(accesses[trace], key=lambda each: _moment(admitted, each), reverse=True):
            order = admitted.leaves[node.args[0]].order  # type: ignore[index]
            if node.target is g.write and last_read > order:
                need(node)
            elif node.target is g.read and node in needed:
                last_read = max(last_read, order)
    return needed


def _moment(admitted: Admitted, node: torch.fx.Node) -> tuple[int, bool]:
    return admitted.leaves[node.args[0]].order, node.target is g.write  # type: ignore[index]


def _groups(admitted: Admitted, index: int, trace: g.Trace, needed: set[torch.fx.Node]) -> list[list[int]]:
    """The invokes of a trace, in groups that share a pass."""
    everyone = list(range(len(trace.invokes)))
    lengths = {length for invoke in trace.invokes for length in invoke.lengths}
    sites = [
        (node, admitted.leaves[node.args[0]])  # type: ignore[index]
        for node in needed
        if node.target in (g.read, g.write) and node.args[0].trace == index  # type: ignore[union-attr]
    ]
    splits = all(leaf.packs for _, leaf in sites)
    shared_writes = any(node.target is g.write and not _writes_alone(admitted, leaf) for node, leaf in sites)
    if len(everyone) == 1 or (splits and not shared_writes and (admitted.model.pads or len(lengths) == 1)):
        return [everyone]
    return [[invoke] for invoke in _ordered(index, everyone, needed)]


def _writes_alone(admitted: Admitted, leaf: Leaf) -> bool:
    """Whether a write of one invoke's rows leaves other rows of the pass alone.

    It does not where all rows share one value, nor where the model later changes the tensor in place, and expects to
    find the change in other tensors that share its memory: after a write it goes on with a copy.
    """
    has_rows = any(dim.axis in (Axis.BATCH, Axis.BATCH_SEQ) for dim in leaf.shape)
    return has_rows and (leaf.location, leaf.path) not in admitted.model.overwritten


def _ordered(trace: int, invokes: list[int], needed: set[torch.fx.Node]) -> list[int]:
    """Invokes that run one after the other, those first whose values others write."""
    sources: dict[int, dict[int, torch.fx.Node]] = {invoke: {} for invoke in invokes}
    for node in needed:
        if node.target is g.write and node.args[0].trace == trace:  # type: ignore[union-attr]
            for site in _reads_behind(node):
                if site.trace == trace and site.invoke != node.args[0].invoke:  # type: ignore[union-attr]
                    sources[node.args[0].invoke][site.invoke] = node  # type: ignore[union-attr]
    order: list[int] = []
    while len(order) < len(invokes):
        free = [each for each in invokes if each not in order and all(source in order for source in sources[each])]
        if not free:
            lines = [g.line_of(node) for each in invokes if each not in order for node in sources[each].values()]
            raise OrderError(
                "These invokes write values of each other and cannot share a pass.",
                hint="Save the values of one trace and write them in a second.",
                lines=[line for line in lines if line is not None][:2],
            )
        order.extend(free)
    return order


def _reads_behind(node: torch.fx.Node) -> set[g.Site]:
    found: set[g.Site] = set()
    seen: set[torch.fx.Node] = set()
    stack = [node]
    while stack:
        for each in stack.pop().all_input_nodes:
            if each not in seen:
                seen.add(each)
                stack.append(each)
                if each.target is g.read:
                    found.add(each.args[0])  # type: ignore[arg-type]
    return found


def _pass(admitted: Admitted, index: int, trace: g.Trace, invokes: list[int], needed: set[torch.fx.Node]) -> Pass:
    rows = [row for invoke in invokes for row in trace.invokes[invoke].rows]
    batch, seq = len(rows), max(len(row) for row in rows)
    # Which id stands for padding does not matter: nobody ever looks at it.
    ids = torch.zeros((batch, seq), dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    places: dict[int, Rows] = {}
    start = 0
    for invoke in invokes:
        lengths = tuple(trace.invokes[invoke].lengths)
        places[invoke] = Rows(start, lengths, batch, seq)
        start += len(lengths)
    works: dict[Location, Work] = {}
    for node in admitted.graph.fx.nodes:
        if node not in needed or node.target not in (g.read, g.write):
            continue
        site = node.args[0]
        assert isinstance(site, g.Site)
        if site.trace == index and site.invoke in places:
            leaf = admitted.leaves[site]
            work = works.setdefault(leaf.location, Work(leaf.location, leaf.order))
            access = Access(node, leaf, places[site.invoke])
            (work.reads if node.target is g.read else work.writes).append(access)
    ordered = sorted(works.values(), key=lambda work: work.order)
    return Pass(ids, ordered, _skipped(admitted, ordered[-1].order) if ordered else 0)


def _skipped(admitted: Admitted, last: int) -> int:
    """How many modules are entered only after a position in the order of sites."""
    entries = admitted.model.catalogue.entries
    return len(entries) - bisect_right(entries, last)
