"""Learning what is inside a forward: every call and every assignment, how often it runs, and what flows through it.

nnsight names the operations from the text of the forward, and hands over what goes in and out of each. The model runs
on the same prompts as when its modules were learnt (see learning.py), with the one forward instrumented that somebody
has asked for, and from that come symbolic shapes, the order, and whether rows may share a pass, as for modules.

How often an operation runs is learnt likewise. But that it ran once on a handful of tokens does not say that it always
will: what is in a loop by the text, and has run once, is not counted on.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from nnsight.intervention.source import Compiled, Instrument, bind, instrument
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from patchwire.errors import GraphError, LimitError, SiteError
from patchwire.sites import (
    INPUT,
    OUTPUT,
    SOURCE,
    Axis,
    Dim,
    Inside,
    Leaf,
    Location,
    Operation,
    Order,
    Path,
    Source,
    spell,
)
from patchwire.tensors import dtype_to_proto
from patchwire_worker import containers
from patchwire_worker.interleaving import OUTSIDE, available, base
from patchwire_worker.models.learning import LENGTH, Learner, dim_of, is_independent
from patchwire_worker.models.texts import transparent

_MAX_TEXT = 1 << 18
_MAX_OPERATIONS = 1 << 11
_UNKNOWN = Dim(Axis.UNKNOWN)
_NEVER = Dim(Axis.CONSTANT, 0)
_LOOPS = (ast.For, ast.AsyncFor, ast.While)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass
class _Visit:
    """An operation's side, one of the times that it was there."""

    order: Order
    tensors: dict[Path, Tensor]
    """The tensors there."""
    versions: dict[Path, int]
    """How often each had been changed in place."""
    values: dict[Path, Tensor | None]
    """What each held then, None for a weight, which always holds the same; empty if nobody will ask."""


@dataclass
class _Seen:
    """What one run showed of a function.

    Attributes:
        inside: The function.
        sides: Every side of every module, by nnsight's name of it.
        keeps: Whether to keep values.
        weights: The memory of the model's weights, which are too large to copy.
    """

    inside: Inside
    sides: Mapping[str, Location]
    keeps: bool
    weights: Collection[int]
    visits: dict[tuple[str, str], list[_Visit]] = field(default_factory=dict)
    """By operation and side, in order."""
    callees: dict[str, Any] = field(default_factory=dict)
    """What an operation called, the first time."""
    _known: set[str] = field(default_factory=set)
    _moment: list[int] = field(default_factory=list)

    def observe(self, provider: str, value: Any) -> None:
        """Note what is handed over."""
        if provider in self.sides:
            if provider not in self._known:
                self._known.add(provider)
                self._moment = [len(self._known) - 1, 0]
            else:  # a module that is called again
                self._moment = [self._moment[0], self._moment[1] + 1]
            return
        module, path = self.inside
        name, _, side = provider.removeprefix(f"{base(module)}.{SOURCE}.").rpartition(".")
        operations = name.split(f".{SOURCE}.")
        if side not in (INPUT, OUTPUT):
            if side == "fn" and len(operations) == len(path) + 1:
                self.callees.setdefault(operations[-1], value)
            return
        depth = len(operations)
        self._moment += [0] * (depth + 2 - len(self._moment))
        self._moment[depth + 1] += 1
        del self._moment[depth + 2 :]
        if depth != len(path) + 1:
            return
        found = dict(containers.tensors(value, side))
        values = {way: self._copy(tensor) for way, tensor in found.items()} if self.keeps else {}
        versions = {way: tensor._version for way, tensor in found.items()}
        visit = _Visit(tuple(self._moment), found, versions, values)
        self.visits.setdefault((operations[-1], side), []).append(visit)

    def _copy(self, tensor: Tensor) -> Tensor | None:
        return None if tensor.untyped_storage()._cdata in self.weights else tensor.clone()


@dataclass
class _Learnt:
    """What all runs showed of a function."""

    runs: list[_Seen] = field(default_factory=list)
    """The passes over prompts; the last is of one row alone."""
    steps: list[_Seen] = field(default_factory=list)
    """The steps of generations."""
    compiled: Compiled | None = None
    """Its instrumented text."""
    called: list[tuple[bool, bool]] = field(default_factory=list)
    """Of each run: whether it was of steps, and whether it came by."""
    overwritten: set[tuple[Location, Path]] = field(default_factory=set)
    """The tensors that the model changes in place after they were at a site."""


