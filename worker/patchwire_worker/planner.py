"""Planning: from a graph to the passes that give what it asks for.

A trace becomes one pass, or part of one with others of its session, or several where it would not fit. What nobody
needs is left out: a read whose value reaches no saved value, a write after the last read that matters. Invokes whose
rows cannot share a pass get passes of their own.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import chain, pairwise
from operator import itemgetter
from typing import Any

import torch
import torch.fx

from patchwire import graph as g
from patchwire.checking import leaf_of
from patchwire.errors import LimitError, OperationError, OrderError
from patchwire.sites import Axis, Leaf, Order
from patchwire_worker.admission import Admitted, at
from patchwire_worker.idle import idle_writes
from patchwire_worker.models.costs import Size
from patchwire_worker.models.hosted import HostedModel
from patchwire_worker.placing import Group, Invoke, Needed, Pass, placed
from patchwire_worker.reuse import parts_after_past

_MAX_ENTRIES = 1 << 22


@dataclass(frozen=True)
class Looping:
    """A loop, which runs between the passes."""

    trace: int
    """The loop, as a position in the graph's traces."""
    node: torch.fx.Node
    """The node whose value are its results."""


@dataclass(frozen=True)
class Plan:
    """What a request needs."""

    passes: list[Pass | Looping]
    """In the order in which they run."""
    needed: set[torch.fx.Node]
    """The nodes that have to be evaluated."""
    differentiated: set[torch.fx.Node] = field(default_factory=set)
    """The nodes with respect to whose values there are gradients."""


_Accesses = defaultdict[Invoke, list[torch.fx.Node]]
"""The needed reads and writes of each invoke, in order."""


def plan(admitted: Admitted) -> Plan:
    """The passes of a graph.

    Raises:
        OrderError: invokes that cannot share a pass need values of each other.
    """
    needed = _needed(admitted)
    accesses: _Accesses = defaultdict(list)
    weights: defaultdict[int, list[torch.fx.Node]] = defaultdict(list)
    loops: dict[int, torch.fx.Node] = {}
    for node in admitted.graph.fx.nodes:
        if node not in needed:
            continue
        if node.target in (g.read, g.write):
            accesses[node.args[0].trace, node.args[0].invoke].append(node)
        elif node.target is g.generated:
            accesses[node.args[0], node.args[1]].append(node)
        elif node.target is g.assign:
            weights[node.args[0]].append(node)
        elif node.target is g.loop:
            loops[node.args[0]] = node
    gradients = [node for node in needed if node.target is g.grad]
    differentiated = {value for node in gradients for value in node.args[1]}  # type: ignore[union-attr]
    for node in differentiated:
        _check_stays(admitted, node)  # type: ignore[arg-type]
    behind = cache(lambda: _invokes_behind(admitted, needed))
    needs = Needed(needed)
    steps: list[Gathering | Looping] = []
    gathering = Gathering()
    for index, trace in enumerate(admitted.graph.traces):
        if trace.loop is not None:
            steps += [Looping(index, loops[index])] if index in loops else []
            gathering = Gathering()
            continue
        changed, invokes = weights.get(index, []), [(index, invoke) for invoke in range(len(trace.invokes))]
        shares = not (trace.exact or trace.generation or changed or differentiated)
        whole = Group(admitted, invokes, accesses, needs, changed, bool(differentiated), shares)
        groups = _groups(whole, differentiated, behind)  # type: ignore[arg-type]
        if len(groups) == 1 and gathering.takes(groups[0]):
            continue
        gatherings = [Gathering(each) for each in groups]
        steps += gatherings
        gathering = gatherings[-1]
    passes: list[Pass | Looping] = []
    for step in steps:
        if isinstance(step, Looping):
            passes.append(step)
        else:
            passes += [placed([group]) for group in parts_after_past(step.group)]
    return Plan([each for each in passes if _matters(each)], needed, differentiated)  # type: ignore[arg-type]


def _matters(each: Pass | Looping) -> bool:
    return isinstance(each, Looping) or bool(each.works or (each.generation and each.generation.results))


