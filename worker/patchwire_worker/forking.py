"""Forks: rows with equal input run once, until their interventions differ.

Invokes of a pass that have the same token ids share rows. Before the layer in which one of them is changed for the
first time, or at its end if it is the output that is changed, its rows become its own: everything with rows that is
handed over there is copied for them, and so is, at every later layer, what was made before and still has fewer rows
(masks, rotations). What is read before is read from the rows that are shared. So a sweep over all layers computes half
of what its rows would cost, and an unchanged run costs one row however often it is asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patchwire.errors import ExecutionError
from patchwire.sites import INPUT, OUTPUT, Axis, Catalogue, Leaf, Location, Order, Path
from patchwire_worker import containers
from patchwire_worker.models.remembered import Past
from patchwire_worker.rows import Rows

Ids = tuple[tuple[int, ...], ...]
"""The token ids of an invoke's rows."""
Key = Any
"""What an invoke is called: something hashable."""


@dataclass(frozen=True)
class Entry:
    """A side of a module at which rows can fork, and what is handed over there."""

    location: Location
    order: Order
    leaves: Mapping[Path, Leaf] = field(compare=False)

    def also(self, leaves: Iterable[Leaf]) -> Entry:
        """The same, with more that is handed over in some passes.

        Raises:
            ValueError: what is handed over has another shape in these.
        """
        more = {leaf.path: leaf for leaf in leaves if leaf.side == self.location.side}
        if any(self.leaves[path].shape != leaf.shape for path, leaf in more.items() if path in self.leaves):
            raise ValueError(f"what {self.location.module} is given has other shapes in other passes")
        return replace(self, leaves={**more, **self.leaves})


def entries(catalogue: Catalogue) -> list[Entry]:
    """Where rows can fork, in order: before and after every layer, and before the last norm."""
    sides = [(f"layers.{index}", side) for index in range(catalogue.num_layers) for side in (INPUT, OUTPUT)]
    found = []
    for name, side in [*sides, ("norm", INPUT)]:
        module = catalogue.modules[catalogue.names[name].module] if name in catalogue.names else None
        leaves = module.side(side) if module is not None else []
        if module is None or not leaves or module.calls != 1:
            continue
        found.append(Entry(Location(module.path, side), leaves[0].order, {leaf.path: leaf for leaf in leaves}))
    return sorted(found, key=lambda entry: entry.order)


@dataclass(frozen=True)
class Stage:
    """Which rows there are, from one fork to the next."""

    since: Order
    """From when on; empty from the beginning."""
    batch: int
    """How many rows."""
    starts: Mapping[Key, int]
    """The first row of each invoke."""


@dataclass(frozen=True)
class Fork:
    """What happens to the rows where something is handed over."""

    side: str
    """Which side of a module that is."""
    leaves: Mapping[Path, Leaf]
    """What is handed over."""
    batch: int
    """How many rows there are from now on."""
    sources: Callable[[int], Tensor | None]
    """For a number of rows that something may still have: which of them each row is a copy of; None for any other."""
    seq: int
    """How many tokens a row has."""

    def __call__(self, value: Any, past: Past | None = None) -> Any:
        """What is handed over, for the rows of now.

        Args:
            value: What is handed over.
            past: What is remembered of the tokens before; it is told how many rows there are.

        Raises:
            ExecutionError: something of it was not there when the model was learnt.
        """
        if past is not None:
            past.rows = self.batch
        for path, tensor in list(containers.tensors(value, self.side)):
            leaf = self.leaves.get(path)
            copied = None if leaf is None else self._copied(tensor, leaf)
            if copied is None:
                raise ExecutionError(
                    "With this prompt the model hands something to its layers that it does not with others.",
                    hint="Have every prompt run alone: `exact=True`.",
                )
            value = containers.replaced(value, self.side, path, copied)
        return value

    def _copied(self, tensor: Tensor, leaf: Leaf) -> Tensor | None:
        """Its rows of now; None if it has another number of rows than anything should."""
        for dim, each in enumerate(leaf.shape):
            flat = each.axis is Axis.BATCH_SEQ
            if flat or each.axis is Axis.BATCH:
                rows = tensor.unflatten(dim, (-1, self.seq)) if flat else tensor  # type: ignore[no-untyped-call]
                if rows.shape[dim] != self.batch:
                    source = self.sources(rows.shape[dim])
                    if source is None:
                        return None
                    rows = rows.index_select(dim, source.to(tensor.device))
                return rows.flatten(dim, dim + 1) if flat else rows
        return tensor


