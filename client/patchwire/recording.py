"""Recording: user code runs once, eagerly, on values that do not exist yet, and what it does becomes a graph.

A `Recorder` is the tracer behind the `Value`s of one request. Every node is checked on fakes as soon as it is made, so
that a wrong shape or an impossible order is an ordinary exception at the line that wrote it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.fx
from torch import Tensor
from torch.fx.proxy import TracerBase

from patchwire import graph as g
from patchwire import ops, tensors
from patchwire.checking import Checker, describe, fake_of
from patchwire.errors import (
    GraphError,
    OperationError,
    OrderError,
    PatchwireError,
    ShapeError,
    SiteError,
    SourceLine,
    here,
    user_line,
    warn,
    with_code,
)
from patchwire.graph import Graph, KeptTensor, Site
from patchwire.kept import Kept
from patchwire.proxy import Memory, Structure, Value, Values, values_in
from patchwire.sites import OUTPUT, Axis, Catalogue, Leaf, Location, spell

if TYPE_CHECKING:
    from patchwire.connection import Connection
    from patchwire.results import Results

_SETITEM = ops.OPERATIONS["operator.setitem"]
_GETITEM = ops.OPERATIONS["operator.getitem"]

_PLAIN = frozenset({type(None), bool, float, str, torch.dtype, type(Ellipsis)})
"""What stands in a graph as it is, whatever its value."""
_Place = tuple[int, int, int, Leaf]
"""What a site means, however its address is spelled: a trace, an invoke, a step, and a tensor of the model."""
EVERYONE = -1
"""Stands for all invokes of a trace in a `Site` that is still to be recorded."""


class Recorder(TracerBase):
    """Turns what user code does with values into the nodes of one graph."""

    inner: Recorder | None = None
    """The recorder of the loop's body that user code is in, which records what happens meanwhile."""
    parent: Recorder | None = None
    """The recorder of the graph around this one, if this is of a loop's body."""

    def __init__(self, catalogue: Callable[[str], Catalogue], *, value_bytes: int | None = None) -> None:
        """
        Args:
            catalogue: The catalogue of a model, by the model's name.
            value_bytes: How large one value may be.
        """
        super().__init__()
        self.request = Graph()
        self.graph = self.request.fx
        self.checker = Checker(self.request, catalogue, value_bytes=value_bytes)
        self.open = True
        self.detached = False
        """Whether its run is a job that has not been fetched."""
        self.resolved = False
        """Whether what was asked for has come."""
        self.saved: list[tuple[Value, torch.dtype | None, int, SourceLine | None]] = []
        self.bodies: list[Recorder] = []
        """Those of the loops."""
        self.kept: list[tuple[Kept, float, int, SourceLine | None]] = []
        self.keeps = True
        """Whether values can be kept beyond its run: not by a detached job."""
        self._of_kept: dict[bytes, Value] = {}
        self.loss: Value | None = None
        """What `.grad` is the gradient of: the sum of everything that `backward()` was called on."""
        self._gradients: dict[tuple[torch.fx.Node, ...], torch.fx.Node] = {}
        self._accumulated: dict[tuple[torch.fx.Node, ...], Value] = {}
        self._everyone: dict[_Place, Value] = {}
        self.twins: dict[tuple[int, int], tuple[int, set[str]]] = {}
        """Invokes that the program does not see, by trace and invoke: whose rows they have, and whose modules."""
        self.cuts: dict[Site, list[Any]] = {}
        """What flow.py has cut inside of each mixer, by the site where it does so."""
        self._skipped: dict[int, list[tuple[Site, str]]] = defaultdict(list)
        self._parameters: dict[tuple[int, str, str], Value] = {}
        self._assigned: dict[tuple[int, str, str], torch.fx.Node] = {}
        self._sites: dict[_Place, Value] = {}
        self._memories: dict[int, set[Memory]] = defaultdict(set)
        """What has been bound to sites and weights of each trace that is open."""
        self._writes: dict[_Place, torch.fx.Node] = {}
        self._constants: dict[int, tuple[Tensor, Tensor, torch.fx.Node]] = {}
        self.logs = False
        self.scanned = False
        self._made = 0
        self._began: dict[int, int] = {}
        """How many nodes there were when each trace began."""
        self._runs: int | None = None
        """The trace that user code is in."""
        self._branch: int | None = None

    def new_value(self) -> Value:
        """An empty value, which `Value` is about to fill: for recordings whose values are more than that."""
        return object.__new__(Value)

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _create(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        operation: ops.Operation | None = None,
    ) -> torch.fx.Node:
        node = g.add(self.graph, target, args, kwargs)
        node.meta["line"] = user_line()
        node.meta["operation"] = operation
        node.meta["number"] = self._made = self._made + 1
        try:
            self.checker.node(node)
        except Exception:
            self.graph.erase_node(node)
            raise
        return node

    def again(self, node: torch.fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.fx.Node:
        """Record what a node of another graph does, with other arguments.

        Raises:
            PatchwireError: it does not fit these; at the line that the node came from.
        """
        assert not isinstance(node.target, str)
        try:
            made = self._create(node.target, args, kwargs, g.operation_of(node))
        except PatchwireError as error:
            line = g.line_of(node)
            lines = [with_code(line)] if line else []
            raise type(error)(error.message, hint=error.hint, lines=[*lines, *error.lines]) from None
        made.meta["line"] = g.line_of(node)
        return made

    def argument(self, value: Any) -> Any:
        """What stands in a graph for an argument: nodes for values and tensors, plain data as it is.

        Raises:
            GraphError: it is none of these, or a value that will never exist here.
        """
        if type(value) in _PLAIN:
            return value
        match value:
            case Value():
                return self._value(value)
            case Kept():
                return self.of_kept(value).node
            case Tensor():
                return self._constant(value)
            case int() if not -(2**63) <= value < 2**63:
                raise GraphError(f"{value} does not fit into 64 bits.", lines=here())
            case int() | float() | str():
                return value
            case tuple():
                return tuple([self.argument(each) for each in value])
            case list():
                return [self.argument(each) for each in value]
            case slice():
                return slice(self.argument(value.start), self.argument(value.stop), self.argument(value.step))
            case np.ndarray():
                return self._constant(torch.from_numpy(value))
            case np.generic():
                return value.item()
            case range():
                return list(value)
        if isinstance(value, Structure):
            raise value.not_one_tensor()
        raise GraphError(
            f"A {type(value).__name__} cannot be used inside the block: a graph is data.",
            hint="Numbers, strings, dtypes, tensors, values, and lists and tuples of them can.",
            lines=here(),
        )

    def _value(self, value: Value) -> torch.fx.Node:
        if value.ready:
            if isinstance(value.value, list):
                hint = "Take that of one: `value.value[0]`."
                raise GraphError(
                    "This value has a tensor of another shape for each iteration.", hint=hint, lines=here()
                )
            return self._constant(value.value)
        if value.recorder is not self:
            if value.recorder.parent is not None:
                raise GraphError(
                    "This value belongs to the body of a loop.",
                    hint="Carry it: `x = loop.carry(start)`, `loop.update(x, value)`, and after the loop "
                    "`loop.result(x)`.",
                    lines=here(),
                )
            raise GraphError(
                "This value belongs to another trace, and was not saved there.",
                hint="Write `.save()` in that trace and use it after its block, or record both in one trace.",
                lines=here(),
            )
        return value.node

    def _constant(self, tensor: Tensor) -> torch.fx.Node:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise GraphError(
                "Only ordinary dense tensors can go into a graph.",
                hint="Write `tensor.to_dense()` or `tensor.dequantize()`.",
                lines=here(),
            )
        # What counts is the tensor as it is now: the program may change it before it is used again or sent, and in
        # ways that PyTorch does not notice.
        known = self._constants.get(id(tensor))
        if known is not None and _same_content(known[1], tensor):
            return known[2]
        copy = tensor.detach().to("cpu", copy=True).contiguous()
        self.request.constants.append(copy)
        node = self._create(g.constant, (len(self.request.constants) - 1,))
        self._constants[id(tensor)] = (tensor, copy, node)
        return node

    def of_kept(self, kept: Kept) -> Value:
        """The value that something kept is in this graph."""
        if self.inner is not None:
            return self.inner.of_kept(kept)
        if kept.source.recorder is self:
            return kept.source
        return self.on_server(kept.tensor)

    def on_server(self, tensor: KeptTensor) -> Value:
        """The value that a tensor which the server keeps is in this graph."""
        if tensor.handle not in self._of_kept:
            self.request.constants.append(tensor)
            value = Value(self, self._create(g.constant, (len(self.request.constants) - 1,)))
            value.memory.taken.add(tensor.handle)
            self._of_kept[tensor.handle] = value
        return self._of_kept[tensor.handle]

    # --- operations ---------------------------------------------------------------------------------------------------

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        """What `torch.fx.Proxy` calls for operators."""
        operation = ops.of_function(target)
        if operation is None:
            raise self._refused(getattr(target, "__name__", str(target)))
        return self.call(operation, args, kwargs)

    def function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a `torch.*` function, or a method of a tensor that met a value."""
        operation = ops.of_function(function)
        name = getattr(function, "__name__", str(function))
        if operation is None and torch.overrides.is_tensor_method_or_property(function):
            if name == "__get__":  # a property of a tensor
                return getattr(args[0], getattr(function, "__self__").__name__)  # noqa: B009
            operation = ops.of_method(name)
            reflected = ops.of_method(f"__{name[3:]}") if name.startswith("__r") else None
            if operation is None and reflected is not None:
                operation, args = reflected, (args[1], args[0])
        if operation is None and not self.open:
            return function(*_tensors(args), **_tensors(kwargs))
        if operation is None:
            raise self._refused(name)
        return self.call(operation, args, kwargs, function)

    def _refused(self, name: str) -> OperationError:
        return OperationError(
            f"`{name}` is not an operation that a graph may contain.",
            hint=ops.INSTEAD.get(name)
            or "`patchwire.ops` lists those that are; save the value and compute the rest after the block.",
            lines=here(),
        )

    def method(self, operation: ops.Operation, value: Value, /, *args: Any, **kwargs: Any) -> Any:
        """Record a method of a value."""
        if operation.name == "torch.Tensor.to":
            # Where a value lives is the worker's business: only a dtype counts.
            args = tuple(
                each.dtype if isinstance(each, (Tensor, Value)) else each
                for each in args
                if not isinstance(each, (str, torch.device))
            )
            kwargs.pop("device", None)
            if not args and not kwargs:
                return value
        return self.call(operation, (value, *args), kwargs)

    def call(
        self,
        operation: ops.Operation,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        function: Callable[..., Any] | None = None,
    ) -> Any:
        """Record an operation; compute it at once if the block has ended.

        Raises:
            ShapeError: it cannot be done with values of these shapes.
            OperationError: it is not possible in a graph.
        """
        if self.inner is not None:
            return self.inner.call(operation, args, kwargs, function)
        if not self.open:
            return (function or operation.function)(*_tensors(args), **_tensors(kwargs))
        if refused := ops.forbidden_argument(operation, args, kwargs):
            raise OperationError(
                f"`{operation.name}` takes no `{refused}` inside the block.",
                hint=f"Leave `{refused}` out; the worker decides where values live, and results are new values.",
                lines=here(),
            )
        kwargs = {name: each for name, each in kwargs.items() if name not in ops.FORBIDDEN_ARGUMENTS}
        if not args and "input" in kwargs:  # `torch.softmax(input=value)`
            args = (kwargs.pop("input"),)
        if operation.kind == "inplace":
            return self._edit(operation, args[0], args[1:], kwargs)
        arguments = self.argument(args)
        keywords = {name: self.argument(each) for name, each in kwargs.items()}
        node = self._create(operation.function, arguments, keywords, operation)
        source = args[0] if args and isinstance(args[0], Value) and not args[0].ready else None
        others = []
        if source is None or len(node.all_input_nodes) > 1:
            others = [each for each in values_in((args if source is None else args[1:], kwargs)) if not each.ready]
        return self._result(node, source, (operation.name, arguments[1:], keywords), operation, others)

    def _result(
        self,
        node: torch.fx.Node,
        source: Value | None,
        change: g.Change,
        operation: ops.Operation,
        others: list[Value],
    ) -> Value | Values:
        """The value of a node, or the values of one that yields several; views of `source` if they share its memory."""
        fake = fake_of(node)
        views = (*source.views, change) if source is not None else ()
        if isinstance(fake, tuple):
            items = []
            for index in range(len(fake)):
                item = self._create(operator.getitem, (node, index), None, _GETITEM)
                items.append(self._alias(item, source, (*views, (_GETITEM.name, (index,), {})), operation, others))
            return Values(items, type(fake))
        return self._alias(node, source, views, operation, others)

    def _alias(
        self,
        node: torch.fx.Node,
        source: Value | None,
        views: tuple[g.Change, ...],
        operation: ops.Operation,
        others: list[Value],
    ) -> Value:
        fake = fake_of(node)
        base = None if source is None else fake_of(source.node)
        if source is not None and g.same_storage(fake, base):
            return Value(self, node, source.memory, views, source)
        for each in others:
            if g.same_storage(fake, fake_of(each.node)):
                return self._entangled(node, each, operation)
        if source is None or (fake is not None and base is not None) or operation.kind != "view":
            return Value(self, node)
        if operation is _GETITEM:
            return Value(self, node) if _gathers(views[-1][1][0]) else Value(self, node, source.memory, views, source)
        return self._entangled(node, source, operation)  # whether it is a view or a copy depends on data

    def _entangled(self, node: torch.fx.Node, source: Value, operation: ops.Operation) -> Value:
        """A value that shares memory with another in a way that edits cannot follow: neither may be edited any more."""
        why = f"A value and its `{operation.name.rsplit('.', 1)[-1]}` may share memory here, so neither can be edited."
        source.memory.constant = source.memory.constant or why
        return Value(self, node, Memory(node, constant=why))

    def derived(self, value: Value) -> torch.fx.Node:
        """The node of a view of the newest version of its memory."""
        node = value.memory.node
        for name, args, kwargs in value.views:
            operation = ops.OPERATIONS[name]
            node = self._create(operation.function, (node, *args), kwargs, operation)
        return node

    def _edit(self, operation: ops.Operation, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        if not isinstance(value, Value) or value.ready:
            raise GraphError(
                "A tensor of this program cannot be changed in place with a value that does not exist yet.",
                hint="Start from a value, for example `value.new_zeros(shape)` or `value.clone()`.",
                lines=here(),
            )
        memory = value.memory
        if memory.constant:
            hint = "Write what it is made of. A `.clone()` of it can be edited, and stays a copy."
            raise GraphError(memory.constant, hint=hint, lines=here())
        if operation is _SETITEM and self._is_itself(value, *args):
            return value
        if given := next((site for site in memory.given if self._runs == site.trace), None):
            raise GraphError(
                f"`{given}` has become this value, and would not change with it.",
                hint=f"Edit the value before it is assigned, or the site itself: `{given}[…] = …`.",
                lines=here(),
            )
        if memory.sites or memory.born <= (self._branch or 0):
            self.not_in_a_branch("edit a value that it has not made itself")
        self._value(value)
        change = (operation.name, self.argument(args), {name: self.argument(each) for name, each in kwargs.items()})
        former = memory.node
        self._advance(memory, self._create(g.edit, (memory.node, value.views, change)), value, user_line())
        try:
            for site, alias in memory.sites:
                self._write(self._place(site), site, alias)
            for trace, path, alias in memory.weights:
                self._assign(trace, path, alias)
        except PatchwireError:
            # The program may go on after a refused edit: then nothing of it must remain.
            self._advance(memory, former, value, None)
            for site, alias in memory.sites:
                if self._place(site) in self._writes:
                    self._write(self._place(site), site, alias)
            raise
        return value

    @staticmethod
    def _advance(memory: Memory, node: torch.fx.Node, editor: Value, line: SourceLine | None) -> None:
        memory.node = node
        memory.version += 1
        memory.edits.append((editor, line))

    def _is_itself(self, value: Value, index: Any, item: Any) -> bool:
        """Whether `value[index] = item` puts a view back where it was taken, as `value[index] += 1` does in the end."""
        if not isinstance(item, Value) or item.ready or item.memory is not value.memory:
            return False
        view: g.Change = (_GETITEM.name, (self.argument(index),), {})
        return repr(item.views) == repr((*value.views, view))  # `==` would take True for 1

    # --- sites --------------------------------------------------------------------------------------------------------

    def _place(self, site: Site) -> _Place:
        try:
            leaf = self.checker.leaf(site)
        except SiteError as error:
            raise SiteError(error.message, hint=error.hint, lines=here()) from None
        for skipped, path in self._skipped.get(site.trace, ()):
            if _meets(skipped, site.trace, site.invoke, site.step):
                self._check_not_inside(leaf, path, here())
        return (site.trace, site.invoke, site.step, leaf)

    def _returns(self, read: Site, site: Site, path: str) -> bool:
        """Whether a site that was read is what a module returns, in the rows and the step of another site."""
        return _meets(site, read.trace, read.invoke, read.step) and self.checker.leaf(read).location == Location(
            path, OUTPUT
        )

    @staticmethod
    def _check_not_inside(leaf: Leaf, skipped: str, lines: Sequence[SourceLine]) -> None:
        if leaf.module.startswith(f"{skipped}."):
            raise SiteError(
                f"`{spell(leaf.module)}` does not run: `{spell(skipped)}` is skipped.",
                hint="Read it in a trace of its own, or assign the output instead of skipping.",
                lines=lines,
            )

    def twin(self, trace: int, invoke: int, module: str) -> int:
        """An invoke with the same rows, which the program does not see, and in which a module is nobody else's."""
        for (of, twin), (origin, modules) in self.twins.items():
            if (of, origin) == (trace, invoke) and module not in modules:
                modules.add(module)
                return twin
        invokes = self.request.traces[trace].invokes
        invokes.append(invokes[invoke])
        self.twins[trace, len(invokes) - 1] = (invoke, {module})
        return len(invokes) - 1

    def read(self, site: Site) -> Value:
        """The value of a site: what the model gives, or what was written there before.

        Raises:
            SiteError: there is no such site.
        """
        if site.invoke == EVERYONE:
            return self._read_everyone(site)
        place = self._place(site)
        known = self._sites.get(place)
        if known is not None:
            return Value(self, known.node, known.memory, known.views)
        value = Value(self, self._create(g.read, (site,)))
        self._bind(place, site, value)
        return value

    def assign(self, site: Site, value: Any) -> None:
        """Make a value the value of a site.

        Raises:
            ShapeError: its shape or dtype is not that of the site.
            OrderError: it exists only later in the forward pass.
            SiteError: there is no such site.
        """
        self.not_in_a_branch(f"write `{site}`")
        if isinstance(value, Kept):
            value = self.of_kept(value)
        known_here = isinstance(value, Value) and not value.ready
        if not known_here and isinstance(value, (Value, Tensor, np.ndarray)):
            value = Value(self, self.argument(value))
        if not isinstance(value, Value):
            raise ShapeError(
                f"`{site}` cannot become a {type(value).__name__}.",
                hint="Assign a tensor, or set the elements: `value[:] = 0`.",
                lines=here(),
            )
        self._value(value)
        if site.invoke == EVERYONE:
            self._assign_everyone(site, value)
            return
        place = self._place(site)
        known = self._sites.get(place)
        if known is not None and known.memory is value.memory and repr(known.views) == repr(value.views):
            return  # `site += 1` has edited the value and now assigns it
        if known is None or known.memory is not value.memory:
            value = self._own(site, value, {place})
        self._write(place, site, value)
        if known is not None:
            known.memory.sites = [each for each in known.memory.sites if self._place(each[0]) != place]
        self._bind(place, site, value)

    def _assign_everyone(self, site: Site, value: Value) -> None:
        """Make a value that of a site for all rows of a trace: each invoke's part of it is a view of the value."""
        sites = self._of_everyone(site)
        if len(sites) == 1:
            self.assign(sites[0], value)
            return
        whole = self._read_everyone(site)
        if value.memory is whole.memory and repr(value.views) == repr(whole.views):
            return  # `site += 1` has edited the value and now assigns it
        if (value.shape, value.dtype) != (whole.shape, whole.dtype):
            raise ShapeError(
                f"`{site}` of all invokes is {describe(whole.fake)} and cannot become {describe(value.fake)}.",
                hint="Assign a value of the same shape and dtype, or part of it: `value[:, -1] = ...`.",
                lines=here(),
            )
        if value.memory is not whole.memory:
            value = self._own(site, value, {self._place(each) for each in sites})
        views = self._parts(value, sites)
        for each, view in zip(sites, views, strict=True):
            place = self._place(each)
            self._write(place, each, view)
            memory = self._sites[place].memory
            memory.sites = [bound for bound in memory.sites if self._place(bound[0]) != place]
            self._bind(place, each, view)
        self._everyone[(site.trace, EVERYONE, site.step, self._place(sites[0])[3])] = value

    def _own(self, site: Site, value: Value, places: set[_Place]) -> Value:
        """A value that is to become a site's, with memory of its own if its memory is something else's value already.

        `places` are those that the site means.

        Otherwise an edit of this site would be one of the other too: of the clean run that was patched from, or of a
        value that the next trace uses again.
        """
        memory = value.memory
        if not (memory.taken - places or memory.constant or memory.born <= self._began[site.trace]):
            return value
        memory.given.append(site)
        return Value(self, value.node)

    def _of_everyone(self, site: Site) -> list[Site]:
        """The site in each invoke of its trace."""
        invokes = range(len(self.request.traces[site.trace].invokes))
        return [replace(site, invoke=invoke) for invoke in invokes if (site.trace, invoke) not in self.twins]

    def _read_everyone(self, site: Site) -> Value:
        """The value of a site for all rows of a trace: those of one invoke after those of the other.

        It is one memory, of which every invoke's part is a view from now on. Rows of different lengths end together.
        """
        sites = self._of_everyone(site)
        leaf = self._place(sites[0])[3]
        if len(sites) == 1:
            return self.read(sites[0])
        axes = [dim.axis for dim in leaf.shape]
        if Axis.BATCH not in axes or not leaf.packs:
            raise SiteError(
                f"`{site}` {leaf.symbolic} has no rows that could be put together.",
                hint="Read it in one of the invokes.",
                lines=here(),
            )
        place = (site.trace, EVERYONE, site.step, leaf)
        known = self._everyone.get(place)
        if known is not None and all(self._sites[self._place(each)].memory is known.memory for each in sites):
            return Value(self, known.node, known.memory, known.views)
        parts = [self.read(each) for each in sites]
        seqs = [dim for dim, axis in enumerate(axes) if axis is Axis.SEQ]
        longest = {seq: max(part.shape[seq] for part in parts) for seq in seqs}
        padded = [
            functools.reduce(lambda each, seq: self._padded(each, seq, longest[seq]), seqs, part) for part in parts
        ]
        whole: Value = self.call(ops.OPERATIONS["torch.cat"], (padded, axes.index(Axis.BATCH)), {})
        for each, part, view in zip(sites, parts, self._parts(whole, sites), strict=True):
            part.memory.sites = []
            part.memory.constant = f"`{each}` has been put together with the rows of all invokes."
            self._bind(self._place(each), each, view)
        self._everyone[place] = whole
        return whole

    def _parts(self, whole: Value, sites: Sequence[Site]) -> list[Value]:
        """Each invoke's part of a value that has the rows of all, as a view: its rows, and its tokens at their end."""
        views, start = [], 0
        for each in sites:
            axes, fake = [dim.axis for dim in self.checker.leaf(each).shape], self.checker.fake_site(each)
            assert fake is not None
            batch = axes.index(Axis.BATCH)
            view: Value = whole.narrow(batch, start, fake.shape[batch])
            start += fake.shape[batch]
            for dim, axis in enumerate(axes):
                missing = whole.shape[dim] - fake.shape[dim]
                if axis is Axis.SEQ and missing:
                    view = view.narrow(dim, missing, fake.shape[dim])
            views.append(view)
        return views

    @staticmethod
    def _padded(part: Value, seq: int, longest: int) -> Value:
        missing = longest - part.shape[seq]
        if not missing:
            return part
        shape = [missing if dim == seq else length for dim, length in enumerate(part.shape)]
        filler = float("nan") if part.dtype.is_floating_point or part.dtype.is_complex else 0
        padded: Value = torch.cat([part.new_full(shape, filler), part], seq)  # type: ignore[assignment, list-item]
        return padded

    def skip(self, site: Site, path: str, value: Any, assign: Callable[[], None]) -> None:
        """Leave out what is inside a module, by its raw path.

        Args:
            site: Its output, for the rows that are meant.
            path: The module.
            value: What it is to return, or several values.
            assign: Assigns the output.

        Raises:
            SiteError: something in it was read or written.
            OrderError: the value is made of what the module returns.
        """
        for each in values_in(value):
            after = None if each.ready else each.node.meta["after"]
            if after is not None and isinstance(after.site, Site) and self._returns(after.site, site, path):
                raise OrderError(
                    f"`{spell(path)}` cannot be skipped: what it is to return is made of what it returns.",
                    hint=f"Assign it instead of skipping: `{site} = …`; or skip with a value from before the module.",
                    lines=here(after.line),
                )
        for (trace, invoke, step, leaf), value in self._sites.items():
            if _meets(site, trace, invoke, step):
                self._check_not_inside(leaf, path, here(g.line_of(value._node)))
        assign()
        self._skipped[site.trace].append((site, path))

    def grad(self, loss: Value, weights: Any, values: Sequence[Value | Kept | Tensor]) -> list[Value]:
        """The gradients of a value with respect to others."""
        if self.inner is not None:
            return self.inner.grad(loss, weights, values)
        if not values:
            raise GraphError("A gradient is with respect to something.", hint="Name a value.", lines=here())
        if weights is not None and not isinstance(weights, (Value, Tensor)):
            raise GraphError("The weights of a gradient are a tensor or value of the loss's shape.", lines=here())
        if not all(isinstance(each, (Value, Kept, Tensor)) for each in values):
            raise GraphError(
                "A gradient is with respect to values, or tensors that were used in the block.",
                hint="Give it what was read: `patchwire.grad(loss, model.layers[0].output)`.",
                lines=here(),
            )
        made = [each._made_of if isinstance(each, Value) and not each.ready else None for each in values]
        if any(made):
            # The model goes on with the whole tensor, not with this view of it: the gradient is that part of its.
            wholes = [[each] if way is None else way[0] for each, way in zip(values, made, strict=True)]
            each_one = iter(self.grad(loss, weights, [each for of_one in wholes for each in of_one]))
            gradients = [list(itertools.islice(each_one, len(of_one))) for of_one in wholes]
            return [of[0] if way is None else way[1](of) for of, way in zip(gradients, made, strict=True)]
        for each in values:
            self._differentiate_everyone(each)
        nodes = [self.argument(each) for each in values]
        weigh = None if weights is None else self.argument(weights)
        node = self._value(loss)
        asked = (node, *([] if weigh is None else [weigh]), *nodes)
        if len(nodes) == 1 and asked in self._gradients:
            return [Value(self, self._gradients[asked])]  # a tensor of its own: the other may have been edited
        result = self._create(g.grad, (node, tuple(nodes), weigh))
        found = [
            Value(self, self._create(operator.getitem, (result, index), None, _GETITEM)) for index in range(len(nodes))
        ]
        if len(nodes) == 1:
            self._gradients[asked] = found[0].node
        return found

    def accumulated(self, value: Value) -> Value:
        """What `value.grad` is: for one value, and what `backward()` was called on so far, always the same tensor."""
        assert self.loss is not None
        asked = (self.loss.node, self.argument(value))
        if asked not in self._accumulated:
            self._accumulated[asked] = self.grad(self.loss, None, [value])[0]
        return self._accumulated[asked]

    def _differentiate_everyone(self, value: Value | Kept | Tensor) -> None:
        """Write what was put together of all invokes to their sites, so that the model depends on it."""
        if isinstance(value, Value) and any(value.memory is each.memory for each in self._everyone.values()):
            for site, alias in value.memory.sites:
                if self._place(site) not in self._writes:
                    self._write(self._place(site), site, alias)

    def generated(self, trace: int, invoke: int) -> Value:
        """The token ids that a generation ends with."""
        return Value(self, self._create(g.generated, (trace, invoke)))

    def _bind(self, place: _Place, site: Site, value: Value) -> None:
        value.memory.taken.add(place)
        self._sites[place] = value
        value.memory.sites.append((site, value))
        self._memories[site.trace].add(value.memory)

    def _write(self, place: _Place, site: Site, value: Value) -> None:
        node = self._create(g.write, (site, value.node))
        former = self._writes.pop(place, None)
        if former is not None:
            self.graph.erase_node(former)
        self._writes[place] = node

    def parameter(self, trace: int, path: str) -> Value:
        """A parameter of a model, as a trace runs with it so far."""
        known = self._parameters.get(self._weight(trace, path))
        if known is not None:
            return Value(self, known.node, known.memory, known.views)
        value = Value(self, self._create(g.parameter, (trace, path)))
        self._bind_weight(self._weight(trace, path), path, value)
        return value

    def _bind_weight(self, weight: tuple[int, str, str], path: str, value: Value) -> None:
        value.memory.taken.add(weight)
        self._parameters[weight] = value
        value.memory.weights.append((weight[0], path, value))
        self._memories[weight[0]].add(value.memory)

    def assign_parameter(self, trace: int, path: str, value: Any) -> None:
        """Have a trace run with another weight.

        Raises:
            ShapeError: it has another shape or dtype.
            OrderError: it exists only when the trace has run.
        """
        weight = self._weight(trace, path)
        known = self._parameters.get(weight)
        if not isinstance(value, Value) or value.ready:
            value = Value(self, self.argument(value))
        if known is not None and known.memory is value.memory and repr(known.views) == repr(value.views):
            return  # `weight += 1` has edited the value and now assigns it
        other = self._assigned.get(weight)
        if other is not None and not self._same_name(trace, str(other.args[1]), path):
            raise GraphError(
                f"`{path}` is tied to another weight that is changed too.", hint="Change one of them.", lines=here()
            )
        if value.memory.taken - {weight}:
            value = Value(self, value.node)  # an edit of this weight is none of what it was
        self._assign(trace, path, value)
        if known is not None:
            known.memory.weights = [each for each in known.memory.weights if self._weight(*each[:2]) != weight]
        self._bind_weight(weight, path, value)

    def _weight(self, trace: int, path: str) -> tuple[int, str, str]:
        """What a weight's path means, however it is spelled and whatever else has the same tensor."""
        catalogue = self.checker.catalogue(self.request.traces[trace].model)
        owner, _, name = (catalogue.parameter(path).tied or path).rpartition(".")
        return (trace, catalogue.module(owner).path, name)

    def _same_name(self, trace: int, one: str, other: str) -> bool:
        """Whether two paths name the same weight of the same module."""
        catalogue = self.checker.catalogue(self.request.traces[trace].model)
        (owner, _, name), (its_owner, _, its_name) = one.rpartition("."), other.rpartition(".")
        return (catalogue.module(owner).path, name) == (catalogue.module(its_owner).path, its_name)

    def _assign(self, trace: int, path: str, value: Value) -> None:
        node = self._create(g.assign, (trace, path, value.node))
        former = self._assigned.pop(self._weight(trace, path), None)
        if former is not None:
            self.graph.erase_node(former)
        self._assigned[self._weight(trace, path)] = node

    def _weights_of(self, trace: int, module: str) -> dict[str, torch.fx.Node]:
        """The weights of a module, by their paths, that the trace has changed so far."""
        if not any(weight[0] == trace for weight in self._assigned):
            return {}
        catalogue = self.checker.catalogue(self.request.traces[trace].model)
        own = catalogue.module(module).path
        found: dict[tuple[int, str, str], str] = {}
        for path, each in catalogue.modules.items():
            if f"{path}.".startswith(f"{own}." if own else ""):
                for parameter in each.parameters:
                    full = f"{path}.{parameter.name}" if path else parameter.name
                    found.setdefault(self._weight(trace, full), full)
        return {path: self._parameters[weight].node for weight, path in found.items() if weight in self._assigned}

    def apply(self, trace: int, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        """Apply a module of a model to values."""
        arguments = self.argument(args)
        keywords = {name: self.argument(each) for name, each in kwargs.items()}
        catalogue = self.checker.catalogue(self.request.traces[trace].model)
        if catalogue.holds_layers(catalogue.module(module).path):
            raise OperationError(
                f"`{spell(module)}` holds the layers and cannot be applied to a value.",
                hint="Give a prompt to a trace of its own.",
                lines=here(),
            )
        weights = self._weights_of(trace, module)
        return Value(self, self._create(g.apply, (trace, module, arguments, keywords, weights)))

    # --- branches -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def branch(self) -> Iterator[None]:
        """What is recorded meanwhile is a branch of `patchwire.cond`: it is computed whatever the predicate says."""
        outer, self._branch = self._branch, self._made
        try:
            yield
        finally:
            self._branch = outer

    def not_in_a_branch(self, what: str) -> None:
        """Refuse what would not wait for the predicate.

        Raises:
            GraphError: this is in a branch.
        """
        if self._branch is not None:
            raise GraphError(
                f"A branch of `patchwire.cond` cannot {what}: both branches are computed, so it would happen anyway.",
                hint="Return the value from the branch, and go on with what `cond` returns: "
                "`hidden[:] = patchwire.cond(condition, f, g, hidden)`.",
                lines=here(),
            )

    # --- the end ------------------------------------------------------------------------------------------------------

    def save(self, value: Value, dtype: torch.dtype | None) -> None:
        """Ask for a value.

        Raises:
            GraphError: the block has ended, or the value belongs to another one.
        """
        if not self.open:
            raise GraphError(
                "The block has ended: nothing can be saved any more.", hint="Write `.save()` inside it.", lines=here()
            )
        self.not_in_a_branch("save a value")
        if value._saved and dtype is None:
            return
        value._saved = True
        self.saved.append((value, dtype, value.memory.version, user_line()))

    def keep(self, value: Value, seconds: float) -> Kept:
        """Ask that a value be kept beyond the request.

        Raises:
            GraphError: the block has ended, or the value belongs to another one.
        """
        if not self.open:
            raise GraphError(
                "The block has ended: nothing can be kept any more.", hint="Write `.keep()` inside it.", lines=here()
            )
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
            raise GraphError(f"A value cannot be kept for {seconds!r} seconds.", hint="Give a time.", lines=here())
        if not self.keeps:
            raise GraphError(
                "A detached job cannot keep values: nobody waits for their handles.",
                hint="Save it, or leave `blocking=False` out.",
                lines=here(),
            )
        self.not_in_a_branch("keep a value")
        self._value(value)
        kept = Kept(value)
        self.kept.append((kept, float(seconds), value.memory.version, user_line()))
        return kept

    def log(self, parts: Iterable[Any]) -> None:
        """Ask what values look like.

        Raises:
            GraphError: the block has ended, or a text is too long.
        """
        if not self.open:
            raise GraphError(
                "The block has ended: nothing can be logged any more.", hint="Print saved values.", lines=here()
            )
        self.not_in_a_branch("log a value")
        found: list[Any] = []
        for part in parts:
            if isinstance(part, (Value, Tensor, Structure)):
                found.append(self.argument(part))
            elif inside := list(values_in(part)):
                found += [self.argument(each) for each in inside]
            elif len(text := str(part)) > g.LONGEST_TEXT:
                raise GraphError(
                    f"A text of {len(text):,} characters is too long for a log; it takes {g.LONGEST_TEXT}.",
                    hint="What is known inside the block can be printed there.",
                    lines=here(),
                )
            else:
                found.append(text)
        self._create(g.log, (tuple(found),))
        self.logs = True

    def begin(self, trace: g.Trace) -> int:
        """A trace's block has begun: its position in the graph."""
        self.request.traces.append(trace)
        self._runs = len(self.request.traces) - 1
        self._began[self._runs] = self._made
        return self._runs

    def end(self, trace: int) -> None:
        """A trace's block has ended: what is done to its values from now on is done to values, not to its sites."""
        self._runs = None
        for memory in self._memories.pop(trace, ()):
            memory.sites = [each for each in memory.sites if each[0].trace != trace]
            memory.weights = [each for each in memory.weights if each[0] != trace]

    def finish(self) -> Graph:
        """End the recording: the graph, without what nobody needs.

        Warns:
            PatchwireWarning: a saved or kept value was edited in place afterwards, through another name.
        """
        try:
            for value, dtype, version, line in self.saved:
                node = self._create(g.save, (value.node, dtype))
                node.meta |= {"line": line, "to": value._to}
                self._warn_if_edited(value, version, line, "saved", "save")
            for kept, seconds, version, line in self.kept:
                self._create(g.keep, (self._value(kept.source), seconds)).meta["line"] = line
                self._warn_if_edited(kept.source, version, line, "kept", "keep")
        finally:
            self.open = False
        g.drop_unneeded(self.graph)
        _drop_unused_constants(self.request)
        return self.request

    def so_far(self, more: Iterable[Value] = ()) -> Graph:
        """The graph of what has been recorded until now, as it would be if the recording ended here; it goes on.

        Args:
            more: Values that are going to be saved when it ends.
        """
        graph, copies = Graph(list(self.request.traces), constants=self.request.constants), dict[Any, Any]()
        saves = [(value.node, dtype, line) for value, dtype, _, line in self.saved]
        saves += [(value.node, None, user_line()) for value in more]
        keeps = [(self._value(kept.source), seconds, line) for kept, seconds, _, line in self.kept]
        graph.fx.graph_copy(self.graph, copies)
        for target, asked in ((g.save, saves), (g.keep, keeps)):
            for node, option, line in asked:
                graph.fx.call_function(target, (copies[node], option)).meta["line"] = line
        g.drop_unneeded(graph.fx)
        _drop_unused_constants(graph)
        return graph

    @property
    def asked_for(self) -> bool:
        """Whether anything is to come of it."""
        return bool(self.saved or self.logs or self.kept or any(each.asked_for for each in self.bodies))

    @property
    def active(self) -> Recorder:
        """The recorder that records what happens to its values now."""
        return self.inner or self

    @property
    def pending(self) -> bool:
        """Whether what is saved has still to come."""
        return self.open or (self.parent is not None and self.parent.open)

    def shape(self, value: Value) -> torch.Size:
        """The lengths of a value's dimensions."""
        return value.fake.shape

    def token_ids(self, trace: int, invoke: int) -> Value:
        """The token ids of an invoke."""
        return Value(self, self._create(g.token_ids, (trace, invoke)))

    def loop(self, loop: g.Loop, model: str, inputs: Sequence[torch.fx.Node]) -> Value:
        """The values that a loop ends with, a tuple; it becomes the next entry of the graph's traces."""
        self.request.traces.append(g.Trace(model, loop=loop))
        return Value(self, self._create(g.loop, (len(self.request.traces) - 1, tuple(inputs))))

    def carry(self, index: int, node: torch.fx.Node, line: SourceLine | None) -> None:
        """Say what a value from outside is in the next iteration."""
        self._create(g.carry, (index, node)).meta["line"] = line

    def item(self, values: Value, index: int) -> Value:
        """One of several results."""
        return Value(self, self._create(operator.getitem, (values.node, index), None, _GETITEM))

    def resolve(self, results: Results, connection: Connection) -> None:
        """Give every saved value its tensor, and every kept one its handle."""
        for (value, *_), tensor in zip(self.saved, results.saved, strict=True):
            value._tensor = tensor
            value._absent = tensor is None and value._to is None
        self.detached = False
        self.resolved = True
        for (kept, *_), (there, seconds) in zip(self.kept, results.kept, strict=True):
            assert there.fake is not None
            kept.arrived(there.handle, there.fake, datetime.now() + timedelta(seconds=seconds), connection)
        for each in self.bodies:
            each.resolve(results, connection)

    def let_go(self) -> None:
        """Keep no value any more, once all are resolved: its tensor goes when the program lets go of it, not later."""
        for each in (self, *self.bodies):
            each.saved, each._sites, each._parameters, each._everyone, each._accumulated = [], {}, {}, {}, {}

    def _warn_if_edited(self, value: Value, version: int, line: SourceLine | None, done: str, do: str) -> None:
        for editor, where in value.memory.edits[version:]:
            origin: Value | None = editor
            while origin is not None and (origin is not value or done == "kept"):  # a handle is another name
                origin = origin.parent
            if origin is None and where is not None and line is not None:
                warn(
                    f"A {done} value was edited in place afterwards, and shows the edit, as a tensor would:\n\n"
                    f"{with_code(line)}\n{with_code(where)}\n\nWrite `.clone().{do}()` for it as it was.",
                    line,
                )
                return


def _drop_unused_constants(graph: Graph) -> None:
    kept: list[Tensor | bytes | g.KeptTensor] = []
    for node in graph.fx.find_nodes(op="call_function", target=g.constant):
        kept.append(graph.constants[node.args[0]])
        node.args = (len(kept) - 1,)
    graph.constants = kept


def _meets(site: Site, trace: int, invoke: int, step: int) -> bool:
    """Whether a site is of the same rows and the same step."""
    return (site.trace, site.step) == (trace, step) and (site.invoke == invoke or EVERYONE in (site.invoke, invoke))


def _same_content(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and tensors.data(one) == tensors.data(other)


def _gathers(index: Any) -> bool:
    """Whether indexing with it collects elements into a new tensor, instead of giving a view."""
    parts = index if isinstance(index, tuple) else (index,)
    for part in parts:
        if isinstance(part, (bool, list)):
            return True
        if isinstance(part, torch.fx.Node):
            fake = fake_of(part)
            # One integer is as good as a number; only a mask or a list of positions is not.
            if not isinstance(fake, Tensor) or fake.ndim or fake.dtype is torch.bool:
                return True
    return False


def _tensors(argument: Any) -> Any:
    """The same argument, with tensors in the place of values."""
    match argument:
        case Value():
            return argument.value
        case tuple():
            items = [_tensors(each) for each in argument]
            return tuple(items)
        case list():
            return [_tensors(each) for each in argument]
        case dict():
            return {name: _tensors(each) for name, each in argument.items()}
        case slice():
            return slice(_tensors(argument.start), _tensors(argument.stop), _tensors(argument.step))
    return argument