class Gathering:
    """Groups that share a pass, one after the other.

    A group joins those before it if no row has another number in company, if the pass costs less than two would, and if
    it needs nothing that the pass has too late, or what runs in between.
    """

    def __init__(self, *groups: Group) -> None:
        self.groups: list[Group] = []
        self._size: Size | None = None
        self._alike = True
        self._traces: set[tuple[int, int]] = set()
        self._when: dict[torch.fx.Node, Order] = {}
        for each in groups:
            self._add(each, each.size)

    @property
    def group(self) -> Group:
        """All of them as one; they are of one request."""
        first, *others = self.groups
        return first.of([*first.invokes, *(invoke for each in others for invoke in each.invokes)]) if others else first

    def takes(self, group: Group) -> bool:
        """Whether a group joins; it has joined then."""
        if self._size is None or not (group.shares and self.groups[0].shares and group.model is self.groups[0].model):
            return False
        model, size = group.model, self._size + group.size
        if _cost(model, size) > _cost(model, self._size) + _cost(model, group.size) or not model.fits(size):
            return False
        if not model.pads and not (self._alike and len(_lengths(group)) == 1 and group.size.seq == self._size.seq):
            return False
        if len(self.groups) == 1 and not _may_share(self.groups[0], ()):
            return False
        if not _may_share(group, ()) or not self._in_time(group):
            return False
        self._add(group, size)
        return True

    def _add(self, group: Group, size: Size) -> None:
        self.groups.append(group)
        self._size = size
        self._alike &= len(_lengths(group)) == 1
        self._traces |= {(id(group.admitted), trace) for trace, _ in group.invokes}

    def _in_time(self, group: Group) -> bool:
        """Whether what it writes exists by then, in a pass with those that have joined."""
        return all(
            self._latest(group, node.args[1]) <= leaf_of(node).order  # type: ignore[arg-type]
            for node in group.nodes
            if node.target is g.write
        )

    def _latest(self, group: Group, node: torch.fx.Node) -> Order:
        """When the last value of this pass that a node depends on exists; empty if it depends on none."""
        own, request = {trace for trace, _ in group.invokes}, id(group.admitted)
        stack = [node]
        while stack:
            each = stack[-1]
            if each in self._when:
                stack.pop()
                continue
            if each.target is g.read:
                trace = each.args[0].trace  # type: ignore[union-attr]
                here = trace in own or (request, trace) in self._traces
                self._when[each] = leaf_of(each).latest if here else ()
                continue
            before = [source for source in each.all_input_nodes if source not in self._when]
            stack += before
            if not before:
                self._when[each] = max((self._when[source] for source in each.all_input_nodes), default=())
        return self._when[node]


def _check_stays(admitted: Admitted, node: torch.fx.Node) -> None:
    """Refuse a gradient at a site whose tensor the model changes in place later.

    To differentiate, the model is given a tensor of its own there; and where it expects to find the change in other
    tensors that share its memory, its numbers would be others, only because a gradient was asked for.
    """
    if node.target is not g.read:
        return
    site = node.args[0]
    assert isinstance(site, g.Site)
    leaf = leaf_of(node)
    if (leaf.location._replace(occurrence=0), leaf.path) in admitted.models[site.trace].overwritten:
        raise at(
            node,
            OperationError(
                f"There is no gradient with respect to `{site}`: the model changes this tensor in place afterwards.",
                hint="Write a copy there (`x = site.clone()`, `site = x`), and take the gradient with respect to `x`.",
            ),
        )


def _needed(admitted: Admitted) -> set[torch.fx.Node]:
    """Every node that a saved value depends on, through the graph or through the model."""
    needed: set[torch.fx.Node] = set()

    def need(node: torch.fx.Node) -> None:
        stack = [node]
        while stack:
            each = stack.pop()
            if each in needed:
                continue
            needed.add(each)
            stack.extend(each.all_input_nodes)
            if each.target in (g.read, g.generated):
                trace = _trace_of(each)
                last_read[trace] = max(last_read[trace], _moment(admitted, each))

    last_read: dict[int, _Moment] = defaultdict(tuple)
    writes: dict[int, list[tuple[_Moment, torch.fx.Node]]] = defaultdict(list)
    idle = idle_writes(admitted)
    for node in admitted.graph.fx.nodes:
        if node.target in g.SINKS or (node.target is g.loop and _saves(admitted, node)):
            need(node)
        elif node.target in (g.write, g.assign) and node not in idle:
            writes[_trace_of(node)].append((_moment(admitted, node), node))
    for trace in sorted(writes, reverse=True):
        # A write matters if something may be read after it that matters; and its value may need what is read later yet.
        for moment, node in sorted(writes[trace], key=itemgetter(0)):
            if moment < last_read[trace]:
                need(node)
    return needed