@dataclass
class Forks:
    """The rows of one pass at every moment of it."""

    stages: Sequence[Stage]
    """The first begins with the pass."""
    seq: int
    lengths: Mapping[Key, tuple[int, ...]]
    """How many tokens each row of an invoke has."""
    at: Sequence[tuple[Entry, Fork]] = ()
    """What happens where, in order."""

    def __post_init__(self) -> None:
        self._since = [stage.since for stage in self.stages]

    def of(self, invoke: Key, order: Order) -> Rows:
        """An invoke's rows at a moment."""
        stage = self.stages[bisect_right(self._since, order) - 1]
        return Rows(stage.starts[invoke], self.lengths[invoke], stage.batch, self.seq)

    def between(self, earliest: Order, latest: Order) -> bool:
        """Whether rows fork between two moments."""
        return bisect_right(self._since, earliest) != bisect_right(self._since, latest)


def together(ids: Mapping[Key, Ids]) -> Forks:
    """All rows apart from the beginning."""
    return _forks(ids, {}, [])


def forked(ids: Mapping[Key, Ids], changed: Mapping[Key, Order], places: Sequence[Entry]) -> Forks:
    """Rows that are shared for as long as they can be.

    Args:
        ids: The token ids of each invoke.
        changed: When each invoke is changed for the first time; those that never are, are not here.
        places: Where rows can fork.
    """
    orders = [each.order for each in places]
    alone = {invoke: bisect_right(orders, order) - 1 for invoke, order in changed.items()}
    shared: dict[Ids, int] = {}
    for rows in ids.values():
        shared[rows] = shared.get(rows, 0) + 1
    never = len(places)
    depth = {invoke: alone.get(invoke, never) if shared[rows] > 1 else never for invoke, rows in ids.items()}
    return _forks(ids, depth, places)


def _forks(ids: Mapping[Key, Ids], depth: Mapping[Key, int], places: Sequence[Entry]) -> Forks:
    lengths = {invoke: tuple(map(len, rows)) for invoke, rows in ids.items()}
    seq = max(max(each) for each in lengths.values())
    groups = _groups(ids, list(ids), depth, -1)
    starts, batch = _placed(groups, lengths)
    stages, at = [Stage((), batch, starts)], list[tuple[Entry, Fork]]()
    sources = _Sources()
    depths = set(depth.values())
    for index, place in enumerate(places):
        apart = False
        if index in depths:  # else nobody's rows become its own here
            split = [[group] if len(group) == 1 else _groups(ids, group, depth, index) for group in groups]
            apart = any(len(each) > 1 for each in split)
        if apart:
            before = stages[-1]
            groups = [each[0] for each in split] + [group for each in split for group in each[1:]]
            starts, batch = _placed(groups, lengths)
            copied = [before.starts[group[0]] + row for group in groups for row in range(len(lengths[group[0]]))]
            sources.add(before.batch, copied)
            stages.append(Stage(place.order, batch, starts))
        if sources.forks and (apart or place.location.side == INPUT):  # what a layer returns has all rows already
            at.append((place, Fork(place.location.side, place.leaves, batch, partial(sources.of, sources.forks), seq)))
    return Forks(stages, seq, lengths, at)


class _Sources:
    """Which rows of before the rows of some moment are copies of; found out for those that are asked for."""

    def __init__(self) -> None:
        self._copied: list[Tensor] = []
        self._since: dict[int, int] = {}
        self._known: dict[tuple[int, int], Tensor] = {}

    @property
    def forks(self) -> int:
        """How often rows have forked until now."""
        return len(self._copied)

    def add(self, before: int, copied: Sequence[int]) -> None:
        """Rows fork: there were so many, and each is now a copy of one of them."""
        self._since[before] = len(self._copied)
        self._copied.append(torch.tensor(copied))

    def of(self, forks: int, rows: int) -> Tensor | None:
        """After some forks: of which of so many rows each row is a copy; None if there never were so many before."""
        first = self._since.get(rows, forks)
        if first >= forks:
            return None
        if (first, forks) not in self._known:
            # From the last that is known on: what is asked at one layer is asked again at the next.
            start = next((at for at in range(forks - 1, first, -1) if (first, at) in self._known), first + 1)
            found = self._known.get((first, start), self._copied[first])
            for each in self._copied[start:forks]:
                found = found[each]
            self._known[first, forks] = found
        return self._known[first, forks]


def _groups(ids: Mapping[Key, Ids], invokes: Sequence[Key], depth: Mapping[Key, int], now: int) -> list[list[Key]]:
    """The invokes that share rows from now on, in groups; those that still share come first."""
    sharing: dict[Any, list[Key]] = {}
    for invoke in sorted(invokes, key=lambda each: depth.get(each, -1) <= now):
        apart = depth.get(invoke, -1) <= now
        sharing.setdefault((ids[invoke], invoke) if apart else ids[invoke], []).append(invoke)
    return list(sharing.values())


def _placed(groups: Sequence[Sequence[Key]], lengths: Mapping[Key, tuple[int, ...]]) -> tuple[dict[Key, int], int]:
    """The first row of each invoke, and how many rows there are."""
    starts, start = dict[Key, int](), 0
    for group in groups:
        starts |= dict.fromkeys(group, start)
        start += len(lengths[group[0]])
    return starts, start
