"""Loops: a block that is recorded once and runs many times on the server, with values that change from one iteration
to the next.

The body is a graph of its own, with a recorder of its own. A value from outside that is used in it becomes one of the
loop's inputs; one that is carried is an input too, and the body says what it is in the next iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
import torch.fx
from torch import Tensor

from patchwire import graph as g
from patchwire import ops
from patchwire.checking import Checker, behind, describe, fake_of
from patchwire.errors import GraphError, PatchwireError, ShapeError, SourceLine, here, user_line, with_code
from patchwire.kept import Kept
from patchwire.optim import Optimiser
from patchwire.proxy import Memory, Value, Values
from patchwire.recording import Recorder

if TYPE_CHECKING:
    from patchwire.connection import Connection
    from patchwire.results import Results
    from patchwire.running import Request

Rows = tuple[Sequence[int], ...]

_FROM_OUTSIDE = "This value comes from outside of the loop, and each iteration would start anew from it."


class BodyRecorder(Recorder):
    """Records the body of a loop, as part of the recording around it."""

    def __init__(self, parent: Recorder, count: int) -> None:
        """
        Args:
            parent: Records what is around the loop.
            count: How many iterations there are.
        """
        super().__init__(parent.checker.catalogue, value_bytes=parent.checker.value_bytes)
        self.parent: Recorder = parent
        self.loop_of_it = g.Loop(self.request, count)
        self.inputs: list[torch.fx.Node] = []
        self.iterations = 0
        self._captured: dict[Memory, Memory] = {}
        self._inside_of: dict[Value, Value] = {}
        self._extremes: tuple[int, list[dict[torch.fx.Node, Any]]] = (-1, [])

    # --- values from outside ------------------------------------------------------------------------------------------

    def take(self, node: torch.fx.Node) -> torch.fx.Node:
        """The node of the body for a node from outside."""
        self.inputs.append(node)
        fake = fake_of(node)
        self.request.outside.append(fake if isinstance(fake, Tensor) else None)
        return self._create(g.outside, (len(self.inputs) - 1,))

    def _inside(self, value: Value) -> Value:
        """What a value from outside is in the body."""
        memory = value.memory
        if memory not in self._captured:
            self._captured[memory] = Memory(self.take(memory.node), constant=_FROM_OUTSIDE)
        if value not in self._inside_of:  # one for each, so that there are gradients with respect to it
            mine = Value(self, self._captured[memory].node, self._captured[memory], value.views)
            mine.node = self.derived(mine)
            self._inside_of[value] = mine
        return self._inside_of[value]

    def argument(self, value: Any) -> Any:
        """What stands in the body for an argument.

        Raises:
            GraphError: it cannot, or it is a length that differs between batches.
        """
        return int(value) if isinstance(value, Varying) else super().argument(value)

    def _value(self, value: Value) -> torch.fx.Node:
        if value.recorder is self.parent and not value.ready:
            return self._inside(value).node
        return super()._value(value)

    def _mine(self, argument: Any) -> Any:
        match argument:
            case Value() if argument.recorder is self.parent and not argument.ready:
                return self._inside(argument)
            case tuple() if type(argument) in (tuple, Values):
                return tuple(self._mine(each) for each in argument)
            case list():
                return [self._mine(each) for each in argument]
            case slice():
                return slice(self._mine(argument.start), self._mine(argument.stop), self._mine(argument.step))
        return argument

    def call(
        self,
        operation: ops.Operation,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        function: Callable[..., Any] | None = None,
    ) -> Any:
        """Record an operation in the body."""
        self._check_not_after_it()
        if self.open:
            args, kwargs = self._mine(args), {name: self._mine(each) for name, each in kwargs.items()}
        return super().call(operation, args, kwargs, function)

    def save(self, value: Value, dtype: torch.dtype | None) -> None:
        """Ask for a value of every iteration."""
        self._check_not_after_it()
        super().save(value, dtype)

    def _check_not_after_it(self) -> None:
        if not self.open and self.parent.open:
            raise GraphError(
                "This value belongs to the body of a loop, which has ended.",
                hint="Carry it: `x = loop.carry(start)`, `loop.update(x, value)`, and after the loop `loop.result(x)`.",
                lines=here(),
            )

    def assign(self, site: g.Site, value: Any) -> None:
        """Make a value the value of a site, in every iteration."""
        super().assign(site, self._mine(value))

    def assign_parameter(self, trace: int, path: str, value: Any) -> None:
        """Have a trace run with another weight, in every iteration."""
        super().assign_parameter(trace, path, self._mine(value))

    def of_kept(self, kept: Kept) -> Value:
        """The value that something kept is in the body."""
        if kept.source.recorder is self.parent:
            return self._inside(kept.source)
        value = super().of_kept(kept)
        value.memory.constant = _FROM_OUTSIDE
        return value

    def grad(self, loss: Value, weights: Any, values: Sequence[Value | Kept | Tensor]) -> list[Value]:
        """The gradients of a value with respect to others, within one iteration."""
        return super().grad(self._mine(loss), self._mine(weights), [self._mine(each) for each in values])

    def keep(self, value: Value, seconds: float) -> Kept:
        """Refused: there would be one of each iteration."""
        hint = "Carry it, and after the loop write `loop.result(x).keep()`."
        raise GraphError("A value cannot be kept from inside a loop.", hint=hint, lines=here())

    # --- what depends on the batch ------------------------------------------------------------------------------------

    def shape(self, value: Value) -> torch.Size:
        """The lengths of a value's dimensions; those that differ between batches cannot be used as numbers."""
        if value.ready or len(self._other_fakes()) == 0:
            return value.fake.shape
        return common_shape([value.fake, *self._all_fakes(value.node)], Varying)

    def _all_fakes(self, node: torch.fx.Node) -> list[Any]:
        """What a node's value looks like in those iterations that differ most."""
        return [fake_of(node), *(each[node] for each in self._other_fakes())]

    def _other_fakes(self) -> list[dict[torch.fx.Node, Any]]:
        """The fakes of all nodes, in those iterations that differ most from the first.

        Raises:
            PatchwireError: the body does not fit one of them.
        """
        nodes = list(self.graph.nodes)
        if self._extremes[0] != len(nodes):
            found = []
            for iteration in self.loop_of_it.extremes[1:]:
                copy = torch.fx.Graph()
                copies: dict[torch.fx.Node, torch.fx.Node] = {}
                for node in nodes:
                    copies[node] = copy.node_copy(node, copies.__getitem__)
                graph = replace(self.request.at(iteration), fx=copy)
                Checker(graph, self.checker.catalogue, value_bytes=self.checker.value_bytes).all()
                found.append({node: fake_of(each) for node, each in copies.items()})
            self._extremes = len(nodes), found
        return self._extremes[1]

    def check_batches(self) -> None:
        """Check that the body fits all batches.

        Raises:
            PatchwireError: it does not, or would mean something else for another batch.
        """
        for others in self._other_fakes():
            for node, other in others.items():
                fake = fake_of(node)
                if isinstance(fake, tuple) and isinstance(other, tuple) and len(fake) != len(other):
                    raise ShapeError(
                        f"This makes {len(fake)} values of one batch and {len(other)} of another.",
                        hint="Compute with the whole value; what is recorded is the same for all batches.",
                        lines=_lines(g.line_of(node)),
                    )

    def check_gradients(self) -> None:
        """Check that no gradient would miss a way through the values from outside.

        Raises:
            GraphError: one would.
        """
        carried = {each.args[0] for each in self.loop_of_it.carries}
        taken = [each for index, each in enumerate(self.inputs) if index not in carried]
        for node in self.graph.find_nodes(op="call_function", target=g.grad):
            for value in node.args[1]:
                if value.target is not g.outside or value.args[0] in carried:
                    continue
                source = self.inputs[value.args[0]]
                if any(each is not source and source in behind(each) for each in taken):
                    raise GraphError(
                        "A value from outside of the loop depends on the one that is differentiated by, and the "
                        "gradient would miss that.",
                        hint="Compute it inside the loop, or carry what is differentiated by.",
                        lines=_lines(g.line_of(node)),
                    )

    def resolve(self, results: Results, connection: Connection) -> None:
        """Give every saved value its tensors."""
        loop = next(index for index, each in self.parent.request.loops.items() if each is self.loop_of_it)
        iterations = results.loops[loop]
        self.iterations = len(iterations)
        for (value, *_), found in zip(self.saved, zip(*iterations, strict=True), strict=True):
            value._tensor = value._to[: self.iterations] if isinstance(value._to, Tensor) else _stacked(found)
            value._absent = value._tensor is None and value._to is None
        self.resolved = True