def _saves(admitted: Admitted, node: torch.fx.Node) -> bool:
    """Whether a loop saves or logs something in its body."""
    loop = admitted.graph.traces[node.args[0]].loop  # type: ignore[index]
    assert loop is not None
    return any(each.target in (g.save, g.log) for each in loop.body.fx.nodes)


_Moment = tuple[Any, ...]
"""When something happens in a trace: the step, the place in the order of sites, and reads before writes."""


def _moment(admitted: Admitted, node: torch.fx.Node) -> _Moment:
    if node.target in (g.generated, g.assign):
        return (math.inf if node.target is g.generated else -math.inf,)
    site = node.args[0]
    assert isinstance(site, g.Site)
    leaf = leaf_of(node)
    # A read may happen late, and a write early, where that is not known beforehand.
    return (site.step, leaf.order, True) if node.target is g.write else (site.step, leaf.latest, False)


def _trace_of(node: torch.fx.Node) -> int:
    """The trace that a node belongs to."""
    place = node.args[0]
    return place.trace if isinstance(place, g.Site) else place  # type: ignore[return-value]


def _groups(
    whole: Group,
    differentiated: Collection[torch.fx.Node],
    behind: Callable[[], Mapping[torch.fx.Node, frozenset[int]]],
) -> list[Group]:
    """The invokes of a trace, in groups that share a pass each, in the order in which they run."""
    if len(whole.invokes) == 1:
        return [whole]
    may_share = whole.trace.generation is None and _may_share(whole, differentiated)
    if whole.trace.exact or not may_share:
        return [whole.of(part) for part in _ordered(whole, behind(), together=may_share)]
    if whole.differentiated or whole.model.fits(whole.size):
        return [whole]
    try:
        ordered = _ordered(whole, behind())
    except OrderError:  # they need values of each other, and have them in one pass
        return [whole]
    return [whole.of(part) for part in _fitting(whole, ordered)]


def _fitting(group: Group, ordered: Sequence[list[Invoke]]) -> list[list[Invoke]]:
    """Invokes, in their order, in parts that fit."""
    parts: list[list[Invoke]] = []
    size: Size | None = None
    for invokes in ordered:
        own = group.of(invokes).size
        size = own if size is None else size + own
        if not parts or not group.model.fits(size):
            parts.append([])
            size = own
        parts[-1] += invokes
    return parts


def halves(group: Group) -> list[Group]:
    """A group that did not fit, in two; as it is if it cannot be parted."""
    if group.past:  # what is remembered takes memory too
        return [group.of(group.invokes)]
    if len(group.invokes) == 1 or group.differentiated:
        return [group]
    traces = sorted({trace for trace, _ in group.invokes})
    try:
        behind = _invokes_behind(group.admitted, group.needed.nodes)
        ordered = [
            invokes
            for trace in traces
            for invokes in _ordered(group.of([each for each in group.invokes if each[0] == trace]), behind)
        ]
    except (OrderError, LimitError):
        return [group]
    if len(ordered) == 1:
        return [group]
    half = len(ordered) // 2
    return [group.of(list(chain(*part))) for part in (ordered[:half], ordered[half:])]


def _lengths(group: Group) -> set[int]:
    return {length for each in group.invokes for length in group.invoke(each).lengths}


def _cost(model: HostedModel, size: Size) -> float:
    """What a pass takes, in a unit of its own."""
    return model.seconds_like(size.rows, size.seq, bisect_right(model.catalogue.entries, size.end))


def _may_share(group: Group, differentiated: Collection[torch.fx.Node]) -> bool:
    """Whether its rows can share a pass with each other, and with others of their kind."""
    sites = [(node, leaf_of(node)) for node in group.nodes]
    # A gradient with respect to what all rows share would be that of all of them.
    replaced = [leaf for node, leaf in sites if node.target is g.write or node in differentiated]
    return (
        all(leaf.packs for _, leaf in sites)
        and all(_writes_alone(group.model, leaf) for leaf in replaced)
        and (group.model.pads or len(_lengths(group)) == 1)
    )


