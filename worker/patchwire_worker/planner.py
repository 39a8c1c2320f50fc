"""Planning: from a graph to the passes that give what it asks for.

A trace becomes one pass, or part of one with others of its session: the rows of its invokes, padded on the right, and
for every location that matters the reads and writes there. What nobody needs is left out: a read whose value reaches no
saved value, a write after the last read that matters. The pass ends after the last location that is left. Invokes whose
rows cannot share a pass get passes of their own.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import chain, pairwise
from operator import itemgetter
from typing import Any

import torch
import torch.fx
from torch import Tensor

from patchwire import graph as g
from patchwire.errors import LimitError, OperationError, OrderError
from patchwire.sites import INPUT, Axis, Leaf, Location, Order
from patchwire_worker.admission import Admitted, at
from patchwire_worker.forking import Fork, Forks, Ids, forked, together
from patchwire_worker.models.hosted import HostedModel
from patchwire_worker.rows import Rows, SomePositions

_MAX_ENTRIES = 1 << 22
_LOGITS = ("logits",)
_PADDING = 1.25
"""How many tokens a pass of several traces may have for each that is of a prompt."""
_IN_VAIN = 0.1
"""Which share of the modules may be computed for rows that nobody needs any more, because others share their pass."""
_Invoke = tuple[int, int]
"""A trace, by its position in the graph's, and an invoke, by its position in the trace's."""


@dataclass(frozen=True)
class Access:
    """A read or write of one tensor for the rows of one invoke."""

    node: torch.fx.Node
    leaf: Leaf
    rows: Rows


@dataclass
class Work:
    """What happens at one location: rows fork, then everything is read, then everything is written."""

    location: Location
    step: int
    order: Order
    reads: list[Access] = field(default_factory=list)
    writes: list[Access] = field(default_factory=list)
    fork: Fork | None = None
    """What happens to the rows before that."""


@dataclass(frozen=True)
class Pass:
    """One forward pass of the model, or one generation: a pass over the prompt and one for each new token."""

    model: HostedModel
    """The model."""
    ids: Tensor
    """Token ids `[batch, seq]` of the rows that it begins with, short ones padded on the right."""
    works: list[Work]
    """What happens where, in the order of the passes; it ends after the last."""
    modules_skipped: int
    """How many modules come after that."""
    rows: int
    """How many rows it ends with."""
    positions: tuple[int, ...] | None = None
    """The positions whose logits are computed; None for all."""
    generation: Generating | None = None
    """How it generates tokens, if it does."""
    weights: Sequence[torch.fx.Node] = ()
    """The weights that it runs with instead of the model's own."""

    @property
    def forks(self) -> list[tuple[Location, int]]:
        """Before which modules rows become more, and how many there are from there on."""
        rows = [(work.location, work.fork.batch) for work in self.works if work.fork is not None]
        before = [self.ids.shape[0], *(batch for _, batch in rows)]
        return [each for each, earlier in zip(rows, before, strict=False) if each[1] != earlier]


@dataclass(frozen=True)
class Generating:
    """What a generation is for."""

    options: g.Generation
    """How tokens are generated."""
    trace: int
    """The trace, as a position in the graph's traces."""
    invoke: int
    """The invoke, as a position in the trace's invokes."""
    results: list[torch.fx.Node]
    """The nodes whose value are the ids that it ends with; if there are none, it ends after the last work."""


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


_Accesses = defaultdict[int, defaultdict[int, list[torch.fx.Node]]]
"""The needed reads and writes of each trace and each of its invokes, in order."""


def plan(admitted: Admitted) -> Plan:
    """The passes of a graph.

    Raises:
        OrderError: invokes that cannot share a pass need values of each other.
    """
    needed = _needed(admitted)
    accesses: _Accesses = defaultdict(lambda: defaultdict(list))
    weights: defaultdict[int, list[torch.fx.Node]] = defaultdict(list)
    loops: dict[int, torch.fx.Node] = {}
    for node in admitted.graph.fx.nodes:
        if node in needed and node.target in (g.read, g.write):
            accesses[node.args[0].trace][node.args[0].invoke].append(node)
        elif node in needed and node.target is g.generated:
            accesses[node.args[0]][node.args[1]].append(node)
        elif node in needed and node.target is g.assign:
            weights[node.args[0]].append(node)
        elif node in needed and node.target is g.loop:
            loops[node.args[0]] = node
    gradients = [node for node in needed if node.target is g.grad]
    differentiated = {value for node in gradients for value in node.args[1]}  # type: ignore[union-attr]
    for node in differentiated:
        _check_stays(admitted, node)  # type: ignore[arg-type]
    behind = cache(lambda: _invokes_behind(admitted, needed))
    packing = _Packing(admitted, accesses)
    passes: list[list[_Invoke] | Looping] = []
    for index, trace in enumerate(admitted.graph.traces):
        if trace.loop is not None:
            passes += [Looping(index, loops[index])] if index in loops else []
            packing.traces = []
            continue
        groups = _groups(admitted, index, trace, accesses[index], differentiated, behind)  # type: ignore[arg-type]
        alone = len(groups) > 1 or trace.exact or trace.generation is not None or index in weights or differentiated
        if not alone and packing.takes(index):
            made = passes[-1]
            assert isinstance(made, list)
            made += [(index, invoke) for invoke in groups[0]]
            continue
        passes += [[(index, invoke) for invoke in invokes] for invokes in groups]
        packing.traces = [] if alone else [index]
    planned = [
        each
        if isinstance(each, Looping)
        else _pass(admitted, each, accesses, weights, needed, alike=not differentiated)
        for each in passes
    ]
    return Plan([each for each in planned if _matters(each)], needed, differentiated)  # type: ignore[arg-type]


