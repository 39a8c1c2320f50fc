"""Learning what flows through a model: every site's shape in terms of the call, and the order of sites.

The model runs three times on a handful of tokens, with other numbers of rows and tokens. A length that is the same in
all is constant; one that follows the rows or the tokens is named after them. One more run, of a single short row alone,
tells which values are the same for that row among others and padded, as they must be before rows may share a pass.
Tensors that the model changes in place after they were at a site are noted too: rows that share a pass with a write
there could miss it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from patchwire.errors import GraphError, first_line
from patchwire.graph import Generation
from patchwire.sites import INPUT, OUTPUT, Axis, Catalogue, Dim, Inside, Leaf, Location, Module, Parameter, Path
from patchwire.tensors import dtype_to_proto
from patchwire_worker import containers
from patchwire_worker.forking import Entry, entries, forked
from patchwire_worker.generating import generate
from patchwire_worker.interleaving import PassInterleaver, SiteMediator, Stopping, provider
from patchwire_worker.models.detecting import completed
from patchwire_worker.models.families import Family
from patchwire_worker.models.naming import names
from patchwire_worker.models.remembered import Noting, Past, argument, remember, same_noted
from patchwire_worker.models.texts import choosing_attention
from patchwire_worker.rows import Rows

log = logging.getLogger(__name__)

# Rows and tokens of each run. Small, so that it costs nothing; three, and not on one line, so that a length that grows
# with the rows (one for each row and attention head, say) cannot be taken for one that grows with the tokens.
SHAPES = ((2, 7), (5, 8), (3, 11))
# The row of the last of these runs that also runs alone, and how many of its tokens.
_ROW, LENGTH = 1, 5
POSITIONS = max(seq for _, seq in SHAPES) + 1
"""How many tokens a model has to take: the longest run, and one that is generated after it and read."""
_PAST = 4
"""How many tokens are remembered where it is learnt what comes after them."""
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_ROUNDINGS = 16
_ROUGH_TOLERANCE = 5e-2
_MASKED = 1e4  # beyond it are the large numbers of attention masks, which say nothing of a value's scale


@dataclass
class _Seen:
    """What one run showed.

    Attributes:
        sides: Every side of every module, by nnsight's name of it.
    """

    sides: Mapping[str, Location]
    order: dict[Location, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    leaves: dict[tuple[Location, Path], tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    versions: dict[tuple[Location, Path], tuple[Tensor, int]] = field(default_factory=dict)
    values: dict[tuple[Location, Path], Tensor] = field(default_factory=dict)

    def observe(self, provider: str, value: Any) -> None:
        location = self.sides.get(provider)
        if location is None:
            return
        if location.side == OUTPUT:
            self.calls[location.module] = self.calls.get(location.module, 0) + 1
        if location in self.order:
            return
        self.order[location] = len(self.order)
        if location[1] == OUTPUT and isinstance(value, tuple):
            self.items[location[0]] = len(value)
        for path, tensor in containers.tensors(value, location[1]):
            self.leaves[location, path] = (tuple(tensor.shape), tensor.dtype)
            self.versions[location, path] = (tensor, tensor._version)
            self.values[location, path] = tensor.clone()

    def side(self, module: str, side: str) -> list[tuple[Path, Tensor]]:
        """The tensors of a side of a module."""
        return [(path, value) for (place, path), value in self.values.items() if place == Location(module, side)]

    def overwritten(self) -> set[tuple[Location, Path]]:
        """The tensors that were changed in place after they had been seen; forgets all of them."""
        found = {place for place, (tensor, version) in self.versions.items() if tensor._version != version}
        self.versions.clear()
        return found


@dataclass(frozen=True)
class AfterPast:
    """What a pass over later tokens only is like; nothing is known of a model that does not remember as it should."""

    entries: Sequence[Entry] = ()
    """Where rows can fork."""
    same: frozenset[tuple[Location, Path]] = frozenset()
    """The tensors that are what they are in a pass over all tokens."""
    looking_back: frozenset[tuple[Location, Path]] = frozenset()
    """Those of them that at any position depend on the tokens until then alone."""
    notes: bool = False
    """Whether a pass over all tokens can note what the model remembers of the first."""


class Learner:
    """Runs a model on a few tokens and tells what it saw."""

    def __init__(
        self,
        module: nn.Module,
        interleaver: PassInterleaver,
        options: dict[str, Any],
        device: torch.device,
        vocabulary: int,
    ) -> None:
        self.module = module
        self.interleaver = interleaver
        self.options = options
        self.device = device
        self.vocabulary = vocabulary
        self.overwritten: set[tuple[Location, Path]] = set()
        """The tensors that the model changes in place after they were at a site."""
        places = [Location(path, side) for path, _ in module.named_modules() for side in (INPUT, OUTPUT)]
        self.sides: dict[str, Location] = {provider(place): place for place in places}
        """Every side of every module, by nnsight's name of it."""

    def catalogue(self, name: str, family: Family | None, *, detected: bool = False) -> Catalogue:
        """Every module of the model, with the tensors that it takes and returns, and all canonical names.

        Args:
            name: What clients call the model.
            family: Where its parts are; None if that is not known.
            detected: Whether the family was only guessed from the model's structure.
        """
        *runs, alone = map(self._run, self.prompts())
        first: dict[int, str] = {}
        for path, tensor in self.module.named_parameters(remove_duplicate=False):
            first.setdefault(id(tensor), path)
        modules = {
            path: Module(
                path,
                type(module).__name__,
                _parameters(path, module, first),
                tuple(_leaves(path, runs, alone)),
                _calls(path, runs),
                alone.items.get(path, 0),
            )
            for path, module in self.module.named_modules()
        }
        if family is not None and detected:
            family = completed(family, self.module, runs[-1].side)
        self.interleaver.steps_are_exact = self._steps_are_exact(runs[-1])
        named = names(self.module, modules, family, exact=self.interleaver.steps_are_exact, detected=detected)
        return Catalogue(name, modules, named.names, named.missing)

    def _run(self, ids: Tensor, *, stepwise: bool = False) -> _Seen:
        seen = _Seen(self.sides)
        self.look(ids, seen.observe, stepwise=stepwise)
        self.overwritten |= seen.overwritten()
        return seen

    def _steps_are_exact(self, usual: _Seen) -> bool:
        """Whether attention gives the same when it is computed step by step, up to rounding.

        It is asked of the first attention of a pass, which has the same input in both: later ones would see what
        rounding has become by then, such as another choice of experts.
        """
        places = [Location(path, OUTPUT) for path in choosing_attention(self.module)]
        called = [each for each in places if each in usual.order]
        if not called:
            return True
        first = min(called, key=lambda place: usual.order[place])
        stepwise = self._run(self.prompts()[len(SHAPES) - 1], stepwise=True)
        other = dict(stepwise.side(first.module, OUTPUT))
        return all(
            is_same(value, other[path])
            for path, value in usual.side(first.module, OUTPUT)
            if path in other and other[path].shape == value.shape
        )

    def entries(self, catalogue: Catalogue) -> list[Entry]:
        """Where rows can fork: nowhere, if those that have forked are not what they are in a pass of their own.

        It is tried with four invokes of the same two rows: one that forks after the first layer, one before the second,
        one before the last norm, one that goes on; and again with attention computed step by step, if that is not what
        the model does anyway: then layers are given masks that they do without otherwise. Where what layers return
        cannot fork, what they are given may.
        """
        places = entries(catalogue)
        given = [place for place in places if place.location.side == INPUT]
        return self._entries(catalogue, places) or self._entries(catalogue, given)

    def _entries(self, catalogue: Catalogue, places: list[Entry]) -> list[Entry]:
        if not places:
            return []
        switches = self.interleaver.steps_are_exact and bool(choosing_attention(self.module))
        try:
            if switches:
                *runs, alone = (self._run(ids, stepwise=True) for ids in self.prompts())
                more = [_leaves(place.location.module, runs, alone) for place in places]
                places = [place.also(each) for place, each in zip(places, more, strict=True)]
            same = self._forks(places) and (not switches or self._forks(places, stepwise=True))
        except Exception as error:  # a model fails in whatever way it likes
            log.info("%s: rows do not fork at %d places (%s)", catalogue.model, len(places), first_line(error))
            return []
        if not same:
            log.info("%s: rows do not fork at %d places: numbers would be others", catalogue.model, len(places))
        return places if same else []

    def after_past(self, catalogue: Catalogue, usual: Sequence[Entry]) -> AfterPast:
        """What a pass over later tokens only is like.

        Rows that begin with the same tokens are compared with rows that go on from what is remembered of these.

        Args:
            catalogue: The model's modules.
            usual: Where rows fork in other passes.
        """
        if not usual or argument(self.module) is None:
            return AfterPast()
        before = self._ids(1, _PAST)
        whole = [torch.cat([before.expand(ids.shape[0], -1), ids], dim=1) for ids in self.prompts()[: len(SHAPES)]]
        try:
            past = remember(self.module, before, self.options)
            runs = [self._run_after(ids[:, _PAST:], past) for ids in whole]
            expected = self._run(whole[-1])
            others = self._ids(2, _PAST)[1:].expand(whole[-1].shape[0], -1)
            different = self._run(torch.cat([others, whole[-1][:, _PAST:]], dim=1))
            ends_otherwise = self._run(torch.cat([whole[-1][:, :_PAST], whole[-1][:, _PAST:].flip(1)], dim=1))
            places = []
            for place in usual:
                given = _leaves(place.location.module, runs, runs[-1])
                places.append(
                    replace(place, leaves={leaf.path: leaf for leaf in given if leaf.side == place.location.side})
                )
            if not self._forks(places, past=past):
                raise ValueError("rows would have other numbers")
        except Exception as error:  # a model fails in whatever way it likes
            log.info("%s: the first tokens are computed each time (%s)", catalogue.model, first_line(error))
            return AfterPast()
        same = frozenset(_same_later(expected, different, runs[-1]))
        looking_back = frozenset(each for each in same if _looks_back(each, expected, ends_otherwise))
        return AfterPast(places, same, looking_back, self._notes(whole[-1], past, expected))

    def _notes(self, ids: Tensor, past: Past, expected: _Seen) -> bool:
        """Whether a pass can note what it remembers, and is what it would be without.

        Args:
            ids: Rows that begin with the same tokens.
            past: What the model remembers of these.
            expected: What there is in a pass that notes nothing.
        """
        tokens, count = tuple(ids[0, : past.length].tolist()), ids.shape[0]
        noting, seen = Noting(getattr(self.module, "config", None), {tokens: {count: count - 1}}), _Seen(self.sides)
        if past.first(1) is None or past.argument != noting.argument:
            return False
        self.look(ids, seen.observe, more={noting.argument: noting})
        noted = noting.noted().get(tokens)
        return (
            noted is not None
            and same_noted(past, noted, is_same)
            and seen.values.keys() == expected.values.keys()
            and all(is_same(value, expected.values[each]) for each, value in seen.values.items())
        )

    def _run_after(self, ids: Tensor, past: Past) -> _Seen:
        past.rows = ids.shape[0]
        seen = _Seen(self.sides)
        self.look(ids, seen.observe, more={past.argument: past}, mediators=past.mediators())
        return seen

    def trimmed(
        self, some: Callable[[Sequence[tuple[int, int]]], Sequence[SiteMediator]], head: str
    ) -> frozenset[str] | None:
        """The modules that see another thing when the logits of some positions alone are computed.

        Args:
            some: What has to happen in a pass, so that it computes those alone.
            head: The module that computes them, by its path.

        Returns:
            None if they are not those that there are among all.
        """
        ids = self.prompts()[len(SHAPES) - 1]
        rows, seq = ids.shape
        kept = [(0, 1), (0, seq - 1), *((row, (2 * row) % seq) for row in range(1, rows)), (rows - 1, 0)]
        place = (Location("", OUTPUT), ("logits",))
        try:
            whole, part = self._run(ids), _Seen(self.sides)
            self.look(ids, part.observe, mediators=some(kept))
            wanted = torch.stack([whole.values[place][at] for at in kept])[:, None]
            found = part.values[place]
            if wanted.shape != found.shape or not is_same(found, wanted):
                return None
        except Exception as error:  # a model fails in whatever way it likes
            log.info("%s computes all logits (%s)", type(self.module).__name__, first_line(error))
            return None
        others = {each for each, (shape, _) in whole.leaves.items() if part.leaves.get(each, (shape, _))[0] != shape}
        return frozenset({head, *(location.module for location, _ in others)})

    def narrowed(self, some: Callable[[Sequence[int]], Sequence[SiteMediator]], head: str) -> frozenset[str] | None:
        """The modules that see another thing when logits of some entries of the vocabulary alone are computed.

        Args:
            some: What has to happen in a pass, so that it computes those alone.
            head: The module that computes them, by its path.

        Returns:
            None if they are not those that there are among all, or if the model does something else to some entries
            than to their neighbours: then what it does to a few would depend on which they are.
        """
        ids, columns = self.prompts()[-1], [0, self.vocabulary // 2, self.vocabulary - 1]
        place = (Location("", OUTPUT), ("logits",))
        try:
            whole, part = self._run(ids), _Seen(self.sides)
            self.look(ids, part.observe, mediators=some(columns))
            logits, found = whole.values[place], part.values[place]
            wanted = logits[..., columns]
            if logits.shape[2:] != (self.vocabulary,) or wanted.shape != found.shape or not is_same(found, wanted):
                return None
            moved = _Seen(self.sides)
            self.look(ids, moved.observe, mediators=[SiteMediator(Location(head, OUTPUT), _moved_on)])
            if not is_same(moved.values[place], _moved_on(logits)):
                return None
        except Exception as error:  # a model fails in whatever way it likes
            log.info("%s computes logits of the whole vocabulary (%s)", type(self.module).__name__, first_line(error))
            return None
        seen = {each: part.values.get(each) for each in whole.values}
        others = {
            each
            for each, value in whole.values.items()
            if (other := seen[each]) is None or other.shape != value.shape or not is_same(other, value)
        }
        return frozenset(location.module for location, _ in others)

    def _forks(self, places: Sequence[Entry], *, stepwise: bool = False, past: Past | None = None) -> bool:
        ids, found = self.prompts()[len(SHAPES) - 1][:2], list[Any]()
        more = {} if past is None else {past.argument: past}
        rows = tuple(map(tuple, ids.tolist()))
        when = {0: places[min(1, len(places) - 1)].order, 1: places[-1].order, 2: places[min(2, len(places) - 1)].order}
        forks = forked(dict.fromkeys(range(4), rows), when, places)

        def look(value: Any) -> Any:
            found.append(value)
            return value

        def call() -> Any:
            if past is not None:
                past.rows = ids.shape[0]
            return self.module(input_ids=ids, **self.options, **more)

        mediators = [SiteMediator(place.location, partial(fork, past=past)) for place, fork in forks.at]
        mediators.append(SiteMediator(Location("", OUTPUT), look))
        mediators += [] if past is None else past.mediators()
        with torch.no_grad():
            apart = [] if past is None else past.mediators()
            usual = self.interleaver.run(call, {0: apart}, Stopping(), stepwise=stepwise)
            expected = dict(containers.tensors(usual, OUTPUT))
            self.interleaver.run(call, {0: mediators}, Stopping(), stepwise=stepwise)
        together = dict(containers.tensors(found[0], OUTPUT))
        return all(is_same(together[path], torch.cat([value] * 4)) for path, value in expected.items())

    def prompts(self) -> list[Tensor]:
        """The token ids of each run; those of the last are part of one row of the one before."""
        prompts = [self._ids(*shape) for shape in SHAPES]
        return [*prompts, prompts[-1][_ROW : _ROW + 1, :LENGTH]]

    def look(
        self,
        ids: Tensor,
        observe: Callable[[str, Any], None],
        opened: Collection[Inside] = (),
        *,
        stepwise: bool = False,
        more: Mapping[str, Any] = MappingProxyType({}),
        mediators: Sequence[SiteMediator] = (),
    ) -> None:
        """Run the model, and tell of everything that is handed over, inside some functions too.

        Args:
            ids: The token ids.
            observe: Told of each value.
            opened: Which functions.
            stepwise: Whether attention is computed step by step whatever the configuration says.
            more: What else the model is called with.
            mediators: Who else waits somewhere.
        """
        self.interleaver.observe = observe
        try:
            with torch.no_grad():
                self.interleaver.run(
                    lambda: self.module(input_ids=ids, **self.options, **more),
                    {0: mediators},
                    Stopping(),
                    opened,
                    stepwise,
                )
        finally:
            self.interleaver.observe = None

    @cached_property
    def generates(self) -> bool:
        """Whether the model can generate tokens."""
        return getattr(self.module, "generation_config", None) is not None and hasattr(self.module, "generate")

    def look_in_steps(
        self,
        ids: Tensor,
        observe: Callable[[str, Any], None],
        opened: Collection[Inside] = (),
        *,
        stepwise: bool = False,
    ) -> None:
        """Generate two tokens, and tell of everything that is handed over in the pass for the second.

        That pass is over one token for each row; those before are in the model's cache.
        """

        def in_the_step(provider: str, value: Any) -> None:
            if self.interleaver.calls == 2:
                observe(provider, value)

        self.interleaver.observe = in_the_step
        options = Generation(max_new_tokens=2, min_new_tokens=2)
        try:
            with torch.no_grad():
                made = lambda: generate(self.module, ids, options, lambda _: None, {})  # noqa: E731
                self.interleaver.run(made, {}, Stopping(), opened, stepwise)
        finally:
            self.interleaver.observe = None

    def _ids(self, batch: int, seq: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self.vocabulary, (batch, seq), generator=generator).to(self.device)


def pads(catalogue: Catalogue) -> bool:
    """Whether padding on the right leaves a row's own numbers alone, as in every causal model: its result says so."""
    results = catalogue.modules[""].side(OUTPUT)
    named = [leaf for leaf in results if leaf.path == ("logits",)]
    return all(leaf.packs for leaf in named or results[:1])


def _calls(path: str, runs: Sequence[_Seen]) -> int:
    """How often a forward pass calls a module; more than once if that depends on the input."""
    counts = {each.calls.get(path, 0) for each in runs}
    return counts.pop() if len(counts) == 1 else max(2, *counts)


def _parameters(path: str, module: nn.Module, first: Mapping[int, str]) -> tuple[Parameter, ...]:
    """The parameters and buffers of a module; `first` says where each parameter is for the first time."""
    found = []
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        try:
            dtype_to_proto(tensor.dtype)
        except GraphError:  # a quantized weight: it stays on the worker
            continue
        own = f"{path}.{name}" if path else name
        tied = first.get(id(tensor), own)
        found.append(Parameter(name, tuple(tensor.shape), tensor.dtype, "" if tied == own else tied))
    return tuple(found)


def _leaves(path: str, runs: Sequence[_Seen], alone: _Seen) -> list[Leaf]:
    leaves = []
    first, *others = runs
    for side in (INPUT, OUTPUT):
        location = Location(path, side)
        for place, (shape, dtype) in first.leaves.items():
            seen = [each.leaves.get(place) for each in others]
            if place[0] != location or any(each is None or each[1] != dtype for each in seen):
                continue
            try:
                dtype_to_proto(dtype)
            except GraphError:
                continue
            shapes = [shape, *(each[0] for each in seen if each is not None)]
            alike = len({len(each) for each in shapes}) == 1
            dims = tuple(map(dim_of, zip(*shapes, strict=True))) if alike else (Dim(Axis.UNKNOWN),)
            leaf = Leaf(path, side, place[1], dims, dtype, (first.order[location],))
            independent = leaf.packs and is_independent(leaf, runs[-1].values.get(place), alone.values.get(place))
            leaves.append(replace(leaf, independent=independent))
    return leaves


def is_independent(leaf: Leaf, together: Tensor | None, alone: Tensor | None) -> bool:
    """Whether a short row has the same value among other rows, padded, and alone."""
    if together is None or alone is None:
        return False
    batch, seq = SHAPES[-1]
    if tuple(together.shape) != leaf.lengths(batch, seq) or tuple(alone.shape) != leaf.lengths(1, LENGTH):
        return False
    return is_same(Rows(_ROW, (LENGTH,), batch, seq).take(together, leaf), alone)


def _same_later(whole: _Seen, different: _Seen, later: _Seen) -> Iterator[tuple[Location, Path]]:
    """The tensors `[batch, seq, …]` of which a run over later tokens has the later part.

    What the tokens before change in it must be there: a run after different ones says how much that is.
    """
    batch, seq = SHAPES[-1]
    for place, value in later.values.items():
        other, third = whole.values.get(place), different.values.get(place)
        if other is None or third is None or other.shape != third.shape or value.shape[:2] != (batch, seq):
            continue
        if other.shape != (batch, _PAST + seq, *value.shape[2:]) or not is_same(value, other[:, _PAST:]):
            continue
        if value.is_floating_point():
            error = (value - other[:, _PAST:]).double().abs().max()
            influence = (third[:, _PAST:] - other[:, _PAST:]).double().abs().max()
            noise = _ROUNDINGS * torch.finfo(value.dtype).eps * other.double().abs().max()
            if error > influence / 10 + noise:
                continue
        yield place


def _looks_back(place: tuple[Location, Path], whole: _Seen, ends_otherwise: _Seen) -> bool:
    """Whether a tensor `[batch, seq, …]` is the same at the first positions, whatever tokens come later.

    A layer that looks ahead may go on from its keys and values all the same: the first ones depend on one token each.
    """
    value, other = whole.values[place], ends_otherwise.values.get(place)
    if other is None or other.shape != value.shape or not is_same(value[:, :_PAST], other[:, :_PAST]):
        return False
    if not value.is_floating_point():
        return True
    error = (value - other)[:, :_PAST].double().abs().max()
    influence = (value - other)[:, _PAST:].double().abs().max()
    noise = _ROUNDINGS * torch.finfo(value.dtype).eps * value.double().abs().max()
    return bool(error <= influence / 10 + noise)


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same, up to rounding."""
    if not other.is_floating_point() and not other.is_complex():
        return torch.equal(one, other)
    tolerance = _TOLERANCE.get(other.dtype, _ROUGH_TOLERANCE)
    wide = torch.complex128 if other.is_complex() else torch.float64
    one, other = one.to(wide), other.to(wide)
    finite = other[other.abs() < _MASKED]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    return torch.allclose(one, other, rtol=0, atol=tolerance * max(scale, 1e-6), equal_nan=True)


def _moved_on(logits: Tensor) -> Tensor:
    """Each logit in the place of the next entry of the vocabulary, the last in that of the first."""
    return logits.roll(1, -1)


def dim_of(lengths: tuple[int, ...]) -> Dim:
    """What a dimension is that had these lengths in the runs."""
    if len(set(lengths)) == 1:
        return Dim(Axis.CONSTANT, lengths[0])
    followed = {
        Axis.BATCH: [batch for batch, _ in SHAPES],
        Axis.SEQ: [seq for _, seq in SHAPES],
        Axis.BATCH_SEQ: [batch * seq for batch, seq in SHAPES],
    }
    for axis, values in followed.items():
        rest = {length - value for length, value in zip(lengths, values, strict=True)}
        if len(rest) == 1:
            return Dim(axis, rest.pop())
    return Dim(Axis.UNKNOWN)
