"""Placing: from the invokes that run together to a pass.

Each invoke gets its rows, padded on the right; what it reads and writes is put at the locations where it happens; rows
with the same tokens fork where they begin to differ; and logits are computed at the positions that somebody looks at.
The invokes may be of several requests: each is a group, and sees nothing of the others.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor

from patchwire import graph as g
from patchwire.checking import fake_of, leaf_of
from patchwire.sites import INPUT, OUTPUT, Axis, Dim, Leaf, Location, Order
from patchwire_worker.admission import Admitted
from patchwire_worker.columns import Part, columns_of, moved, parts_of, positions_of
from patchwire_worker.forking import Fork, Forks, Ids, forked, together
from patchwire_worker.models.costs import Size, are_few
from patchwire_worker.models.hosted import HostedModel
from patchwire_worker.positions import Positions, taken
from patchwire_worker.rows import LaterPositions, Rows, SomePositions

_LOGITS = ("logits",)
_CALL, _RESULT = Location("", INPUT), Location("", OUTPUT)
Invoke = tuple[int, int]
"""A trace, by its position in the graph's, and an invoke, by its position in the trace's."""
_Key = tuple[int, int, int]
"""A group, by its position in the pass's, and one of its invokes."""


@dataclass(frozen=True)
class Access:
    """A read or write of one tensor for the rows of one invoke."""

    node: torch.fx.Node
    leaf: Leaf
    rows: Rows
    group: int = 0
    """The group, as a position in the pass's groups."""
    parts: Mapping[torch.fx.Node, Part | None] | None = None
    """What the graph makes of a tensor of which some columns are computed: the parts that are the values of nodes, and,
    with None, the nodes whose value nobody looks at. None of any other tensor."""


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


class Needed:
    """The nodes of a request that have to be evaluated, and what they look at; each is found out once."""

    def __init__(self, nodes: Collection[torch.fx.Node]) -> None:
        self.nodes = nodes
        self._taken: dict[tuple[torch.fx.Node, int], Positions | None] = {}
        self._parts: dict[tuple[Any, ...], Mapping[torch.fx.Node, Part | None] | None] = {}

    def taken(self, read: torch.fx.Node, length: int) -> Positions | None:
        """The positions of a tensor of so many that anybody looks at; None if it may be any."""
        if (read, length) not in self._taken:
            self._taken[read, length] = taken(read, length, self.nodes)
        return self._taken[read, length]

    def parts(
        self, read: torch.fx.Node, rows: int, length: int, vocabulary: int, *, any_columns: bool = False
    ) -> Mapping[torch.fx.Node, Part | None] | None:
        """What is made of logits, if it is of few columns; see `columns.parts_of`."""
        key = read, rows, length, any_columns
        if key not in self._parts:
            self._parts[key] = parts_of(read, (rows, length, vocabulary), self.nodes, any_columns=any_columns)
        return self._parts[key]