def learn(
    learner: Learner, insides: Sequence[Inside], repeated: bool
) -> tuple[dict[Inside, Source], set[tuple[Location, Path]]]:
    """What is inside functions, learnt together in the same runs.

    Args:
        learner: What the model is run with.
        insides: The functions: the forwards of modules that a forward pass calls, or functions that are called in
            there; none inside another.
        repeated: Whether the operation that calls them may run several times.

    Returns:
        The sources, and the tensors in them that the model changes in place after they were at a site.

    Raises:
        SiteError: the text of one is not to be had.
        LimitError: one is too long.
    """
    sources, overwritten = _look(learner, insides, repeated)
    both = [each for each in insides if not each[1] and learner.interleaver.switches(each[0])]
    if both:
        # Some operations run only where attention is computed step by step. That pass, which has them, orders all.
        stepwise, more = _look(learner, both, repeated, stepwise=True)
        for inside, source in stepwise.items():
            usual = sources[inside].operations
            merged = {name: _merged(each, source.operations[name]) for name, each in usual.items()}
            sources[inside] = replace(sources[inside], operations=merged)
        overwritten |= more
    return sources, overwritten


def _merged(operation: Operation, stepwise: Operation) -> Operation:
    """An operation in passes as they are usually, with its place among those of passes that go step by step."""
    if operation.runs == _NEVER:
        return stepwise
    places = {(leaf.side, leaf.path): leaf for leaf in stepwise.leaves}
    leaves = tuple(
        replace(leaf, order=places[leaf.side, leaf.path].order, last=places[leaf.side, leaf.path].last)
        if (leaf.side, leaf.path) in places
        else leaf
        for leaf in operation.leaves
    )
    return replace(operation, leaves=leaves)


def _look(
    learner: Learner, insides: Sequence[Inside], repeated: bool, *, stepwise: bool = False
) -> tuple[dict[Inside, Source], set[tuple[Location, Path]]]:
    """What is inside functions, as some runs show it."""
    learnt = {inside: _Learnt() for inside in insides}
    *prompts, alone = learner.prompts()
    weights = {each.untyped_storage()._cdata for each in learner.module.parameters()}
    # Values are compared between two runs; all others only show lengths.
    looks = [(ids, False, ids is prompts[-1] or ids is alone) for ids in (*prompts, alone)]
    looks += [(ids, True, False) for ids in prompts if learner.generates]
    for ids, in_steps, keeps in looks:
        seen = {inside: _Seen(inside, learner.sides, keeps, weights) for inside in insides}
        learner.interleaver.looked_into = [
            base(inside[0], (*inside[1], name))
            for inside, each in learnt.items()
            if each.compiled is not None
            for name in each.compiled.names
        ]
        try:
            (learner.look_in_steps if in_steps else learner.look)(
                ids, _dispatcher(learner, seen), insides, stepwise=stepwise
            )
        finally:
            learner.interleaver.looked_into = ()
        for inside, each in learnt.items():
            compiled = learner.interleaver.compiled(inside)
            each.called.append((in_steps, compiled is not None))
            each.compiled = compiled or each.compiled
            (each.steps if in_steps else each.runs).append(seen[inside])
            if not in_steps:
                each.overwritten |= _overwritten(inside, seen[inside])
    sources = {inside: _source(learner, inside, each, repeated) for inside, each in learnt.items()}
    return sources, set().union(*(each.overwritten for each in learnt.values()))


def _dispatcher(learner: Learner, seen: Mapping[Inside, _Seen]) -> Callable[[str, Any], None]:
    """Tells everybody of modules, and of operations those in whose module they are."""
    by_module = {base(module): each for (module, _), each in seen.items()}

    def observe(provider: str, value: Any) -> None:
        if provider in learner.sides:
            for each in seen.values():
                each.observe(provider, value)
            return
        end = provider.find(f".{SOURCE}.")
        while end > 0 and (found := by_module.get(provider[:end])) is None:
            end = provider.find(f".{SOURCE}.", end + 1)  # a module may be called "source" itself
        if end > 0 and found is not None:
            found.observe(provider, value)

    return observe


