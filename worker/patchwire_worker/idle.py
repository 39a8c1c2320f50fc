"""Idle writes: those that put there what is there already.

The usual sweep copies each token's state of one prompt into another prompt. Where both begin with the same tokens they
have the same states, because a causal model's values at a position depend on the tokens until then alone: such a copy
changes nothing, and its run is the one without it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import torch.fx

from patchwire import graph as g
from patchwire.checking import leaf_of
from patchwire_worker.admission import Admitted
from patchwire_worker.positions import copied

_Invoke = tuple[int, int]


def idle_writes(admitted: Admitted) -> set[torch.fx.Node]:
    """The writes of a request that change nothing."""
    nodes = admitted.graph.fx.nodes
    if any(node.target is g.grad for node in nodes):  # what a value depends on matters too
        return set()
    writes: dict[_Invoke, list[torch.fx.Node]] = defaultdict(list)
    changed = {node.args[0] for node in nodes if node.target is g.assign}  # traces with other weights
    for node in nodes:
        if node.target is g.write:
            site = node.args[0]
            writes[site.trace, site.invoke].append(node)
    found: set[torch.fx.Node] = set()
    for (trace, _), those in writes.items():
        if not _plain(admitted, trace, changed):
            continue
        for node in sorted(those, key=lambda each: leaf_of(each).order):
            source = _source(admitted, node)
            if source is None or source in writes or not _plain(admitted, source[0], changed):
                break  # and what comes later may meet what this one has changed
            found.add(node)
    return found


def _plain(admitted: Admitted, trace: int, changed: Collection[Any]) -> bool:
    """Whether a trace is one forward pass of the model as it is."""
    its = admitted.graph.traces[trace]
    return its.loop is None and its.generation is None and not its.exact and trace not in changed


def _source(admitted: Admitted, write: torch.fx.Node) -> _Invoke | None:
    """The invoke whose values a write copies into another, where both have the same; None if it is not known to."""
    site = write.args[0]
    assert isinstance(site, g.Site)
    leaf = leaf_of(write)
    if site.step or (leaf.location, leaf.path) not in admitted.models[site.trace].looking_back:
        return None
    rows = admitted.graph.traces[site.trace].invokes[site.invoke].rows
    found = copied(write, len(rows[0]))
    if found is None:
        return None
    read, positions = found
    origin = read.args[0]
    assert isinstance(origin, g.Site)
    other = leaf_of(read)
    same = (other.location, other.path) == (leaf.location, leaf.path) and not origin.step
    if not same or admitted.models[origin.trace] is not admitted.models[site.trace]:
        return None
    others = admitted.graph.traces[origin.trace].invokes[origin.invoke].rows
    return (origin.trace, origin.invoke) if _begin_alike(rows, others, max(positions, default=-1) + 1) else None


def _begin_alike(rows: Sequence[Sequence[int]], others: Sequence[Sequence[int]], length: int) -> bool:
    """Whether rows, all as long as each other, have the same first tokens, one by one or all as the only other."""
    if len({len(row) for row in (*rows, *others)}) != 1 or len(others) not in (1, len(rows)):
        return False
    pairs = zip(rows, others if len(others) == len(rows) else [others[0]] * len(rows), strict=True)
    return all(tuple(one[:length]) == tuple(other[:length]) for one, other in pairs)