@dataclass(frozen=True, eq=False)
class Group:
    """The invokes of one request that run in one pass."""

    admitted: Admitted
    """The request."""
    invokes: Sequence[Invoke]
    """Which."""
    accesses: Mapping[Invoke, Sequence[torch.fx.Node]]
    """What each reads, writes and generates, in order."""
    needed: Needed
    """The nodes of the request that have to be evaluated."""
    weights: Sequence[torch.fx.Node] = ()
    """The weights that the pass runs with instead of the model's own."""
    differentiated: bool = False
    """Whether there are gradients."""
    shares: bool = True
    """Whether rows of others may be in the pass."""
    past: int = 0
    """How many tokens of its rows, which are all the same until then, are not computed again."""

    @cached_property
    def trace(self) -> g.Trace:
        """The trace of its first invoke."""
        return self.admitted.graph.traces[self.invokes[0][0]]

    @cached_property
    def model(self) -> HostedModel:
        """The model."""
        return self.admitted.models[self.invokes[0][0]]

    @property
    def alike(self) -> bool:
        """Whether what is equal, or what nobody looks at, may be left out."""
        return not self.differentiated and self.trace.generation is None

    def invoke(self, invoke: Invoke) -> g.Invoke:
        """One of its invokes, as it is in the graph."""
        trace, number = invoke
        return self.admitted.graph.traces[trace].invokes[number]

    def rows(self, invoke: Invoke) -> Ids:
        """The token ids of the rows of one of its invokes, all of them."""
        return tuple(map(tuple, self.invoke(invoke).rows))

    @cached_property
    def count(self) -> int:
        """How many rows it has."""
        return sum(len(self.invoke(each).rows) for each in self.invokes)

    @cached_property
    def size(self) -> Size:
        """How large its pass is."""
        of_each = [self.invoke(each).lengths for each in self.invokes]
        lengths = list(chain(*of_each))
        reads = [node for node in self.nodes if node.target is g.read]
        logits = {node for node in reads if _is_logits(leaf_of(node))}
        held = sum(_bytes(node) for node in reads if node not in logits)
        rows = sum(_rows_of(node) for node in logits)
        ways = {(leaf.module, leaf.operations) for leaf in map(leaf_of, self.nodes)}
        stepwise = self.model.interleaver.goes_stepwise(ways)
        positions = None
        if self.looked_at is not None:
            positions = sum(
                len(self.looked_at_by(invoke)) * len(rows) for invoke, rows in zip(self.invokes, of_each, strict=True)
            )
        # Of rows that differ in length few columns are known to be looked at only together with their positions.
        whole = self.parts is None or (positions is None and any(map(_differ, of_each)))
        columns = None if self.parts is None or whole else _columns(self.parts)
        return Size(len(lengths), max(lengths), self.end, positions, held, rows, stepwise, columns)

    @cached_property
    def looked_at(self) -> Mapping[torch.fx.Node, Positions] | None:
        """The positions that each read of the logits is for; None if that is not known of all of them.

        Rows of different lengths are aligned at their end, and of those only positions that all of them have are known.
        A pass that is to be exact has all logits: of fewer a product may round otherwise.
        """
        reads = None if self.trace.exact else self._reads_of_logits(self.model.trimmed)
        if reads is None:
            return None
        found = {node: self.needed.taken(node, max(lengths)) for node, lengths in reads}
        for node, each in (self.parts or {}).items():
            if found.get(node, ()) is None:
                found[node] = frozenset(position for part in each.values() if part for position in positions_of(part))
        before = {node: max(lengths) - min(lengths) for node, lengths in reads}
        known = {
            node: positions
            for node, positions in found.items()
            if positions is not None and min(positions, default=before[node]) >= before[node]
        }
        return known if len(known) == len(found) else None

    def looked_at_by(self, invoke: Invoke) -> Positions:
        """The positions that one of its invokes looks at the logits of, as far as `looked_at` knows."""
        known = self.looked_at or {}
        return frozenset().union(*(known.get(node, ()) for node in self.accesses.get(invoke, ())))

    @cached_property
    def parts(self) -> Mapping[torch.fx.Node, Mapping[torch.fx.Node, Part | None]] | None:
        """What is made of each read of the logits, if it is of few columns; None if that is not so of all of them.

        A pass that is to be exact, or has other weights, multiplies with the whole head.
        """
        reads = self._reads_of_logits(self.model.narrowed) if self.shares else None
        if reads is None:
            return None
        vocabulary = self.model.vocabulary if reads else 0
        found = {node: self.needed.parts(node, len(each), max(each), vocabulary) for node, each in reads}
        known = {node: each for node, each in found.items() if each is not None}
        return known if len(known) == len(found) else None

    def _reads_of_logits(self, modules: Collection[str] | None) -> list[tuple[torch.fx.Node, list[int]]] | None:
        """The reads of the logits, and how many tokens each of their rows has; None if anything needs all of them.

        Args:
            modules: Those that see another thing when not all are computed; None if all always are.
        """
        if modules is None or not self.alike:
            return None
        found = []
        for invoke in self.invokes:
            lengths = self.invoke(invoke).lengths
            for node in self.accesses.get(invoke, ()):
                leaf = leaf_of(node)
                if not _is_logits(leaf):
                    if leaf.module in modules and leaf.location != _CALL:
                        return None
                    continue
                if node.target is not g.read:
                    return None
                found.append((node, lengths))
        return found

    def of(self, invokes: Sequence[Invoke], past: int = 0) -> Group:
        """The same for some of its invokes."""
        return replace(self, invokes=invokes, past=past)

    @cached_property
    def nodes(self) -> list[torch.fx.Node]:
        """What happens at the sites of its invokes."""
        return [node for each in self.invokes for node in self.accesses.get(each, ()) if node.target is not g.generated]

    @cached_property
    def end(self) -> Order:
        """After which it needs nothing of a pass any more."""
        return max((leaf_of(node).order for node in self.nodes), default=())


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass of the model, or one generation: a pass over the prompt and one for each new token."""

    groups: Sequence[Group]
    """Who runs in it."""
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
    positions: tuple[tuple[int, int], ...] | None = None
    """The positions whose logits are computed, as rows and positions in them; None for all."""
    columns: tuple[int, ...] | None = None
    """The entries of the vocabulary whose logits are computed; None for all."""
    generation: Generating | None = None
    """How it generates tokens, if it does."""
    weights: Sequence[torch.fx.Node] = ()
    """The weights that it runs with instead of the model's own."""
    past: tuple[int, ...] = ()
    """The tokens before those of `ids`, the same in all rows; what the model remembers of them is used."""
    unchanged: Mapping[tuple[int, ...], Mapping[int, int]] = field(default_factory=dict)
    """The tokens of rows in which nothing is changed that the model remembers, and where each is: of so many rows, this
    one."""

    @property
    def forks(self) -> list[tuple[Location, int]]:
        """Where rows fork, and how many there are from there on."""
        found, rows = [], self.ids.shape[0]
        for work in self.works:
            if work.fork is not None and work.fork.batch != rows:
                rows = work.fork.batch
                found.append((work.location, rows))
        return found