def _writes_alone(model: HostedModel, leaf: Leaf) -> bool:
    """Whether a write of one invoke's rows leaves other rows of the pass alone.

    It does not where all rows share one value, nor where the model later changes the tensor in place, and expects to
    find the change in other tensors that share its memory: after a write it goes on with a copy.
    """
    has_rows = any(dim.axis in (Axis.BATCH, Axis.BATCH_SEQ) for dim in leaf.shape)
    return has_rows and (leaf.location._replace(occurrence=0), leaf.path) not in model.overwritten


def _ordered(
    group: Group, behind: Mapping[torch.fx.Node, frozenset[int]], *, together: bool = True
) -> list[list[Invoke]]:
    """The invokes of a trace that run one after the other, those first whose values others write.

    Two that write values of each other, as the two runs of a knocked out SSM do, run `together`, if they may.

    Raises:
        OrderError: invokes that cannot share a pass need values of each other.
    """
    needs: dict[Invoke, dict[Invoke, torch.fx.Node]] = {invoke: {} for invoke in group.invokes}
    for trace, invoke in group.invokes:
        for node in group.accesses.get((trace, invoke), ()):
            if node.target is g.write and _trace(node) == trace:
                others = [(trace, each) for each in sorted(behind[node] - {invoke})]
                needs[trace, invoke] |= dict.fromkeys((each for each in others if each in needs), node)
    parts = _pairs(needs) if together else {each: [each] for each in needs}
    part_of = {invoke: first for first, invokes in parts.items() for invoke in invokes}
    sources: dict[Invoke, dict[Invoke, torch.fx.Node]] = {first: {} for first in parts}
    for user, needed in needs.items():
        mine = part_of[user]
        sources[mine] |= {part_of[source]: node for source, node in needed.items() if part_of[source] != mine}
    sorter, ordered = TopologicalSorter(sources), list[list[Invoke]]()
    try:
        sorter.prepare()
    except CycleError as error:
        cycle = error.args[1]
        lines = [g.line_of(sources[user][source]) for source, user in pairwise(cycle)]
        raise OrderError(
            "These invokes write values of each other and cannot share a pass.",
            hint="Save the values of one trace and write them in a second.",
            lines=sorted((line for line in lines if line is not None), key=lambda line: (line.file, line.line))[:2],
        ) from None
    ready = list(sorter.get_ready())
    heapq.heapify(ready)
    while ready:
        first = heapq.heappop(ready)
        ordered.append(parts[first])
        sorter.done(first)
        for each in sorter.get_ready():
            heapq.heappush(ready, each)
    return ordered


def _pairs(needs: Mapping[Invoke, Mapping[Invoke, Any]]) -> dict[Invoke, list[Invoke]]:
    """The invokes, by the first of those that each needs and that need it, or that these need in the same way."""
    parts: dict[Invoke, list[Invoke]] = {}
    seen: set[Invoke] = set()
    for first in sorted(needs):
        stack = [first]
        while stack:
            each = stack.pop()
            if each not in seen:
                seen.add(each)
                parts.setdefault(first, []).append(each)
                stack += [other for other in needs[each] if each in needs[other]]
    return {first: sorted(invokes) for first, invokes in parts.items()}


def _trace(node: torch.fx.Node) -> int | None:
    """The latest trace that a node's value depends on."""
    after = node.meta["after"]
    return None if after is None else int(after.order[0])


def _invokes_behind(admitted: Admitted, needed: Collection[torch.fx.Node]) -> dict[torch.fx.Node, frozenset[int]]:
    """The invokes of the latest trace that each node depends on whose sites it depends on.

    Earlier traces have run by the time that a value of a later one is written.
    """
    behind: dict[torch.fx.Node, frozenset[int]] = {}
    entries = 0
    for node in admitted.graph.fx.nodes:
        if node not in needed:
            continue
        if node.target in (g.read, g.generated):
            behind[node] = frozenset((node.args[0].invoke if node.target is g.read else node.args[1],))
            continue
        sets = {behind[each] for each in node.all_input_nodes if _trace(each) == _trace(node)}
        behind[node] = next(iter(sets)) if len(sets) == 1 else frozenset().union(*sets)
        entries += len(behind[node]) if len(sets) > 1 else 0
        if entries > _MAX_ENTRIES:
            raise at(
                node,
                LimitError(
                    "Too many invokes that cannot share a pass depend on each other.",
                    hint="Save the values of one trace and write them in a second.",
                ),
            )
    return behind