def _matters(each: Pass | Looping) -> bool:
    return isinstance(each, Looping) or bool(each.works or (each.generation and each.generation.results))


class _Packing:
    """Which traces, one after the other, become rows of one pass.

    A trace joins the pass of those before it if it needs nothing that this pass has too late, or what runs in between.
    """

    def __init__(self, admitted: Admitted, accesses: _Accesses) -> None:
        self._admitted = admitted
        self._accesses = accesses
        self._traces: list[int] = []
        self._when: dict[torch.fx.Node, Order] = {}

    @property
    def traces(self) -> Sequence[int]:
        """The traces of the pass that others may join; empty if there is none."""
        return self._traces

    @traces.setter
    def traces(self, traces: Sequence[int]) -> None:
        self._traces, self._when = list(traces), {}

    def takes(self, trace: int) -> bool:
        """Whether a trace joins the pass; it has joined then."""
        if not self._traces or not self._fits(trace):
            return False
        self._traces.append(trace)
        return all(self._in_time(node) for node in _nodes(self._accesses[trace]) if node.target is g.write)

    def _fits(self, trace: int) -> bool:
        """Whether its rows may be in the pass, do not make it large, and are not padded or computed much in vain."""
        everyone, models = [*self._traces, trace], self._admitted.models
        model = models[trace]
        if any(models[each] is not model for each in self._traces):
            return False
        invokes = [invoke for each in everyone for invoke in self._admitted.graph.traces[each].invokes]
        lengths = [length for invoke in invokes for length in invoke.lengths]
        padded = len(lengths) * max(lengths)
        if padded > model.packed_tokens or padded > _PADDING * sum(lengths):
            return False
        ends = [self._end(each) for each in everyone]
        if max(ends) - min(ends) > _IN_VAIN * len(model.catalogue.entries):
            return False
        nodes = [node for each in everyone for node in _nodes(self._accesses[each])]
        return _share(self._admitted, model, nodes, set(lengths), ())

    def _end(self, trace: int) -> int:
        """How many modules are entered until a trace needs nothing more."""
        leaves = [self._admitted.leaves[node.args[0]].order for node in _nodes(self._accesses[trace])]  # type: ignore[index]
        return bisect_right(self._admitted.models[trace].catalogue.entries, max(leaves, default=()))

    def _in_time(self, write: torch.fx.Node) -> bool:
        """Whether what is written exists by then."""
        return self._latest(write.args[1]) <= self._admitted.leaves[write.args[0]].order  # type: ignore[arg-type, index]

    def _latest(self, node: torch.fx.Node) -> Order:
        """When the last value of this pass that a node depends on exists; empty if it depends on none."""
        stack = [node]
        while stack:
            each = stack[-1]
            if each in self._when:
                stack.pop()
                continue
            if each.target is g.read:
                site = each.args[0]
                assert isinstance(site, g.Site)
                self._when[each] = self._admitted.leaves[site].latest if site.trace in self._traces else ()
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
    leaf = admitted.leaves[site]
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
    for node in admitted.graph.fx.nodes:
        if node.target in g.SINKS or (node.target is g.loop and _saves(admitted, node)):
            need(node)
        elif node.target in (g.write, g.assign):
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
    leaf = admitted.leaves[site]
    # A read may happen late, and a write early, where that is not known beforehand.
    return (site.step, leaf.order, True) if node.target is g.write else (site.step, leaf.latest, False)


def _trace_of(node: torch.fx.Node) -> int:
    """The trace that a node belongs to."""
    place = node.args[0]
    return place.trace if isinstance(place, g.Site) else place  # type: ignore[return-value]


