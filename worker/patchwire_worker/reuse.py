"""Reuse: what comes before the first token that an invoke changes or looks at is not computed again.

A causal model's values at a position depend on those before it only through what the model remembers of them: keys and
values of attention, or the state of an SSM. So an invoke whose interventions and reads are all at positions from `t` on
can go on from what the model remembers of the first `t` tokens, which one short pass finds out. Invokes of one prompt
are put into a few passes, each of which begins at some position, where that is less to compute.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch.fx

from patchwire import graph as g
from patchwire.checking import leaf_of
from patchwire_worker.models.hosted import HostedModel
from patchwire_worker.placing import Group, Invoke
from patchwire_worker.positions import edited, touched

_MOST_STARTS = 64
"""How many positions are considered to begin at."""


def parts_after_past(group: Group) -> list[Group]:
    """A group as one or several, each with as many tokens that are not computed again as is best.

    Those that begin at the first token come first: only their values are written into others.
    """
    model = group.model
    whole = len(group.invokes) == 1 or not group.shares or not group.alike or not model.entries_after_past
    if whole:
        return [group]
    needed_by, longest = _needed_by(group), min(model.forked_tokens, model.reused_tokens)
    candidates: dict[tuple[int, ...], dict[Invoke, tuple[int, float]]] = defaultdict(dict)
    for invoke in group.invokes:
        rows = group.rows(invoke)
        if len(rows) == 1 and 1 < len(rows[0]) <= longest and invoke not in needed_by:
            first = _first(group, invoke, len(rows[0]))
            if first:
                candidates[rows[0]][invoke] = first, _share(group, invoke)
    starts: dict[tuple[tuple[int, ...], int], list[Invoke]] = {}
    for row, firsts in candidates.items():
        for start, invokes in _divided(model, len(row), firsts).items():
            starts[row, start] = invokes
    later = {invoke for invokes in starts.values() for invoke in invokes}
    early = [invoke for invoke in group.invokes if invoke not in later]
    parts = [group.of(early)] if early else []
    return [*parts, *(group.of(invokes, past=start) for (_, start), invokes in starts.items())]


def _needed_by(group: Group) -> set[Invoke]:
    """The invokes whose values are written into others of the group."""
    own = set(group.invokes)
    reads: dict[torch.fx.Node, frozenset[Invoke]] = {}

    def behind(node: torch.fx.Node) -> frozenset[Invoke]:
        stack = [node]
        while stack:
            each = stack[-1]
            if each in reads:
                stack.pop()
            elif each.target is g.read:
                site = each.args[0]
                assert isinstance(site, g.Site)
                reads[each] = frozenset({(site.trace, site.invoke)} & own)
            else:
                before = [source for source in each.all_input_nodes if source not in reads]
                stack += before
                if not before:
                    sets = {reads[source] for source in each.all_input_nodes}
                    reads[each] = frozenset().union(*sets) if len(sets) != 1 else next(iter(sets))
        return reads[node]

    found: set[Invoke] = set()
    for node in group.nodes:
        if node.target is g.write:
            site, value = node.args
            assert isinstance(site, g.Site)
            assert isinstance(value, torch.fx.Node)
            found |= behind(value) - {(site.trace, site.invoke)}
    return found


def _first(group: Group, invoke: Invoke, length: int) -> int:
    """The first position that an invoke changes or looks at; 0 if that is not known."""
    first = length
    for node in group.accesses.get(invoke, ()):
        leaf = leaf_of(node) if node.target is not g.generated else None
        if leaf is None or (leaf.location, leaf.path) not in group.model.same_after_past:
            return 0
        if node.target is g.write:
            read = edited(node)
            if read is None or read.args[0] != node.args[0]:  # what is written comes from elsewhere
                return 0
            continue
        positions = touched(node, length, group.needed.nodes)
        if positions is None:
            return 0
        first = min(positions, default=first) if min(positions, default=first) < first else first
    return first if first < length else 0


def _share(group: Group, invoke: Invoke) -> float:
    """Which share of the layers is computed for an invoke alone: those from its first change on."""
    entries = [entry.order for entry in group.model.entries_after_past]
    changes = [leaf_of(node).order for node in group.accesses.get(invoke, ()) if node.target is g.write]
    return 1 - (bisect_right(entries, min(changes)) - 1) / len(entries) if changes else 0.0


def _divided(model: HostedModel, length: int, firsts: Mapping[Invoke, tuple[int, float]]) -> dict[int, list[Invoke]]:
    """Where invokes of one prompt begin, so that it is least to compute; those that begin at 0 are left out.

    What a pass costs is counted in tokens: those of its rows, and as many as take the time that a pass takes anyway.

    Args:
        model: The model.
        length: How many tokens the prompt has.
        firsts: For each invoke the position that it can begin at, and the share of the layers that it has for itself.
    """
    places = sorted({first for first, _ in firsts.values()})
    if len(places) > _MOST_STARTS:
        step = len(places) / _MOST_STARTS
        places = [places[int(index * step)] for index in range(_MOST_STARTS)]
    rows = [0.0] * (len(places) + 1)
    for first, share in firsts.values():
        rows[bisect_right(places, first)] += share
    remembering = 0 if model.noted_at else model.overhead_tokens + length
    chosen = _cheapest([0, *places], rows, length, model.overhead_tokens, remembering)
    found: dict[int, list[Invoke]] = defaultdict(list)
    for invoke, (first, _) in firsts.items():
        start = chosen[bisect_right(chosen, first) - 1]
        if start:
            found[start].append(invoke)
    return found


def _cheapest(places: Sequence[int], rows: Sequence[float], length: int, overhead: int, remembering: int) -> list[int]:
    """Where rows that may begin at some places best begin; they may begin at the first for nothing."""
    count = len(places)
    # cost[i]: of all rows from the i-th place on, if some of them begin there.
    cost, follower = [0.0] * (count + 1), [count] * count
    for i in reversed(range(count)):
        # Their pass has a row of what they share; what is remembered may be found out in a pass of its own, for all.
        begins = overhead + length - places[i] + remembering / count if places[i] else 0
        options, inside = [], 0.0
        for j in range(i + 1, count + 1):
            inside += rows[j - 1]
            options.append((begins + inside * (length - places[i]) + cost[j], j))
        cost[i], follower[i] = min(options)
    chosen, at = [], 0
    while at < count:
        chosen.append(places[at])
        at = follower[at]
    return chosen