def _start(optimiser: Optimiser, parameter: torch.fx.Node, outer: Recorder) -> list[Any]:
    return optimiser.start(Value(outer, parameter))


def _lines(line: SourceLine | None) -> list[SourceLine]:
    return [] if line is None else [with_code(line)]


def _stacked(tensors: Sequence[Tensor | None]) -> Any:
    there = [each for each in tensors if each is not None]
    if not there:
        return None
    if len(there) == len(tensors) and len({each.shape for each in there}) == 1:
        return torch.stack(there)
    return list(tensors)


class Varying:
    """The length of a dimension that differs between the batches of a loop."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths

    def __repr__(self) -> str:
        return f"{min(self._lengths)}..{max(self._lengths)}"

    def _not_known(self, *_: Any) -> NoReturn:
        raise self._error()

    def _error(self) -> GraphError:
        return GraphError(
            f"This length differs between the batches of the loop: it is {self!r}.",
            hint="Let the server count: `torch.ones_like(value[..., 0]).sum()`, or `trace.mask().sum()` for tokens.",
            lines=here(),
        )

    __index__ = __int__ = __float__ = __bool__ = _not_known
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _not_known
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _not_known
    __neg__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _not_known
    __hash__ = None  # type: ignore[assignment]


def common_shape(fakes: Sequence[Any], varying: Callable[[Sequence[int]], Varying]) -> torch.Size:
    """The shape of a value that may look in several ways, with what is not a number for lengths that differ."""
    shapes = [each.shape for each in fakes if isinstance(each, Tensor)]
    lengths = [each if len(set(each)) > 1 else each[0] for each in zip(*shapes, strict=True)]
    if all(isinstance(each, int) for each in lengths):
        return shapes[0]
    return tuple(varying(each) if isinstance(each, tuple) else each for each in lengths)  # type: ignore[return-value]


class Loop:
    """A block that is recorded once and runs many times on the server.

    Attributes:
        count: How many iterations.
        iterations: How many it came to; None until the session has ended, and fewer than `count` if it was interrupted.

    What is saved in the block is one tensor after the session, with a dimension for the iterations in front.

    Example:
        >>> with model.session() as session:
        ...     with session.repeat(100) as loop:
        ...         v = loop.carry(torch.zeros(768))
        ...         with model.trace("The Eiffel Tower is in the city of"):
        ...             model.layers[5].output[:, -1] += v
        ...             loss = -model.logits[0, -1].log_softmax(-1)[42]
        ...         losses = loss.save()
        ...         loop.step(patchwire.optim.Adam(lr=0.1), loss, [v])
        ...     final = loop.result(v).save()
        >>> losses.shape
        torch.Size([100])
    """

    def __init__(self, request: Request, count: int) -> None:
        self._request = request
        self.count = count
        self._recorder: BodyRecorder | None = None
        self._carried: dict[Value, tuple[int, SourceLine | None]] = {}
        self._next: dict[Value, tuple[torch.fx.Node, SourceLine | None, int]] = {}
        self._index: Value | None = None
        self._results: dict[Value, Value] = {}

    @property
    def iterations(self) -> int | None:
        """How many iterations it came to; None until the session has ended."""
        return (self._recorder.iterations or None) if self._recorder else None

    def __enter__(self) -> Self:
        self._request.check_open()
        outer = self._request.recorder
        if outer.inner is not None:
            raise GraphError("A loop cannot stand in a loop.", hint="Write one after the other.", lines=here())
        if self._request.in_trace:
            raise GraphError("A loop cannot stand in a trace.", hint="Write the trace into it.", lines=here())
        if self._recorder is not None:
            hint = "Make another: `with session.repeat(…) as loop:`."
            raise GraphError("This loop has been used already.", hint=hint, lines=here())
        self._recorder = outer.inner = BodyRecorder(outer, self.count)
        return self

    def _body(self, what: str) -> BodyRecorder:
        if self._recorder is None or not self._recorder.open:
            raise GraphError(f"`{what}` stands in the loop's block.", hint="Write it inside it.", lines=here())
        return self._recorder

    def _outside(self, make: Callable[[Recorder], Any]) -> Any:
        """What is made in the recording around the loop."""
        assert self._recorder is not None
        outer = self._recorder.parent
        outer.inner = None
        try:
            return make(outer)
        finally:
            outer.inner = self._recorder

    def carry(self, start: Any) -> Value:
        """A value that changes from iteration to iteration.

        Args:
            start: What it is in the first iteration: a tensor, a number, or a value from outside of the loop.

        Returns:
            What it is in an iteration. In the next it is what `update` or `step` says, or what in-place edits of it
            lead to, if neither says anything. Its shape and dtype stay.

        Raises:
            GraphError: `start` is a value of the body.
        """
        self._body("carry")
        if isinstance(start, (bool, int, float)):
            start = torch.tensor(start)
        if isinstance(start, Value) and start.recorder is self._recorder and not start.ready:
            hint = "Write what it starts as before the loop, and `loop.update(x, value)` in it."
            raise GraphError("A carried value starts as something from outside of the loop.", hint=hint, lines=here())

        def outer_value(outer: Recorder) -> Value:
            if isinstance(start, Value) and not start.ready:
                return start
            return Value(outer, outer.argument(start))

        return self._carry(self._outside(outer_value))

    def _carry(self, start: Value) -> Value:
        body = self._body("carry")
        node = self._outside(lambda outer: outer.argument(start))
        value = Value(body, body.take(node))
        value.memory.taken.add(self)
        self._carried[value] = len(body.inputs) - 1, user_line()
        return value

    @property
    def index(self) -> Value:
        """The number of the iteration, from 0: a value `[]` int64."""
        self._body("index")
        if self._index is None:
            self._index = self.carry(torch.tensor(0))
            self.update(self._index, torch.add(self._index, 1))  # type: ignore[call-overload]
        return self._index

    def update(self, carried: Value, value: Any) -> None:
        """Say what a carried value is in the next iteration; until then it stays what it is.

        Args:
            carried: What `carry` gave.
            value: A value of the same shape and dtype.

        Raises:
            GraphError: it is not carried by this loop, or has been updated already.
            ShapeError: the shape or dtype is another.
        """
        body = self._body("update")
        body.not_in_a_branch("update a carried value")
        self._check_carried(carried)
        if carried in self._next:
            hint = "Put both into one value: `loop.update(x, …)` is written once."
            raise GraphError("This value has been updated already.", hint=hint, lines=here())
        node = body.argument(value)
        if not isinstance(node, torch.fx.Node):
            hint = "Write a tensor: `torch.tensor(…)`."
            raise GraphError(f"{value!r} is not a value.", hint=hint, lines=here())
        fake, after = fake_of(carried.memory.node), fake_of(node)
        if (
            isinstance(fake, Tensor)
            and isinstance(after, Tensor)
            and (fake.shape, fake.dtype)
            != (
                after.shape,
                after.dtype,
            )
        ):
            raise ShapeError(
                f"The value that is carried is {describe(fake)} and cannot become {describe(after)}.",
                hint="It has the same shape and dtype in every iteration: start it as what it becomes.",
                lines=here(),
            )
        self._next[carried] = node, user_line(), carried.memory.version

    def _check_carried(self, value: Any) -> None:
        if not isinstance(value, Value) or value not in self._carried:
            hint = "Write `x = loop.carry(start)`, and give this `x` itself."
            raise GraphError("This is not a value that the loop carries.", hint=hint, lines=here())

    def step(self, optimiser: Optimiser, loss: Value, parameters: Sequence[Value]) -> None:
        """Take a step of an optimiser that makes a loss smaller.

        Args:
            optimiser: `patchwire.optim.SGD(…)`, `patchwire.optim.Adam(…)`, or anything like it.
            loss: A value of one element.
            parameters: Carried values.

        Raises:
            GraphError: a parameter is not carried by this loop, or has been updated already.
        """
        body = self._body("step")
        for each in parameters:
            self._check_carried(each)
        gradients = body.grad(loss, None, list(parameters))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            start = body.inputs[self._carried[parameter][0]]
            memory = [self._carry(each) for each in self._outside(partial(_start, optimiser, start))]
            new, remembered = optimiser.step(parameter, gradient, memory)
            for each, value in zip((parameter, *memory), (new, *remembered), strict=True):
                self.update(each, value)

    def result(self, carried: Value) -> Value:
        """What a carried value is after the last iteration.

        Raises:
            GraphError: the loop's block has not ended, or the value is not carried by it.
        """
        self._check_carried(carried)
        if carried not in self._results:
            hint = "Write it after the block, in the session."
            raise GraphError("The loop has not ended.", hint=hint, lines=here())
        return self._results[carried]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._recorder is not None
        body, outer = self._recorder, self._recorder.parent
        if error is None:
            try:
                self._request.check_open()
                self._finish(body)
            except PatchwireError as found:
                error = found
                raise
            finally:
                self._close(body, error)
            home = body.request.traces[0].model if body.request.traces else self._request.home
            results = outer.loop(body.loop_of_it, home, body.inputs)
            self._results = {each: outer.item(results, index) for index, each in enumerate(self._carried)}
            outer.bodies.append(body)
        else:
            self._close(body, error)

    def _close(self, body: BodyRecorder, error: BaseException | None) -> None:
        """Nothing more is recorded in the body."""
        body.open = False
        body.parent.inner = None
        if error is not None:
            self._request.give_up(error)

    def _finish(self, body: BodyRecorder) -> None:
        if not body.request.traces and not self._request.home:
            hint = "Open the session with `model.session()`."
            raise GraphError("It is not clear for which model the loop runs.", hint=hint, lines=here())
        for carried, (index, line) in self._carried.items():
            node, where, version = self._next.get(carried, (None, line, 0))
            if node is not None and carried.memory.version != version:
                raise GraphError(
                    "A carried value is edited in place after `update` or `step` has said what it becomes: "
                    "the edit would be lost.",
                    hint="Put both into one value: `new = …; new /= new.norm(); loop.update(x, new)`.",
                    lines=_lines(carried.memory.edits[-1][1]),
                )
            if node is None:
                if not carried.memory.version:
                    raise GraphError(
                        "A carried value never changes.",
                        hint="Write `loop.update(x, …)`, or edit it in place: `x += …`.",
                        lines=_lines(line),
                    )
                node = carried.memory.node
            body.carry(index, node, where)
        body.finish()
        body.check_batches()
        body.check_gradients()


class BatchPrompt:
    """Stands for the rows of each batch, as a prompt."""

    def __init__(self, batches: Sequence[Any], open_loop: Callable[[], Any]) -> None:
        self._batches = batches
        self._open_loop = open_loop
        self._known: dict[str, tuple[Rows, ...]] = {}

    def rows(self, model: str, of_batch: Callable[[Any], Rows]) -> tuple[Rows, ...]:
        """The rows of each batch for a model.

        Raises:
            GraphError: its loop is not open.
        """
        self._open_loop()
        if model not in self._known:
            self._known[model] = tuple(of_batch(each) for each in self._batches)
        return self._known[model]


class Batches(Loop):
    """A block that is recorded once and runs on the server for each batch of a data set.

    Attributes:
        prompt: What to give to a trace: the rows of the batch.

    Example:
        >>> with model.session() as session:
        ...     with session.over(texts, batch_size=16) as batches:
        ...         total = batches.carry(torch.zeros(768))
        ...         with model.trace(batches.prompt) as trace:
        ...             h = model.layers[5].output
        ...         total += torch.where(trace.mask()[..., None], h, 0).sum((0, 1))
        ...     total = batches.result(total).save()
    """

    def __init__(self, request: Request, dataset: Any, batch_size: int) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            hint = "Write for example `batch_size=16`."
            raise GraphError(f"A batch cannot have {batch_size!r} rows.", hint=hint, lines=here())
        if isinstance(dataset, (str, Mapping)):  # a tokenizer's batch would go through its names
            hint = "Give a list of texts, or of lists of token ids without padding."
            raise GraphError(f"A {type(dataset).__name__} is not a data set.", hint=hint, lines=here())
        rows = dataset if isinstance(dataset, Tensor) else list(dataset)
        if not len(rows):
            raise GraphError("The data set is empty.", hint="Give a list of texts, or of token ids.", lines=here())
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        super().__init__(request, len(batches))
        self.prompt = BatchPrompt(batches, lambda: self._body("batches.prompt"))