def placed(groups: Sequence[Group]) -> Pass:
    """The pass of one group, or of several that can share one."""
    first = groups[0]
    model, past = first.model, first.past
    keys = [(index, *invoke) for index, group in enumerate(groups) for invoke in group.invokes]
    rows = _rows(groups, keys, model)
    begin = rows.stages[0]
    # Which id stands for padding does not matter: nobody ever looks at it.
    ids = torch.zeros((begin.batch, rows.seq), dtype=torch.long)
    placed_at: set[int] = set()
    for key in keys:
        start = begin.starts[key]
        if start not in placed_at:  # others may share its rows
            placed_at.add(start)
            for row, tokens in enumerate(groups[key[0]].rows(key[1:]), start=start):
                ids[row, : len(tokens) - past] = torch.tensor(tokens[past:])
    works: dict[tuple[int, Location], Work] = {}
    results: list[torch.fx.Node] = []
    trimmed = _trimmed(groups, keys, rows)
    parts = {} if trimmed is None and any(map(_differ, rows.lengths.values())) else _parts(groups)
    columns = tuple(sorted(_columns(parts)))
    column_at = {each: place for place, each in enumerate(columns)}
    for key in keys:
        group = groups[key[0]]
        for node in group.accesses.get(key[1:], ()):
            if node.target is g.generated:
                results.append(node)
                continue
            site = node.args[0]
            assert isinstance(site, g.Site)
            leaf = leaf_of(node)
            work = works.setdefault((site.step, leaf.location), Work(leaf.location, site.step, leaf.order))
            owned = rows.of(key, leaf.order)
            if site.step:
                before = owned.lengths[0] + site.step - 1 if leaf.in_steps else 1
                owned = replace(owned, lengths=(before,) * len(owned.lengths), seq=before)
            taken, length = parts.get(node), owned.longest + past
            if trimmed is not None and _is_logits(leaf):
                first_at, position_at = trimmed.of[owned.start]
                own = {each: position_at[each] for each in group.looked_at[node]}
                whole, each_has = len(trimmed.positions), len(position_at)
                owned = SomePositions(owned.start, owned.lengths, whole, 1, first_at, each_has, own, length)
                if taken is None and len(own) > 1:
                    # What is taken of it, and not all positions with nothing in most of them.
                    shape = len(owned.lengths), length, model.vocabulary
                    taken = group.needed.parts(node, *shape, any_columns=True)
            else:
                position_at = {past + each: each for each in range(owned.longest)} if taken is not None else {}
                if past:
                    owned = LaterPositions(owned.start, owned.lengths, owned.batch, owned.seq, past)
            access = Access(node, leaf, owned, key[0])
            if taken is not None:
                access = _with_parts(access, taken, position_at, column_at if node in parts else None)
            (work.reads if node.target is g.read else work.writes).append(access)
    last = max(((step, work.order) for (step, _), work in works.items()), default=(0, ()))
    for place, fork in rows.at:
        if (0, place.order) <= last:
            works.setdefault((0, place.location), Work(place.location, 0, place.order)).fork = fork
    ordered = sorted(works.values(), key=lambda work: (work.step, work.order))
    batch, weights = rows.stages[-1].batch, first.weights
    if first.trace.generation is not None:
        generating = Generating(first.trace.generation, *first.invokes[0], results)
        return Pass(groups, model, ids, ordered, 0, batch, generation=generating, weights=weights)
    skipped = len(model.catalogue.entries) - bisect_right(model.catalogue.entries, ordered[-1].order) if ordered else 0
    some = None if trimmed is None else trimmed.positions, columns or None
    before = first.rows(first.invokes[0])[0][:past]
    # With other weights the model remembers something else.
    unchanged = {} if past or weights or len(groups) > 1 else _unchanged(first, keys, rows)
    return Pass(groups, model, ids, ordered, skipped, batch, *some, None, weights, before, unchanged)


def _unchanged(group: Group, keys: Sequence[_Key], rows: Forks) -> dict[tuple[int, ...], dict[int, int]]:
    """The tokens of rows in which nothing is changed that the model remembers, and where each is at every moment."""
    noted_at = group.model.noted_at
    if noted_at is None:
        return {}
    found: dict[tuple[int, ...], dict[int, int]] = {}
    for key in keys:
        tokens, *others = group.rows(key[1:])
        writes = (node for node in group.accesses.get(key[1:], ()) if node.target is g.write)
        if not others and all(leaf_of(node).order >= noted_at for node in writes):
            found[tokens] = {stage.batch: stage.starts[key] for stage in rows.stages}
    return found


