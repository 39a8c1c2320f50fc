"""The graph of a request: a `torch.fx.Graph` and the traces it belongs to, to and from messages.

Nodes are calls of the functions below and of the operations in `patchwire.ops`; an edge is a value. There is no memory
in a graph: an in-place edit is an `edit` node, whose value is the edited copy, and what a site holds after all edits is
what its one `write` node says. So a graph may be evaluated in any order that respects its edges.

A decoded graph is structurally sound (every reference is to an earlier node, every operation is on the list, every
argument is plain data); whether its sites exist and its shapes fit is for `patchwire.checking` to say.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.fx
from torch import Tensor

from patchwire import ops, tensors
from patchwire.errors import GraphError, InputError, LimitError, OperationError, PatchwireError, SourceLine, with_code
from patchwire.sites import Address, path_from_proto, path_to_proto
from patchwire.v1 import graph_pb2 as pb
from patchwire.version import VERSION

INLINE_BYTES = 64 * 1024
"""Constants up to this size travel inside the graph; larger ones are uploaded once and referred to by hash."""

MAX_ITEMS = 1 << 12
"""How long a list or tuple among the arguments of an operation may be."""

_LONG_LISTS = "Put long lists of numbers into a tensor: `torch.tensor(...)`."
_MAX_DEPTH = 16
_MAX_TEXT = 256
LONGEST_TEXT = _MAX_TEXT
"""How many characters a text among the arguments of an operation or a log may have."""
_MAX_NAME = 1024
_MAX_ARGUMENTS = 1 << 18
_MAX_ARGUMENTS_OF_NODE = 16


def read(site: Site) -> Tensor:
    """Take the value of a site."""
    raise AssertionError("a site has a value only inside a pass")


def write(site: Site, value: Tensor) -> None:
    """Replace the value of a site."""
    raise AssertionError("a site has a value only inside a pass")


def apply(
    trace: int, module: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> Any:
    """Apply a module of the model, with some of its weights replaced."""
    raise AssertionError("modules are on the worker")


def parameter(trace: int, path: str) -> Tensor:
    """A parameter of the model."""
    raise AssertionError("parameters are on the worker")


def assign(trace: int, path: str, value: Tensor) -> None:
    """Have a trace run with another weight."""
    raise AssertionError("weights are on the worker")


def constant(index: int) -> Tensor:
    """A tensor that came with the request."""
    raise AssertionError("constants are looked up by whoever evaluates the graph")


def grad(loss: Tensor, values: Sequence[Tensor], weights: Tensor | None) -> tuple[Tensor, ...]:
    """The gradients of a value with respect to others."""
    raise AssertionError("only who ran the model knows how a value came about")


def generated(trace: int, invoke: int) -> Tensor:
    """The token ids that a generation ends with."""
    raise AssertionError("tokens are generated on the worker")


def token_ids(trace: int, invoke: int) -> Tensor:
    """The token ids of an invoke."""
    raise AssertionError("they are looked up by whoever evaluates the graph")


def loop(trace: int, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """Run a loop."""
    raise AssertionError("loops run on the worker")


def outside(index: int) -> Tensor:
    """A value from outside of a loop, in its body."""
    raise AssertionError("the loop knows it")


def carry(index: int, value: Tensor) -> None:
    """Say what a value from outside of a loop is in the next iteration."""
    raise AssertionError("the loop takes it")


def keep(value: Tensor, seconds: float) -> None:
    """Keep a value on the server beyond the request."""
    raise AssertionError("values are kept by the worker")


def save(value: Tensor, dtype: torch.dtype | None) -> None:
    """Send a value back."""
    raise AssertionError("saving is done by whoever evaluates the graph")


def log(parts: tuple[str | Tensor, ...]) -> None:
    """Send back what values look like."""
    raise AssertionError("logging is done by whoever evaluates the graph")


Change = tuple[str, tuple[Any, ...], Mapping[str, Any]]
"""An operation's name and its arguments, the first left out."""