def _overwritten(inside: Inside, seen: _Seen) -> set[tuple[Location, Path]]:
    module, path = inside
    return {
        (Location(module, side, (*path, name)), way)
        for (name, side), visits in seen.visits.items()
        for visit in visits
        for way, tensor in visit.tensors.items()
        if tensor._version != visit.versions[way]
    }


def _source(learner: Learner, inside: Inside, learnt: _Learnt, repeated: bool) -> Source:
    module, path = inside
    runs, steps, compiled = learnt.runs, learnt.steps, learnt.compiled
    if compiled is None or len(set(learnt.called)) > len({in_steps for in_steps, _ in learnt.called}):
        raise SiteError(
            f"`{path[-1]}` was not called in each of the passes in which the model is learnt.", hint=OUTSIDE
        )
    function = compiled.code.co_name
    if not path:
        function = f"{type(learner.module.get_submodule(module)).__name__}.{function}"
    if len(compiled.source) > _MAX_TEXT or len(compiled.names) > _MAX_OPERATIONS:
        raise LimitError(f"`{function}` is too long to look into.", hint="Look into a module in it.")
    loops, statements = _positions(compiled.source, compiled.names)
    operations = {}
    window = _window(learner.module, getattr(learner.module.get_submodule(module), "layer_idx", None)) if steps else 0
    for name in compiled.names:
        in_loop, unused = repeated or name in loops, name in statements
        times = _times(name, runs[:-1], in_loop, runs[-1])
        leaves = _leaves(inside, name, times, runs[:-1], unused, runs[-1])
        operation = Operation(name, compiled.lines[name], times, leaves)
        if steps:
            times = _times(name, steps, in_loop)
            leaves = _leaves(inside, name, times, steps, unused, window=window)
            operation = replace(operation, runs_in_steps=times, leaves_in_steps=leaves)
        operations[name] = _with_callee(operation, learner.module, [each.callees for each in (*runs, *steps)])
    return Source(module, path, function, compiled.source, operations)


def _window(model: nn.Module, layer: int | None) -> int:
    """How many tokens the attention of a layer has in its cache at most; 0 if it has all.

    The prompts that a model is learnt from are shorter. That it is so is checked in each run, as every shape is.
    """
    layers = [] if layer is None else DynamicCache(config=getattr(model, "config", None)).layers
    mine = layers[layer] if layer is not None and layer < len(layers) else None
    return mine.sliding_window if isinstance(mine, DynamicSlidingWindowLayer) else 0


def _times(name: str, runs: Sequence[_Seen], in_loop: bool, alone: _Seen | None = None) -> Dim:
    """How often an operation runs; in steps of a generation, where none runs alone, in terms of the tokens before."""
    times = dim_of(tuple(len(each.visits.get((name, INPUT), ())) for each in runs))
    if alone is not None and times.length(1, LENGTH) != len(alone.visits.get((name, INPUT), ())):
        return _UNKNOWN
    return _UNKNOWN if times == Dim(Axis.CONSTANT, 1) and in_loop else times


def _leaves(
    inside: Inside,
    name: str,
    times: Dim,
    runs: Sequence[_Seen],
    unused: bool,
    alone: _Seen | None = None,
    window: int = 0,
) -> tuple[Leaf, ...]:
    module, path = inside
    leaves = []
    for side in (INPUT, OUTPUT):
        visits = [each.visits.get((name, side), []) for each in runs]
        if times == _NEVER or not all(visits):
            continue
        for way in visits[0][0].tensors:
            tensors = [[visit.tensors.get(way) for visit in each] for each in visits]
            shapes = [[tuple(tensor.shape) for tensor in each if tensor is not None] for each in tensors]
            dtypes = {None if tensor is None else tensor.dtype for each in tensors for tensor in each}
            dtype = dtypes.pop()
            if dtypes or dtype is None or not _travels(dtype):
                continue
            order, last = visits[0][0].order, visits[0][-1].order
            leaf = Leaf(
                module, side, way, _shape(shapes), dtype, order, last=() if last == order else last,
                operations=(*path, name), runs=times, unused=unused and side == OUTPUT, in_steps=alone is None,
            )  # fmt: skip
            if alone is None:  # an invoke has the steps of a generation for itself
                leaves.append(replace(leaf, shape=tuple(replace(dim, limit=window if dim.axis is Axis.SEQ else 0)
                                                        for dim in leaf.shape)))  # fmt: skip
                continue
            together, own = visits[-1], alone.visits.get((name, side), [])
            independent = leaf.packs and all(
                one.values[way] is None or is_independent(leaf, one.values[way], other.values.get(way))
                for one, other in zip(together, own, strict=False)
            )
            leaves.append(replace(leaf, independent=independent))
    return tuple(leaves)