def _groups(
    admitted: Admitted,
    index: int,
    trace: g.Trace,
    accesses: Mapping[int, Sequence[torch.fx.Node]],
    differentiated: Collection[torch.fx.Node],
    behind: Callable[[], Mapping[torch.fx.Node, frozenset[int]]],
) -> list[list[int]]:
    """The invokes of a trace, in groups that share a pass."""
    everyone = list(range(len(trace.invokes)))
    if trace.generation is not None or trace.exact:
        return [[invoke] for invoke in _ordered(index, everyone, accesses, behind())]
    lengths = {length for invoke in trace.invokes for length in invoke.lengths}
    if len(everyone) == 1 or _share(admitted, admitted.models[index], _nodes(accesses), lengths, differentiated):
        return [everyone]
    return [[invoke] for invoke in _ordered(index, everyone, accesses, behind())]


def _nodes(accesses: Mapping[int, Sequence[torch.fx.Node]]) -> list[torch.fx.Node]:
    """What happens at the sites of a trace."""
    return [node for nodes in accesses.values() for node in nodes]


def _share(
    admitted: Admitted,
    model: HostedModel,
    nodes: Sequence[torch.fx.Node],
    lengths: Collection[int],
    differentiated: Collection[torch.fx.Node],
) -> bool:
    """Whether rows of these lengths can share a pass in which this is read and written."""
    sites = [(node, admitted.leaves[node.args[0]]) for node in nodes]  # type: ignore[index]
    # A gradient with respect to what all rows share would be that of all of them.
    replaced = [leaf for node, leaf in sites if node.target is g.write or node in differentiated]
    return (
        all(leaf.packs for _, leaf in sites)
        and all(_writes_alone(model, leaf) for leaf in replaced)
        and (model.pads or len(lengths) == 1)
    )


def _writes_alone(model: HostedModel, leaf: Leaf) -> bool:
    """Whether a write of one invoke's rows leaves other rows of the pass alone.

    It does not where all rows share one value, nor where the model later changes the tensor in place, and expects to
    find the change in other tensors that share its memory: after a write it goes on with a copy.
    """
    has_rows = any(dim.axis in (Axis.BATCH, Axis.BATCH_SEQ) for dim in leaf.shape)
    return has_rows and (leaf.location._replace(occurrence=0), leaf.path) not in model.overwritten


def _ordered(
    trace: int,
    invokes: list[int],
    accesses: Mapping[int, Sequence[torch.fx.Node]],
    behind: Mapping[torch.fx.Node, frozenset[int]],
) -> list[int]:
    """Invokes that run one after the other, those first whose values others write."""
    sources: dict[int, dict[int, torch.fx.Node]] = {invoke: {} for invoke in invokes}
    for invoke, nodes in accesses.items():
        for node in nodes:
            if node.target is g.write and _trace(node) == trace:
                sources[invoke] |= dict.fromkeys(sorted(behind[node] - {invoke}), node)
    try:
        return list(TopologicalSorter(sources).static_order())
    except CycleError as error:
        cycle = error.args[1]
        lines = [g.line_of(sources[user][source]) for source, user in pairwise(cycle)]
        raise OrderError(
            "These invokes write values of each other and cannot share a pass.",
            hint="Save the values of one trace and write them in a second.",
            lines=sorted((line for line in lines if line is not None), key=lambda line: (line.file, line.line))[:2],
        ) from None


def _trace(node: torch.fx.Node) -> int | None:
    """The latest trace that a node's value depends on."""
    after = node.meta["after"]
    return None if after is None else int(after.order[0])


def _invokes_behind(admitted: Admitted, needed: set[torch.fx.Node]) -> dict[torch.fx.Node, frozenset[int]]:
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