def _evaluate(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return ops.OPERATIONS[name].function(*args, **kwargs)


def edit(
    base: Any,
    views: Sequence[Change],
    change: Change,
    evaluate: Callable[[str, tuple[Any, ...], Mapping[str, Any]], Any] = _evaluate,
) -> Any:
    """A copy of `base` in which the place that `views` lead to is changed in place by `change`.

    This is PyTorch's own view semantics: the copy is made, the views are taken of it one after the other, and the
    operation runs on the last. Tuples on the way are copied too.

    Args:
        base: The value that is copied.
        views: The way to the place.
        change: What happens there.
        evaluate: Evaluates each of these operations, given by its name.

    Raises:
        ValueError: a step on the way copied its argument, so that the change would be lost.
    """
    if isinstance(base, (tuple, list)):
        (_, (index,), _), *rest = views
        items = list(base)
        items[index] = edit(items[index], rest, change, evaluate)
        return type(base)(items)
    copy = base.clone()
    place = copy
    for name, args, kwargs in views:
        place = evaluate(name, (place, *args), kwargs)
        if isinstance(place, Tensor) and not same_storage(place, copy):
            raise ValueError(f"the edit would be lost: {name} made a copy")
    if not isinstance(place, Tensor):
        raise ValueError("it is a tuple: change one of its items")
    name, args, kwargs = change
    evaluate(name, (place, *args), kwargs)
    return copy


def same_storage(one: Any, other: Any) -> bool:
    """Whether two tensors share memory, or would if they had any."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


SINKS = (save, log, keep, carry)
"""What asks for a value and has none itself."""

_WITH_EFFECT = frozenset((write, assign, loop, *SINKS))


@dataclass(frozen=True)
class Site:
    """One tensor of one invoke of one trace."""

    trace: int
    """The trace, as a position in the graph's traces."""
    invoke: int
    """The invoke, as a position in the trace's invokes."""
    address: Address
    """The tensor."""
    step: int = 0
    """The step of a generation: 0 is the pass over the prompt, n the pass over the n-th new token."""
    open: bool = False
    """Whether the generation may end before that step; what depends on the site is then left out."""

    def __str__(self) -> str:
        return self.address.spelled + (f" at step {self.step}" if self.step else "")


@dataclass(frozen=True)
class Invoke:
    """Rows that have their own inputs: the token ids of each."""

    rows: tuple[Sequence[int], ...]
    """Those of the first iteration, if they change."""
    batches: tuple[tuple[Sequence[int], ...], ...] = ()
    """In the body of a loop over batches: the rows of each iteration."""

    def at(self, iteration: int) -> Invoke:
        """The rows of one iteration, and all that there are."""
        return replace(self, rows=self.batches[iteration]) if self.batches else self

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row has."""
        return [len(row) for row in self.rows]


@dataclass(frozen=True)
class Generation:
    """How tokens are generated."""

    max_new_tokens: int
    """How many tokens at most."""
    min_new_tokens: int = 0
    """No token that ends the text before so many."""
    do_sample: bool = False
    """Whether tokens are drawn at random; the likeliest is taken otherwise."""
    temperature: float = 1.0
    """Divides the logits before they are drawn from."""
    top_k: int = 0
    """Only so many of the likeliest tokens are drawn from; 0 for all."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities add up to this are drawn from."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that occurred already; 1 for none."""
    seed: int = 0
    """Row i is drawn with a generator seeded with this plus i."""

    def check(self) -> None:
        """Refuse options that mean nothing.

        Raises:
            InputError: one of them.
        """
        counts = ("max_new_tokens", "min_new_tokens", "top_k", "seed")
        numbers = ("temperature", "top_p", "repetition_penalty")
        for name in (*counts, *numbers):
            value, kind = getattr(self, name), int if name in counts else (int, float)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise InputError(f"A generation cannot have {name} {value!r}.", hint=f"`{name}` is a number.")
        allowed = {
            "max_new_tokens": ("1 or more", 0 < self.max_new_tokens < 2**32),
            "min_new_tokens": ("from 0 to `max_new_tokens`", 0 <= self.min_new_tokens <= self.max_new_tokens),
            "temperature": ("more than 0", 0 < self.temperature < math.inf),
            "top_k": ("0 for all tokens, or how many", 0 <= self.top_k < 2**32),
            "top_p": ("more than 0 and at most 1", 0 < self.top_p <= 1),
            "repetition_penalty": ("more than 0", 0 < self.repetition_penalty < math.inf),
            "seed": ("from 0 to 2**62", 0 <= self.seed < 2**62),
        }
        for name, (range_, is_allowed) in allowed.items():
            if not is_allowed:
                raise InputError(
                    f"A generation cannot have {name} {getattr(self, name)}.", hint=f"`{name}` is {range_}."
                )


@dataclass
class Trace:
    """One call of a model: a forward pass, or a generation."""

    model: str
    """The model's name on the server."""
    invokes: list[Invoke] = field(default_factory=list)
    """Its rows."""
    generation: Generation | None = None
    """How it generates tokens, if it does."""
    loop: Loop | None = None
    """What it repeats, if it is no call but a loop of them."""
    exact: bool = False
    """Whether each invoke runs in a pass of its own."""


@dataclass
class Loop:
    """A graph that runs many times, one iteration after the other."""

    body: Graph
    """What runs in each iteration: its `outside` nodes are values from outside, its `carry` nodes change them."""
    count: int
    """How many iterations."""

    @property
    def extremes(self) -> list[int]:
        """Some iterations, of which one has the most rows, one the fewest, one the longest, and so on: what fits them
        and does not depend on which of them it is fits all.
        """
        changing = [each.batches for trace in self.body.traces for each in trace.invokes if each.batches]
        found = {0}
        for batches in changing:
            lengths = [[len(row) for row in rows] for rows in batches]
            for measure in (len, max, lambda each: len(set(each)) > 1):
                values = [measure(each) for each in lengths]
                found |= {values.index(min(values)), values.index(max(values))}
        return sorted(found)

    @property
    def carries(self) -> list[torch.fx.Node]:
        """What changes from iteration to iteration, in the order of the loop's results."""
        return list(self.body.fx.find_nodes(op="call_function", target=carry))


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that an earlier request kept on the server."""

    handle: bytes
    """What the server calls it."""
    fake: Tensor | None = None
    """What it looks like, where that is known."""


@dataclass
class Graph:
    """Everything one request asks for."""

    traces: list[Trace] = field(default_factory=list)
    """The calls of models."""
    fx: torch.fx.Graph = field(default_factory=torch.fx.Graph)
    """The operations. A node's `meta["line"]` is the line of the user's program that it came from."""
    constants: list[Tensor | bytes | KeptTensor] = field(default_factory=list)
    """Tensors that come with the request; the SHA-256 of those that are uploaded apart; those that the server kept."""
    outside: list[Tensor | None] = field(default_factory=list)
    """In the body of a loop: its values from outside, or what is known of them."""

    @property
    def nodes(self) -> list[torch.fx.Node]:
        """The operations, in order."""
        return list(self.fx.nodes)

    def at(self, iteration: int) -> Graph:
        """The body of a loop in one iteration."""
        traces = [replace(each, invokes=[invoke.at(iteration) for invoke in each.invokes]) for each in self.traces]
        return replace(self, traces=traces)

    @property
    def loops(self) -> dict[int, Loop]:
        """Its loops, by their positions in its traces."""
        return {index: trace.loop for index, trace in enumerate(self.traces) if trace.loop is not None}


def add(
    graph: torch.fx.Graph, target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> torch.fx.Node:
    """A new node at a graph's end.

    It is given its arguments once it is there: `call_function` would look through them for symbolic numbers, which
    takes longer than all the rest. `Node.__setattr__` would list it anew by its target, which stays as it is.
    """
    node = graph.call_function(target, name=target.__name__)
    torch.fx.Node.args.__set__(node, args)  # type: ignore[attr-defined]
    if kwargs:
        node.kwargs = dict(kwargs)
    return node


def drop_unneeded(graph: torch.fx.Graph) -> None:
    """Take out every node whose value nobody needs, unless it is there for what it does."""
    for node in reversed(graph.nodes):
        if not node.users and node.target not in _WITH_EFFECT:
            graph.erase_node(node)


def parts(graph: Graph) -> list[Graph]:
    """A graph, and the bodies of its loops."""
    return [graph, *(each.body for each in graph.loops.values())]


def line_of(node: torch.fx.Node) -> SourceLine | None:
    """The line of the user's program that a node came from."""
    line: SourceLine | None = node.meta.get("line")
    return line


def operation_of(node: torch.fx.Node) -> ops.Operation | None:
    """The operation of the list that a node is, if it is one."""
    operation: ops.Operation | None = node.meta.get("operation")
    return operation


# --- to messages ------------------------------------------------------------------------------------------------------


class _Encoder:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.positions: dict[torch.fx.Node, int] = {}
        self.lines: dict[SourceLine, int] = {}

    def message(self) -> pb.Graph:
        message = pb.Graph(
            traces=[
                pb.Trace(
                    model=trace.model,
                    invokes=[_invoke_to_proto(each) for each in trace.invokes],
                    generation=pb.Generation(**vars(trace.generation)) if trace.generation else None,
                    loop=pb.Loop(body=graph_to_proto(trace.loop.body), count=trace.loop.count) if trace.loop else None,
                    exact=trace.exact,
                )
                for trace in self.graph.traces
            ],
            constants=[_constant_to_proto(each) for each in self.graph.constants],
        )
        # Line 0 stands for "unknown", so that a node without a line needs no field of its own.
        message.lines.add()
        for node in self.graph.fx.nodes:
            self.node(node, message.nodes.add())
        for line in self.lines:
            text = with_code(line)
            message.lines.add(file=text.file, line=text.line, code=text.code[:_MAX_TEXT])
        return message

    def node(self, node: torch.fx.Node, out: pb.Node) -> None:
        args = node.args
        match node.target:
            case target if target is read:
                self.site(args[0], out.read.site)
            case target if target is write:
                self.site(args[0], out.write.site)
                out.write.value = self.position(args[1])
            case target if target is edit:
                out.edit.base = self.position(args[0])
                for view in args[1]:  # type: ignore[union-attr]
                    self.change(view, out.edit.views.add())
                self.change(args[2], out.edit.change)
            case target if target is apply:
                out.apply.trace, out.apply.module = args[0], args[1]  # type: ignore[assignment]
                self.arguments(args[2], args[3], out.apply)
                for path, weight in args[4].items():  # type: ignore[union-attr]
                    out.apply.weights[path] = self.position(weight)
            case target if target is assign:
                out.assign.trace, out.assign.path = args[:2]  # type: ignore[assignment]
                out.assign.value = self.position(args[2])
            case target if target is constant:
                out.constant = args[0]  # type: ignore[assignment]
            case target if target is parameter:
                out.parameter.trace, out.parameter.path = args  # type: ignore[assignment]
            case target if target is grad:
                out.grad.loss = self.position(args[0])
                out.grad.values.extend(self.position(each) for each in args[1])  # type: ignore[union-attr]
                if args[2] is not None:
                    out.grad.weights = self.position(args[2])
            case target if target is generated:
                out.generated.trace, out.generated.invoke = args  # type: ignore[assignment]
            case target if target is token_ids:
                out.token_ids.trace, out.token_ids.invoke = args  # type: ignore[assignment]
            case target if target is loop:
                out.loop.trace = args[0]  # type: ignore[assignment]
                out.loop.inputs.extend(self.position(each) for each in args[1])  # type: ignore[union-attr]
            case target if target is outside:
                out.outside = args[0]  # type: ignore[assignment]
            case target if target is carry:
                out.carry.outside, out.carry.value = args[0], self.position(args[1])  # type: ignore[assignment]
            case target if target is keep:
                out.keep.value, out.keep.seconds = self.position(args[0]), args[1]  # type: ignore[assignment]
            case target if target is save:
                out.save.value = self.position(args[0])
                if isinstance(args[1], torch.dtype):
                    out.save.dtype = tensors.dtype_to_proto(args[1])
            case target if target is log:
                for each in args[0]:  # type: ignore[union-attr]
                    self.argument(each, out.log.parts.add())
            case _:
                operation = operation_of(node)
                assert operation is not None, node.format_node()
                out.call.op = operation.name
                self.arguments(args, node.kwargs, out.call)
        line = line_of(node)
        if line is not None:
            out.line = self.lines.setdefault(line, len(self.lines) + 1)
        self.positions[node] = len(self.positions)

    def position(self, node: Any) -> int:
        return self.positions[node]

    def site(self, site: Any, out: pb.Site) -> None:
        out.trace, out.invoke, out.address = site.trace, site.invoke, site.address.name
        if site.address.path:
            out.path.extend(path_to_proto(site.address.path))
        out.step, out.open = site.step, site.open

    def change(self, change: Any, out: pb.Call) -> None:
        out.op, args, kwargs = change
        self.arguments(args, kwargs, out)

    def arguments(self, args: Any, kwargs: Any, out: pb.Call | pb.Apply) -> None:
        for each in args:
            self.argument(each, out.args.add())
        for name, each in kwargs.items():
            self.argument(each, out.kwargs[name])

    def argument(self, value: Any, out: pb.Argument) -> None:
        match value:
            case None:
                out.none.SetInParent()
            case bool():
                out.boolean = value
            case int():
                if not -(2**63) <= value < 2**63:
                    raise GraphError(f"{value} does not fit into 64 bits.")
                out.integer = value
            case float():
                out.real = value
            case str():
                out.text = value
            case torch.fx.Node():
                out.node = self.position(value)
            case slice():
                self.argument(value.start, out.slice.start)
                self.argument(value.stop, out.slice.stop)
                self.argument(value.step, out.slice.step)
            case _ if value is Ellipsis:
                out.ellipsis.SetInParent()
            case list():
                out.list.SetInParent()
                for each in value:
                    self.argument(each, out.list.items.add())
            case tuple():
                out.tuple.SetInParent()
                for each in value:
                    self.argument(each, out.tuple.items.add())
            case torch.dtype():
                out.dtype = tensors.dtype_to_proto(value)
            case _:
                raise GraphError(
                    f"A {type(value).__name__} cannot be an argument in a graph.",
                    hint="Numbers, strings, dtypes, slices, tensors, and lists and tuples of them can.",
                )


def _rows_to_proto(rows: Sequence[Sequence[int]]) -> list[pb.TokenRow]:
    return [pb.TokenRow(ids=row) for row in rows]


def _invoke_to_proto(invoke: Invoke) -> pb.Invoke:
    if invoke.batches:
        return pb.Invoke(batches=[pb.Batch(rows=_rows_to_proto(each)) for each in invoke.batches])
    return pb.Invoke(rows=_rows_to_proto(invoke.rows))


def _constant_to_proto(constant: Tensor | bytes | KeptTensor) -> pb.Constant:
    match constant:
        case KeptTensor():
            return pb.Constant(kept=constant.handle)
        case bytes():
            return pb.Constant(uploaded=constant)
    return pb.Constant(inline=tensors.to_proto(constant))


def graph_to_proto(graph: Graph) -> pb.Graph:
    """The message of a graph.

    Raises:
        GraphError: an argument is not plain data.
    """
    return _Encoder(graph).message()


# --- from messages ----------------------------------------------------------------------------------------------------


def _kind(change: Change) -> ops.Kind:
    return ops.OPERATIONS[change[0]].kind


def too_long(items: Sized) -> LimitError:
    """The error for a list of arguments that is too long."""
    return LimitError(f"A list of {len(items):,} arguments is too long; at most {MAX_ITEMS:,} fit.", hint=_LONG_LISTS)


_address = lru_cache(1 << 12)(Address)


class _Decoder:
    """Builds a graph from a message that may be hostile: every index, name and length is checked before it is used."""

    def __init__(self, message: pb.Graph, constant_bytes: int | None, *, body: bool = False) -> None:
        self.message = message
        self.constant_bytes = constant_bytes
        self.body = body
        self.graph = Graph()
        self.nodes: list[torch.fx.Node] = []
        self.lines = [
            # Never without a text: `with_code` would look for it in a file of this machine.
            SourceLine(each.file[:1024], each.line, each.code[:_MAX_TEXT] or "(not sent)") if each.file else None
            for each in message.lines
        ]
        self.line: SourceLine | None = None
        self.run: set[int] = set()  # the loops that nodes run; in a body, the inputs that they carry
        # In proportion to the nodes, and as many more for a few long lists.
        self.arguments_left = _MAX_ARGUMENTS + _MAX_ARGUMENTS_OF_NODE * len(message.nodes)

    def error(self, message: str, kind: type[PatchwireError] = GraphError, hint: str = "") -> PatchwireError:
        return kind(message, hint=hint, lines=[self.line] if self.line else [])

    def decode(self) -> Graph:
        for trace in self.message.traces:
            invokes = [_invoke_from_proto(each) for each in trace.invokes]
            self.graph.traces.append(Trace(trace.model, invokes, _generation(trace), self.loop(trace), trace.exact))
        for each in self.message.constants:
            match each.WhichOneof("source"):
                case "inline":
                    self.graph.constants.append(tensors.from_proto(each.inline, self.constant_bytes))
                case "uploaded":
                    self.graph.constants.append(each.uploaded)
                case "kept":
                    self.graph.constants.append(KeptTensor(each.kept))
                case _:
                    raise GraphError("A constant has no content.")
        for message in self.message.nodes:
            self.line = self.lines[message.line] if message.line < len(self.lines) else None
            node = self.node(message)
            node.meta["line"] = self.line
            self.nodes.append(node)
        return self.graph

    def loop(self, trace: pb.Trace) -> Loop | None:
        if not trace.HasField("loop"):
            return None
        if self.body:
            raise GraphError("A loop cannot stand in a loop.")
        if trace.invokes or trace.HasField("generation"):
            raise GraphError("A loop has no rows of its own.")
        body = _Decoder(trace.loop.body, self.constant_bytes, body=True).decode()
        batches = {len(each.batches) for inner in body.traces for each in inner.invokes if each.batches}
        if not trace.loop.count or batches - {trace.loop.count}:
            raise GraphError("A loop has as many iterations as batches, and one at least.")
        return Loop(body, trace.loop.count)

    def node(self, message: pb.Node) -> torch.fx.Node:
        create = partial(add, self.graph.fx)
        match message.WhichOneof("body"):
            case "read":
                return create(read, (self.site(message.read.site),))
            case "write":
                value = self.value(message.write.value)
                return create(write, (self.site(message.write.site), value))
            case "call":
                name, args, kwargs = self.change(message.call)
                operation = ops.OPERATIONS[name]
                if operation.kind == "inplace":
                    raise self.error(f"`{name}` changes its argument: it belongs into an edit.")
                node = create(operation.function, args, kwargs)
                node.meta["operation"] = operation
                return node
            case "edit":
                self.count(message.edit.views)
                views = tuple(self.change(each) for each in message.edit.views)
                change = self.change(message.edit.change)
                if any(_kind(view) != "view" for view in views) or _kind(change) != "inplace":
                    raise self.error("An edit is views and then one in-place operation.")
                return create(edit, (self.value(message.edit.base), views, change))
            case "apply":
                self.trace(message.apply.trace)
                self.name(message.apply.module)
                args, kwargs = self.arguments(message.apply)
                self.count(message.apply.weights)
                for path in message.apply.weights:
                    self.name(path)
                changed = {path: self.value(each) for path, each in message.apply.weights.items()}
                return create(apply, (message.apply.trace, message.apply.module, args, kwargs, changed))
            case "assign":
                self.trace(message.assign.trace)
                self.name(message.assign.path)
                value = self.value(message.assign.value)
                return create(assign, (message.assign.trace, message.assign.path, value))
            case "constant":
                if message.constant >= len(self.graph.constants):
                    raise self.error(f"There is no constant {message.constant}.")
                return create(constant, (message.constant,))
            case "parameter":
                self.trace(message.parameter.trace)
                self.name(message.parameter.path)
                return create(parameter, (message.parameter.trace, message.parameter.path))
            case "grad":
                self.count(message.grad.values)
                if not message.grad.values:
                    raise self.error("A gradient is with respect to something.")
                values = tuple(self.value(each) for each in message.grad.values)
                weights = self.value(message.grad.weights) if message.grad.HasField("weights") else None
                return create(grad, (self.value(message.grad.loss), values, weights))
            case "generated":
                self.invoke(message.generated)
                return create(generated, (message.generated.trace, message.generated.invoke))
            case "token_ids":
                self.invoke(message.token_ids)
                return create(token_ids, (message.token_ids.trace, message.token_ids.invoke))
            case "loop":
                trace = self.trace(message.loop.trace)
                if trace.loop is None or message.loop.trace in self.run:
                    raise self.error(f"There is no loop {message.loop.trace}, or it runs already.")
                self.run.add(message.loop.trace)
                self.count(message.loop.inputs)
                inputs = tuple(self.value(each) for each in message.loop.inputs)
                for each in trace.loop.body.fx.nodes:
                    if each.target in (outside, carry) and each.args[0] >= len(inputs):
                        raise self.error(f"There is no input {each.args[0]} of the loop.")
                return create(loop, (message.loop.trace, inputs))
            case "outside" if self.body:
                return create(outside, (message.outside,))
            case "carry" if self.body:
                if message.carry.outside in self.run:
                    raise self.error(
                        f"Input {message.carry.outside} is carried twice.",
                        hint="Carry one value to each input; what it comes to may be put together in the body.",
                    )
                self.run.add(message.carry.outside)
                return create(carry, (message.carry.outside, self.value(message.carry.value)))
            case "outside" | "carry" as kind:
                raise self.error(f"`{kind}` belongs into the body of a loop.")
            case "keep" if self.body:
                raise self.error("What is kept is the result of a loop, not a value inside it.")
            case "keep":
                return create(keep, (self.value(message.keep.value), message.keep.seconds))
            case "save":
                dtype = tensors.dtype_from_proto(message.save.dtype) if message.save.dtype else None
                return create(save, (self.value(message.save.value), dtype))
            case "log":
                self.count(message.log.parts)
                return create(log, (tuple(self.argument(each) for each in message.log.parts),))
            case _:
                raise self.error(f"Node {len(self.nodes)} is of a kind that this version does not know.")

    def trace(self, index: int) -> Trace:
        if index >= len(self.graph.traces):
            raise self.error(f"There is no trace {index}.")
        return self.graph.traces[index]

    def name(self, name: str) -> None:
        if len(name) > _MAX_NAME:
            raise self.error("A name is too long.")

    def value(self, index: int) -> torch.fx.Node:
        if index >= len(self.nodes):
            raise self.error(f"Node {len(self.nodes)} refers to node {index}, which is not before it.")
        node = self.nodes[index]
        if node.target in (write, assign, *SINKS):
            raise self.error(f"Node {index} has no value.")
        return node

    def invoke(self, message: pb.Site | pb.Generated | pb.TokenIds) -> Trace:
        trace = self.trace(message.trace)
        if message.invoke >= len(trace.invokes):
            raise self.error(f"Trace {message.trace} has no invoke {message.invoke}.")
        return trace

    def site(self, message: pb.Site) -> Site:
        trace = self.invoke(message)
        if message.step >= (trace.generation.max_new_tokens if trace.generation else 1):
            raise self.error(f"Trace {message.trace} has no step {message.step}.")
        self.name(message.address)
        return Site(message.trace, message.invoke, self.address(message), message.step, message.open)

    def address(self, message: pb.Site) -> Address:
        if not message.path:
            return _address(message.address)
        for item in message.path:
            self.name(item.key)
        if len(message.path) > _MAX_DEPTH:
            raise self.error("The path of a site is too long.")
        return Address(message.address, path_from_proto(message.path))

    def change(self, message: pb.Call) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        operation = ops.OPERATIONS.get(message.op)
        if operation is None:
            name = message.op[:_MAX_TEXT]
            raise self.error(f"`{name}` is not an operation of this server (version {VERSION}).", OperationError)
        args, kwargs = self.arguments(message)
        if refused := ops.forbidden_argument(operation, args, kwargs):
            raise self.error(f"`{operation.name}` takes no `{refused}` in a graph.", OperationError)
        return operation.name, args, kwargs

    def count(self, items: Sized) -> None:
        self.arguments_left -= len(items)
        if len(items) > MAX_ITEMS:
            error = too_long(items)
            raise self.error(error.message, LimitError, error.hint)
        if self.arguments_left < 0:
            raise self.error("The graph has too many arguments.", LimitError, _LONG_LISTS)

    def arguments(self, message: pb.Call | pb.Apply) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.count(message.args)
        self.count(message.kwargs)
        args = tuple([self.argument(each) for each in message.args])
        return args, {name: self.argument(each) for name, each in message.kwargs.items()} if message.kwargs else {}

    def argument(self, message: pb.Argument, depth: int = 0) -> Any:
        if depth > _MAX_DEPTH:
            raise self.error("An argument is nested too deeply.")
        match message.WhichOneof("kind"):
            case "node":
                return self.value(message.node)
            case "integer":
                return message.integer
            case "list" | "tuple" as kind:
                items = getattr(message, kind).items
                self.count(items)
                values = [self.argument(each, depth + 1) for each in items]
                return values if kind == "list" else tuple(values)
            case "slice":
                bounds = message.slice
                return slice(
                    self.argument(bounds.start, depth + 1) if bounds.HasField("start") else None,
                    self.argument(bounds.stop, depth + 1) if bounds.HasField("stop") else None,
                    self.argument(bounds.step, depth + 1) if bounds.HasField("step") else None,
                )
            case "none":
                return None
            case "boolean":
                return message.boolean
            case "real":
                return message.real
            case "text":
                if len(message.text) > _MAX_TEXT:
                    raise self.error("A string argument is too long.")
                return message.text
            case "ellipsis":
                return Ellipsis
            case "dtype":
                return tensors.dtype_from_proto(message.dtype)
            case _:
                raise self.error("An argument is of a kind that this version does not know.")


def _rows_from_proto(rows: Iterable[pb.TokenRow]) -> tuple[Sequence[int], ...]:
    return tuple(array("q", row.ids) for row in rows)


def _invoke_from_proto(message: pb.Invoke) -> Invoke:
    if not message.batches:
        return Invoke(tuple(tuple(row.ids) for row in message.rows))
    batches = tuple(_rows_from_proto(each.rows) for each in message.batches)
    return Invoke(batches[0], batches)


def _generation(message: pb.Trace) -> Generation | None:
    if not message.HasField("generation"):
        return None
    return Generation(**{each.name: getattr(message.generation, each.name) for each in fields(Generation)})


def graph_from_proto(message: pb.Graph, *, constant_bytes: int | None = None) -> Graph:
    """The graph of a message, structurally sound.

    Args:
        message: What came over the wire.
        constant_bytes: How large a constant inside the message may be.

    Raises:
        GraphError: the message does not follow the protocol.
        OperationError: an operation is not on the list.
        LimitError: a constant is too large, or there are too many arguments.
    """
    return _Decoder(message, constant_bytes).decode()