def _differ(lengths: Collection[int]) -> bool:
    """Whether rows are of different lengths."""
    return len(set(lengths)) > 1


def _is_logits(leaf: Leaf) -> bool:
    return leaf.location == _RESULT and leaf.path == _LOGITS


def _bytes(read: torch.fx.Node) -> int:
    fake = fake_of(read)
    return fake.numel() * fake.element_size() if isinstance(fake, Tensor) else 0


def _rows_of(read: torch.fx.Node) -> int:
    fake = fake_of(read)
    return fake.shape[0] if isinstance(fake, Tensor) else 0


class _Trimmed(NamedTuple):
    """Where logits are computed, if not everywhere."""

    positions: tuple[tuple[int, int], ...]
    """As rows and positions in them; those of a row stand together."""
    of: Mapping[int, tuple[int, Mapping[int, int]]]
    """For the first row of each invoke: where those of its rows begin, and each of them in what a row has."""


def _trimmed(groups: Sequence[Group], keys: Sequence[_Key], rows: Forks) -> _Trimmed | None:
    """Where the logits of a pass are computed; None if everywhere, or if it is not known where they are looked at."""
    if any(group.looked_at is None for group in groups):
        return None
    last, past = rows.stages[-1], groups[0].past
    wanted: dict[int, set[int]] = {}
    lengths: dict[int, tuple[int, ...]] = {}
    for key in keys:  # some of them share rows
        wanted.setdefault(last.starts[key], set()).update(groups[key[0]].looked_at_by(key[1:]))
        lengths[last.starts[key]] = rows.lengths[key]
    found: list[tuple[int, int]] = []
    of: dict[int, tuple[int, Mapping[int, int]]] = {}
    for start, positions in wanted.items():
        of[start] = len(found), {position: place for place, position in enumerate(sorted(positions))}
        longest = max(lengths[start])
        for row, length in enumerate(lengths[start], start=start):
            found += [(row, position - past - (longest - length)) for position in of[start][1]]
    return _Trimmed(tuple(found), of) if are_few(len(found), last.batch * (rows.seq + past)) else None


def _parts(groups: Sequence[Group]) -> dict[torch.fx.Node, Mapping[torch.fx.Node, Part | None]]:
    """What is made of each read of the logits; empty if they are not of few columns together."""
    known: dict[torch.fx.Node, Mapping[torch.fx.Node, Part | None]] = {}
    for group in groups:
        if group.parts is None:
            return {}
        known |= group.parts
    return known if groups[0].model.costs.few_columns(_columns(known)) else {}


def _columns(parts: Mapping[torch.fx.Node, Mapping[torch.fx.Node, Part | None]]) -> frozenset[int]:
    found = (columns_of(part) for each in parts.values() for part in each.values() if part is not None)
    return frozenset(chain.from_iterable(found))


def _with_parts(
    access: Access,
    parts: Mapping[torch.fx.Node, Part | None],
    positions: Mapping[int, int],
    columns: Mapping[int, int] | None,
) -> Access:
    """The read of a tensor of which some positions or columns are computed, and parts of it where they are then."""
    leaf = access.leaf
    if columns is not None:
        *dims, _ = leaf.shape
        leaf = replace(leaf, shape=(*dims, Dim(Axis.CONSTANT, len(columns))))
    placed = {node: None if part is None else moved(part, positions, columns) for node, part in parts.items()}
    return replace(access, leaf=leaf, parts=placed)


def _rows(groups: Sequence[Group], keys: Sequence[_Key], model: HostedModel) -> Forks:
    """The rows of a pass: which invokes share them, and until when."""
    past = groups[0].past
    whole = {key: groups[key[0]].rows(key[1:]) for key in keys}
    ids = {key: tuple(row[past:] for row in rows) for key, rows in whole.items()} if past else whole
    entries = model.entries_after_past if past else model.entries
    longest = max(map(len, chain(*whole.values())))
    alike = all(group.alike for group in groups)
    if not alike or not entries or len(set(whole.values())) == len(whole) or longest > model.forked_tokens:
        return together(ids)
    changed: dict[_Key, Order] = {}
    leaves: list[Leaf] = []
    for key in keys:
        group = groups[key[0]]
        for node in group.accesses.get(key[1:], ()):
            leaf = leaf_of(node)
            leaves.append(leaf)
            if node.target is g.write:
                changed[key] = min(leaf.order, changed.get(key, leaf.order))
    found = forked(ids, changed, entries)
    # Of what comes at a moment that is not known exactly, it has to be known at least how many rows there are.
    return together(ids) if any(found.between(leaf.order, leaf.latest) for leaf in leaves) else found