def _pass(
    admitted: Admitted,
    invokes: Sequence[_Invoke],
    accesses: _Accesses,
    weights: Mapping[int, Sequence[torch.fx.Node]],
    needed: Collection[torch.fx.Node],
    *,
    alike: bool,
) -> Pass:
    index = invokes[0][0]
    trace, model = admitted.graph.traces[index], admitted.models[index]
    rows = _rows(admitted, invokes, accesses, forks=alike and trace.generation is None)
    first = rows.stages[0]
    # Which id stands for padding does not matter: nobody ever looks at it.
    ids = torch.zeros((first.batch, rows.seq), dtype=torch.long)
    for each in invokes:
        for row, tokens in enumerate(_rows_of(admitted, each), start=first.starts[each]):
            ids[row, : len(tokens)] = torch.tensor(tokens)
    works: dict[tuple[int, Location], Work] = {}
    results: list[torch.fx.Node] = []
    looked_at = _looked_at(admitted, invokes, accesses, needed) if alike and trace.generation is None else {}
    positions = tuple(sorted(set().union(*looked_at.values())))
    for each in invokes:
        for node in accesses[each[0]].get(each[1], ()):
            if node.target is g.generated:
                results.append(node)
                continue
            site = node.args[0]
            assert isinstance(site, g.Site)
            leaf = admitted.leaves[site]
            work = works.setdefault((site.step, leaf.location), Work(leaf.location, site.step, leaf.order))
            owned = rows.of(each, leaf.order)
            if site.step:
                before = owned.lengths[0] + site.step - 1 if leaf.in_steps else 1
                owned = replace(owned, lengths=(before,) * len(owned.lengths), seq=before)
            if node in looked_at:
                places = tuple((position, positions.index(position)) for position in sorted(looked_at[node]))
                owned = SomePositions(owned.start, owned.lengths, owned.batch, len(positions), places)
            access = Access(node, leaf, owned)
            (work.reads if node.target is g.read else work.writes).append(access)
    last = max(((step, work.order) for (step, _), work in works.items()), default=(0, ()))
    for place, fork in rows.at:
        if (0, place.order) <= last:
            works.setdefault((0, place.location), Work(place.location, 0, place.order)).fork = fork
    ordered = sorted(works.values(), key=lambda work: (work.step, work.order))
    batch, changed = rows.stages[-1].batch, weights.get(index, ())
    if trace.generation is not None:
        generating = Generating(trace.generation, *invokes[0], results)
        return Pass(model, ids, ordered, 0, batch, generation=generating, weights=changed)
    skipped = _skipped(model, ordered[-1].order) if ordered else 0
    return Pass(model, ids, ordered, skipped, batch, positions or None, weights=changed)


def _looked_at(
    admitted: Admitted, invokes: Sequence[_Invoke], accesses: _Accesses, needed: Collection[torch.fx.Node]
) -> dict[torch.fx.Node, set[int]]:
    """The positions that each read of the logits is for; none if that is not known of all of them, or it is most."""
    model = admitted.models[invokes[0][0]]
    head = model.catalogue.raw("lm_head")
    found: dict[torch.fx.Node, set[int]] = {}
    longest = 0
    for each in invokes:
        lengths = {len(row) for row in _rows_of(admitted, each)}
        longest = max(longest, *lengths)
        for node in accesses[each[0]].get(each[1], ()):
            leaf = admitted.leaves[node.args[0]] if node.target is not g.generated else None  # type: ignore[index]
            if leaf is None or leaf.module not in ("", head) or (leaf.module == "" and leaf.side == INPUT):
                continue
            if node.target is not g.read or leaf.path != _LOGITS or len(lengths) > 1 or not model.trims:
                return {}
            indices = [_positions(user, node, longest=min(lengths)) for user in node.users if user in needed]
            if None in indices:
                return {}
            found[node] = set().union(*(each for each in indices if each is not None))
    return found if len(set().union(*found.values())) * 2 <= longest else {}


def _positions(user: torch.fx.Node, node: torch.fx.Node, *, longest: int) -> set[int] | None:
    """Which positions of a tensor `[batch, seq, …]` one of its users takes; None if it may be any."""
    if user.target is not operator.getitem or user.args[0] is not node:
        return None
    match user.args[1]:
        case (int() | slice(), int(position), *rest) if node not in rest:
            return {position % longest}
        case (int() | slice(), slice(start=start, stop=stop, step=step), *rest) if node not in rest:
            if all(each is None or isinstance(each, int) for each in (start, stop, step)):
                return set(range(longest)[start:stop:step])
    return None


def _rows_of(admitted: Admitted, invoke: _Invoke) -> Ids:
    return tuple(map(tuple, admitted.graph.traces[invoke[0]].invokes[invoke[1]].rows))


def _rows(admitted: Admitted, invokes: Sequence[_Invoke], accesses: _Accesses, *, forks: bool) -> Forks:
    """The rows of a pass: which invokes share them, and until when."""
    model = admitted.models[invokes[0][0]]
    ids = {each: _rows_of(admitted, each) for each in invokes}
    if not forks or len(set(ids.values())) == len(ids) or max(map(len, chain(*ids.values()))) > model.forked_tokens:
        return together(ids)
    nodes = [(each, node) for each in invokes for node in accesses[each[0]].get(each[1], ())]
    leaves = [(each, node, admitted.leaves[node.args[0]]) for each, node in nodes]  # type: ignore[index]
    changed: dict[_Invoke, Order] = {}
    for invoke, node, leaf in leaves:
        if node.target is g.write:
            changed[invoke] = min(leaf.order, changed.get(invoke, leaf.order))
    found = forked(ids, changed, model.entries)
    # Of what comes at a moment that is not known exactly, it has to be known at least how many rows there are.
    return together(ids) if any(found.between(leaf.order, leaf.latest) for _, _, leaf in leaves) else found


def _skipped(model: HostedModel, last: Order) -> int:
    """How many modules are entered only after a position in the order of sites."""
    entries = model.catalogue.entries
    return len(entries) - bisect_right(entries, last)