def _travels(dtype: torch.dtype) -> bool:
    try:
        dtype_to_proto(dtype)
    except GraphError:
        return False
    return True


def _shape(shapes: Sequence[Sequence[tuple[int, ...]]]) -> tuple[Dim, ...]:
    """The symbolic shape of a tensor that had these in each run, one each time that the operation ran."""
    ranks = {len(shape) for each in shapes for shape in each}
    if len(ranks) > 1:
        return (_UNKNOWN,)
    dims = []
    for position in range(ranks.pop()):
        lengths = [{shape[position] for shape in each} for each in shapes]
        alike = all(len(each) == 1 for each in lengths)
        dims.append(dim_of(tuple(next(iter(each)) for each in lengths)) if alike else _UNKNOWN)
    return tuple(dims)


def _with_callee(operation: Operation, model: nn.Module, callees: Sequence[Mapping[str, Any]]) -> Operation:
    """The same operation, with what it calls."""
    found = [each[operation.name] for each in callees if operation.name in each]
    if not found:
        return replace(operation, closed="a forward pass does not come by this line")
    function = found[0]
    if function is bind:
        return replace(operation, closed="it is an assignment, which calls nothing")
    if isinstance(function, nn.Module):
        paths = [path for path, each in model.named_modules() if each is function]
        closed = (
            f"it calls the module `{spell(paths[0])}`: write `{spell(paths[0])}.{SOURCE}`"
            if paths
            else "it calls a module of its own"
        )
        return replace(operation, callee=type(function).__name__, closed=closed)
    callee = getattr(function, "__qualname__", type(function).__name__)
    try:
        with available(f"`{callee}`"):
            instrument(transparent(function), lambda *_: None)
    except SiteError as error:
        return replace(operation, callee=callee, closed=error.message.rstrip("."))
    return replace(operation, callee=callee)


class _Marked(Instrument):  # type: ignore[misc]
    """nnsight's way through a text, on which the operations at marked nodes are collected."""

    def __init__(self, *marks: Collection[int]) -> None:
        super().__init__()
        self.marks = marks
        self.found: tuple[set[str], ...] = tuple(set() for _ in marks)

    def wrap(self, name: str, fn: Any, args: Any, keywords: Any, node: ast.AST) -> Any:
        marked = [found for nodes, found in zip(self.marks, self.found, strict=True) if id(node) in nodes]
        call = super().wrap(name, fn, args, keywords, node)
        for found in marked:
            found.add(self.names[-1])
        return call


@lru_cache(256)
def _positions(source: str, names: tuple[str, ...]) -> tuple[set[str], ...]:
    """The operations in a loop, a comprehension, or a function inside the function; and calls that are statements."""
    tree = ast.parse(source)
    definition = tree.body[0]
    assert isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef))
    definition.decorator_list = []
    marks: set[int] = set()
    for node in ast.walk(definition):
        if isinstance(node, (*_LOOPS, *_COMPREHENSIONS, *_FUNCTIONS)) and node is not definition:
            once: list[ast.AST] = []
            if isinstance(node, (ast.For, ast.AsyncFor)):
                once = [node.iter, *node.orelse]
            elif isinstance(node, _COMPREHENSIONS):
                once = [node.generators[0].iter]
            marks |= _ids(node) - {id(node)}.union(*map(_ids, once))
    statements = {id(node.value) for node in ast.walk(definition) if isinstance(node, ast.Expr)}
    marked = _Marked(marks, statements)
    marked.visit(tree)
    assert tuple(marked.names) == names
    return marked.found


def _ids(node: ast.AST) -> set[int]:
    return {id(each) for each in ast.walk(node)}
