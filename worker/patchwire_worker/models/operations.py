"""Learning what is inside a forward: every call and every assignment, how often it runs, and what flows through it.

nnsight names the operations from the text of the forward, and hands over what goes in and out of each. The model runs
on the same prompts as when its modules were learnt (see learning.py), with the one forward instrumented that somebody
has asked for, and from that come symbolic shapes, the order, and whether rows may share a pass, as for modules.

How often an operation runs is learnt likewise. But that it ran once on a handful of tokens does not say that it always
will: what is in a loop by the text, and has run once, is not counted on.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from nnsight.intervention.source import Compiled, Instrument, bind, instrument
from torch import Tensor, nn

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
from patchwire_worker.interleaving import available, base
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


def learn(learner: Learner, inside: Inside, repeated: bool) -> tuple[Source, set[tuple[Location, Path]]]:
    """What is inside a function.

    Args:
        learner: What the model is run with.
        inside: The function: the forward of a module that a forward pass calls, or one that is called in there.
        repeated: Whether the operation that calls it may run several times.

    Returns:
        The source, and the tensors in it that the model changes in place after they were at a site.

    Raises:
        SiteError: its text is not to be had.
        LimitError: it is too long.
    """
    module, path = inside
    compiled, operations, overwritten = _look(learner, inside, repeated)
    if not path and learner.interleaver.switches(module):
        # Some run only where attention is computed step by step. All of them are ordered by that pass, which has more.
        _, stepwise, more = _look(learner, inside, repeated, stepwise=True)
        operations = {name: _merged(each, stepwise[name]) for name, each in operations.items()}
        overwritten |= more
    function = compiled.code.co_name
    if not path:
        function = f"{type(learner.module.get_submodule(module)).__name__}.{function}"
    return Source(module, path, function, compiled.source, operations), overwritten


def _look(
    learner: Learner, inside: Inside, repeated: bool, *, stepwise: bool = False
) -> tuple[Compiled, dict[str, Operation], set[tuple[Location, Path]]]:
    """The operations of a function, and which tensors are changed in place, as some runs show them."""
    module, path = inside
    *prompts, alone = learner.prompts()
    runs: list[_Seen] = []
    steps: list[_Seen] = []
    overwritten: set[tuple[Location, Path]] = set()
    compiled: Compiled | None = None
    weights = {each.untyped_storage()._cdata for each in learner.module.parameters()}
    # Values are compared between two runs; all others only show lengths.
    looks = [(ids, False, ids is prompts[-1] or ids is alone) for ids in (*prompts, alone)]
    looks += [(ids, True, False) for ids in prompts if learner.generates]
    for ids, in_steps, keeps in looks:
        seen = _Seen(inside, learner.sides, keeps, weights)
        if compiled is not None:
            learner.interleaver.looked_into = [base(module, (*path, name)) for name in compiled.names]
        try:
            (learner.look_in_steps if in_steps else learner.look)(ids, seen.observe, [inside], stepwise=stepwise)
        finally:
            learner.interleaver.looked_into = ()
        compiled = learner.interleaver.compiled(inside) or compiled
        for (name, side), visits in () if in_steps else seen.visits.items():
            for visit in visits:
                for way, tensor in visit.tensors.items():
                    if tensor._version != visit.versions[way]:
                        overwritten.add((Location(module, side, (*path, name)), way))
        (steps if in_steps else runs).append(seen)
    if compiled is None:
        raise SiteError(f"`{path[-1]}` was not called.", hint="Print the source: it says which operations run.")
    if len(compiled.source) > _MAX_TEXT or len(compiled.names) > _MAX_OPERATIONS:
        raise LimitError(f"`{compiled.code.co_name}` is too long to look into.", hint="Look into a module in it.")
    loops, statements = _positions(compiled)
    operations = {}
    for name in compiled.names:
        in_loop, unused = repeated or name in loops, name in statements
        times = _times(name, runs[:-1], in_loop, runs[-1])
        leaves = _leaves(inside, name, times, runs[:-1], unused, runs[-1])
        operation = Operation(name, compiled.lines[name], times, leaves)
        if steps:
            times = _times(name, steps, in_loop)
            leaves = _leaves(inside, name, times, steps, unused)
            operation = replace(operation, runs_in_steps=times, leaves_in_steps=leaves)
        operations[name] = _with_callee(operation, learner.module, [each.callees for each in (*runs, *steps)])
    return compiled, operations, overwritten


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


def _times(name: str, runs: Sequence[_Seen], in_loop: bool, alone: _Seen | None = None) -> Dim:
    """How often an operation runs; in steps of a generation, where none runs alone, in terms of the tokens before."""
    times = dim_of(tuple(len(each.visits.get((name, INPUT), ())) for each in runs))
    if alone is not None and times.length(1, LENGTH) != len(alone.visits.get((name, INPUT), ())):
        return _UNKNOWN
    return _UNKNOWN if times == Dim(Axis.CONSTANT, 1) and in_loop else times


def _leaves(
    inside: Inside, name: str, times: Dim, runs: Sequence[_Seen], unused: bool, alone: _Seen | None = None
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
                leaves.append(leaf)
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


def _positions(compiled: Compiled) -> tuple[set[str], ...]:
    """The operations in a loop, a comprehension, or a function inside the function; and calls that are statements."""
    tree = ast.parse(compiled.source)
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
    assert tuple(marked.names) == compiled.names
    return marked.found


def _ids(node: ast.AST) -> set[int]:
    return {id(each) for each in ast.walk(node)}
