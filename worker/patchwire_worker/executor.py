"""Execution: a graph's nodes are evaluated as the values that they need come into being, inside the forward pass.

One `Execution` holds the values of one request. Before the first pass it evaluates what needs no model; at each site it
is brought the value, every node that became ready runs, saved values go to the listener, and what the site's writes say
goes back into the model. A value lives until its last user has run. Whatever outlives its site is copied, because the
model may go on to change its tensors in place.
"""

from __future__ import annotations

import contextlib
import copy
import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.fx
from torch import Tensor
from torch.fx.node import map_arg

from patchwire import graph as g
from patchwire import logs, recycling
from patchwire.checking import describe
from patchwire.errors import (
    ExecutionError,
    LimitError,
    OperationError,
    OrderError,
    PatchwireError,
    ShapeError,
    SiteError,
    first_line,
)
from patchwire.sites import spell
from patchwire_worker import columns, containers
from patchwire_worker.admission import Admitted, at
from patchwire_worker.interleaving import Stopping
from patchwire_worker.kept import KeptStore
from patchwire_worker.models.hosted import HostedModel, Remembered
from patchwire_worker.placing import Access
from patchwire_worker.planner import Plan
from patchwire_worker.rows import SomePositions

_ITEM = "Take one of its items: `value[0]`."
_STEPS = "Generate `min_new_tokens` that are enough, or use values of steps that there are."

State = tuple[Any, ...]
"""What an execution has come to; for nobody else to look into."""
Iteration = tuple[int, int]
"""A loop, by its position in the request's traces, and the number of an iteration, from 0."""


class Listener(Protocol):
    """Is told what happens, on the thread that runs it."""

    def running(self, number: int, passes: int) -> None:
        """A pass begins: its number, from 1, and how many there are."""

    def saved(self, node: int, tensor: Tensor, iteration: Iteration | None = None) -> None:
        """A saved value exists: the save's position in the request, or in a loop's body; it may change afterwards."""

    def kept(self, node: int, handle: bytes, tensor: Tensor, seconds: float) -> None:
        """A value is kept beyond the request: the node's position, what it is called now, and for how long."""

    def absent(self, node: int, iteration: Iteration | None = None) -> None:
        """A value will not exist that a save, by its position in the request or in a loop's body, was for."""

    def iterated(self, loop: int, done: int, count: int, *, last: bool) -> None:
        """So many iterations of a loop, by its position in the request's traces, are done; these may be the last."""

    def tokens(self, trace: int, invoke: int, ids: list[int]) -> None:
        """A generation has a new token for each row."""

    def logged(self, node: int, text: str, iteration: Iteration | None = None) -> None:
        """The values of a log, by its position in the request or in a loop's body, exist, and look like this."""


@dataclass
class Cost:
    """What an execution took."""

    passes: int = 0
    rows: int = 0
    modules_skipped: int = 0
    forks: int = 0
    companions: int = 0
    seconds: float = 0.0
    result_bytes: int = 0
    logged: int = 0

    def add(self, part: Cost) -> None:
        """Count what a pass or an iteration took; seconds, bytes and logs are counted by the whole."""
        self.passes += part.passes
        self.rows += part.rows
        self.modules_skipped += part.modules_skipped
        self.forks += part.forks
        self.companions += part.companions


@dataclass(frozen=True)
class Within:
    """Listens to an iteration, and tells the loop's own listener."""

    listener: Listener
    iteration: Iteration

    def running(self, number: int, passes: int) -> None:
        pass

    def saved(self, node: int, tensor: Tensor, iteration: Iteration | None = None) -> None:
        self.listener.saved(node, tensor, self.iteration)

    def kept(self, node: int, handle: bytes, tensor: Tensor, seconds: float) -> None:
        raise AssertionError("nothing is kept in the body of a loop")

    def absent(self, node: int, iteration: Iteration | None = None) -> None:
        self.listener.absent(node, self.iteration)

    def iterated(self, loop: int, done: int, count: int, *, last: bool) -> None:
        raise AssertionError("there is no loop in a loop")

    def tokens(self, trace: int, invoke: int, ids: list[int]) -> None:
        pass

    def logged(self, node: int, text: str, iteration: Iteration | None = None) -> None:
        self.listener.logged(node, text, self.iteration)


class Execution:
    """The values of one request, from its first pass to its last.

    Attributes:
        carried: In the body of a loop: what its values from outside are next, by their positions.
        failure: What it has failed with, in a pass that goes on for others.
        remembered: What models remember of the first tokens of later passes.
    """

    def __init__(
        self,
        admitted: Admitted,
        plan: Plan,
        listener: Listener,
        stopping: Stopping,
        *,
        result_bytes: int | None = None,
        store: KeptStore | None = None,
    ) -> None:
        """
        Args:
            admitted: The graph.
            plan: Its passes.
            listener: Is told what happens.
            stopping: Says when to give up.
            result_bytes: How many bytes the saved values may have.
            store: Where values are kept beyond the request.
        """
        self.admitted = admitted
        self.plan = plan
        self.listener = listener
        self.stopping = stopping
        self.result_bytes = result_bytes
        self.store = store
        self.carried: dict[int, Tensor] = {}
        self.failure: Exception | None = None
        self.remembered = Remembered()
        self._told: set[torch.fx.Node] = set()
        self._began = 0.0
        self._handles: list[bytes] = []
        self.cost = Cost()
        self._values: dict[torch.fx.Node, Any] = {}
        self._missing: dict[torch.fx.Node, int] = {}
        self._uses: dict[torch.fx.Node, int] = {}
        self._ready: list[tuple[int, torch.fx.Node]] = []
        self._fresh: list[torch.fx.Node] = []
        self._lent: list[Tensor] = []
        self._parts: dict[torch.fx.Node, Tensor | None] = {}
        self._origins: dict[torch.fx.Node, tuple[Tensor, Access]] = {}
        self._weights: dict[torch.fx.Node, Tensor] = {}
        for node in admitted.graph.fx.nodes:
            if node in plan.needed:
                self._missing[node] = len(node.all_input_nodes)
                self._uses[node] = sum(1 for user in node.users if user in plan.needed)
                if not node.all_input_nodes and node.target not in _MADE_BY_PASSES:
                    self._push(node)

    def begin(self) -> None:
        """Evaluate what needs no model.

        Raises:
            PatchwireError: of the kind of what went wrong, at the line that caused it.
        """
        self._began = time.perf_counter()
        self.evaluate()

    def finish(self) -> None:
        """All passes have run.

        Raises:
            ExecutionError: something that was asked for has not come into being.
        """
        self._check_all_done()
        self.cost.seconds = time.perf_counter() - self._began

    def close(self, *, failed: bool) -> None:
        """Let go of everything; if it failed, of what was kept beyond the request too."""
        if failed and self.store is not None:
            self.store.forget(self._handles)  # nobody will ever hear of them
        # An error's traceback would keep them alive.
        for each in (
            self._values, self._ready, self._fresh, self._lent, self._parts, self._origins, self._weights
        ):  # fmt: skip
            each.clear()

    @contextlib.contextmanager
    def differentiating(self) -> Iterator[None]:
        """Have autograd on if there are gradients, and only for what they are with respect to."""
        wanted = {
            self._model(node).parameter(node.args[1])  # type: ignore[arg-type]
            for node in self.plan.differentiated
            if node.target is g.parameter
        }
        before = [
            (each, each.requires_grad)
            for model in (set(self.admitted.models) if self.plan.differentiated else ())
            for each in model.module.parameters()
        ]
        try:
            for each, _ in before:
                each.requires_grad_(each in wanted)
            with torch.set_grad_enabled(bool(self.plan.differentiated)):
                yield
        finally:
            for each, required in before:
                each.requires_grad_(required)

    def _model(self, node: torch.fx.Node) -> HostedModel:
        """The model of a node that names a trace."""
        trace = node.args[0]
        assert isinstance(trace, int)
        return self.admitted.models[trace]

    # --- what passes do with it -------------------------------------------------------------------------------------

    def state(self) -> State:
        """Everything that a pass changes."""
        kinds = (self._values, self._missing, self._uses, self._ready, self._origins, self._weights)
        return tuple(copy.copy(each) for each in kinds)

    def restore(self, state: State) -> None:
        """Go back to a state; what was saved or logged since is not told again."""
        self._values, self._missing, self._uses, self._ready, self._origins, self._weights = map(copy.copy, state)
        self._fresh, self._lent, self._parts = [], [], {}

    def weights(self, nodes: Sequence[torch.fx.Node]) -> dict[str, Tensor]:
        """The weights that some nodes assign, by their paths."""
        return {str(node.args[1]): self._weights[node] for node in nodes}

    def given(self, loop: torch.fx.Node) -> list[Tensor]:
        """The values that a loop is given from outside.

        Raises:
            ExecutionError: there are none.
        """
        if self._missing[loop]:
            raise at(loop, ExecutionError("A loop needs a value of a step that was not reached.", hint=_STEPS))
        outside = [self._values[node] for node in loop.args[1]]  # type: ignore[union-attr, index]
        if not all(isinstance(value, Tensor) for value in outside):
            raise at(loop, ExecutionError("A tuple cannot be given to a loop as one value.", hint=_ITEM))
        for node in loop.all_input_nodes:
            self._use(node)
        return [value.detach() for value in outside]

    def made(self, nodes: Iterable[torch.fx.Node], value: Any) -> None:
        """Take what a pass or a loop has made as the value of some nodes.

        Raises:
            PatchwireError: of the kind of what went wrong, at the line that caused it.
        """
        for node in nodes:
            self._set(node, value)
        self.evaluate()

    # --- sites --------------------------------------------------------------------------------------------------------

    def read(self, accesses: Sequence[Access], value: Any) -> Any:
        """Take what is read at a location, and evaluate everything that became ready.

        Returns:
            The location's value, which is another one where a gradient with respect to it is asked for.

        Raises:
            PatchwireError: of the kind of what went wrong, at the line that caused it.
        """
        self._fresh, self._lent = [], []
        for access in accesses:
            if access.node in self.plan.differentiated:
                value = self._make_leaf(access, value)
            tensor = self._leaf(access, value)
            self._lent.append(tensor)
            if access.parts is not None:
                own = access.rows.computed(tensor)
                self._parts |= {
                    node: None if part is None else columns.take(own, part) for node, part in access.parts.items()
                }
                self._set(access.node, None)  # nobody looks at more than its parts
                continue
            # Contiguous, as its fake is, so that what a graph may do with it does not depend on who shares the pass.
            part = access.rows.take(tensor, access.leaf)
            part = part if isinstance(access.rows, SomePositions) else part.contiguous()
            # Autograd remembers what a loss was computed from, and the model may go on to change that in place.
            self._set(access.node, part.clone() if self.plan.differentiated else part)
        self.evaluate()
        return value

    def write(self, access: Access, value: Any, own: list[Tensor]) -> Any:
        """A location's value after a write.

        Args:
            access: The write.
            value: The value before.
            own: The tensors in it that were made by writes, so that they may be changed in place; added to.

        Raises:
            PatchwireError: of the kind of what went wrong, at the line that caused it.
        """
        source = access.node.args[1]
        assert isinstance(source, torch.fx.Node)
        if source not in self._values:
            raise self._too_late(access.node, source)
        old = self._leaf(access, value)
        new = self._values[source]
        if not isinstance(new, Tensor):
            raise at(access.node, ShapeError(f"`{access.node.args[0]}` cannot become a {type(new).__name__}."))
        mine = access.rows.take(old, access.leaf)
        if new.shape != mine.shape or new.dtype != mine.dtype:
            raise at(
                access.node,
                ShapeError(f"`{access.node.args[0]}` is {describe(mine)} and cannot become {describe(new)}."),
            )
        self._use(source)
        self._missing[access.node] = -1
        mutable = any(each is old for each in own)
        put = access.rows.put(old, access.leaf, new.to(old.device), mutable=mutable)
        if put.stride() != old.stride():  # the model may go on to take views that other strides do not allow
            put = torch.empty_like(old).copy_(put)
        elif g.same_storage(put, new):  # the model may go on to change it in place
            put = new.clone() if put is new else put.clone()
        if put is old:
            return value
        own.append(put)
        return containers.replaced(value, access.leaf.side, access.leaf.path, put)

    def leave(self) -> None:
        """Leave a location: copy every value that stays and shares memory with what the model has lent."""
        for node in self._fresh:
            value = self._values.get(node)
            if value is not None:
                self._values[node] = _copied(value, self._lent)
        self._fresh, self._lent = [], []

    def _make_leaf(self, access: Access, value: Any) -> Any:
        """The value of a side, with the tensor there in the hands of autograd: its gradient can be asked for.

        It is a tensor of its own even where the model holds the same one elsewhere (a residual stream that is also a
        norm's input, say): the gradient is of what a write at this site would change, whatever else is differentiated.
        """
        tensor = self._leaf(access, value)
        origin = tensor.clone() if tensor.requires_grad else tensor.detach().requires_grad_()
        self._origins[access.node] = (origin, access)
        # A copy for the model and the graph, which may change it in place; the gradient is that of what was there.
        return containers.replaced(value, access.leaf.side, access.leaf.path, origin.clone())

    def _leaf(self, access: Access, value: Any) -> Tensor:
        leaf = access.leaf
        try:
            tensor = containers.get(value, leaf.side, leaf.path)
        except (KeyError, IndexError, TypeError):
            tensor = None
        if not isinstance(tensor, Tensor):
            raise at(access.node, SiteError(f"`{access.node.args[0]}` is not a tensor in this run."))
        expected = leaf.lengths(access.rows.batch, access.rows.seq)
        if expected is not None and tuple(tensor.shape) != expected:
            raise at(
                access.node,
                ExecutionError(
                    f"`{access.node.args[0]}` is {describe(tensor)} in this run, where {list(expected)} was expected.",
                    hint="With this prompt the model does something else than with others: give it another one.",
                ),
            )
        return tensor

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _push(self, node: torch.fx.Node) -> None:
        heapq.heappush(self._ready, (self.admitted.positions[node], node))

    def _set(self, node: torch.fx.Node, value: Any) -> None:
        self._missing[node] = -1
        if self._uses[node]:
            self._values[node] = value
            self._fresh.append(node)
        for user in node.users:
            if user in self._missing:
                self._missing[user] -= 1
                if self._missing[user] == 0 and user.target not in (g.write, g.loop):
                    self._push(user)

    def _use(self, node: torch.fx.Node) -> None:
        self._uses[node] -= 1
        if self._uses[node] == 0:
            self._values.pop(node, None)
            self._origins.pop(node, None)  # and with it the way back that autograd remembers

    def evaluate(self) -> None:
        """Evaluate every node that became ready.

        Raises:
            PatchwireError: of the kind of what went wrong, at the line that caused it.
        """
        while self._ready:
            _, node = heapq.heappop(self._ready)
            if self.stopping.reason is not None:
                raise self.stopping.reason
            value = self._evaluate(node)
            if node in self.plan.differentiated and node.target is not g.parameter and isinstance(value, Tensor):
                # Memory of its own, so that nothing takes a copy of it later and goes on with that.
                value = value.clone() if value.requires_grad else value.detach().clone().requires_grad_()
            for each in node.all_input_nodes:
                self._use(each)
            self._set(node, value)

    def _evaluate(self, node: torch.fx.Node) -> Any:
        values = self._values
        if node in self._parts:
            return self._parts.pop(node)
        if node.target is g.grad:
            return self._gradients(node)
        if node.target in g.SINKS:
            if node in self._told:
                return None
            self._told.add(node)
        args = map_arg(node.args, values.__getitem__)
        kwargs = map_arg(node.kwargs, values.__getitem__)
        try:
            match node.target:
                case target if target is g.save:
                    return self._save(node, args[0], args[1])  # type: ignore[arg-type]
                case target if target is g.outside:
                    return self.admitted.graph.outside[args[0]]  # type: ignore[index]
                case target if target is g.carry:
                    return self._carry(args[0], args[1])  # type: ignore[arg-type]
                case target if target is g.keep:
                    return self._keep(node, args[0], args[1])  # type: ignore[arg-type]
                case target if target is g.token_ids:
                    rows = self.admitted.graph.traces[args[0]].invokes[args[1]].rows  # type: ignore[index]
                    return _ended_together(rows).to(self.admitted.models[0].device)
                case target if target is g.log:
                    return self._log(node, args[0])  # type: ignore[arg-type]
                case target if target is g.constant:
                    constant = self.admitted.graph.constants[args[0]]  # type: ignore[index]
                    return constant.to(self.admitted.models[0].device)  # type: ignore[union-attr]
                case target if target is g.parameter:
                    # Another node of the same parameter may be the one that is differentiated: it is never detached.
                    parameter = self._model(node).parameter(args[1])  # type: ignore[arg-type]
                    if not isinstance(parameter, torch.nn.Parameter):
                        return parameter.clone(memory_format=torch.contiguous_format)  # a pass may change a buffer
                    return parameter if node in self.plan.differentiated else parameter.contiguous()
                case target if target is g.apply:
                    model = self._model(node)
                    path = model.catalogue.module(args[1]).path  # type: ignore[arg-type]
                    if model.catalogue.holds_layers(path):
                        raise OperationError(
                            f"`{spell(str(args[1]))}` holds the layers and cannot be applied to a value.",
                            hint="Give a prompt to a trace of its own.",
                        )
                    # A module may change its arguments in place, and these may be weights, or values of others.
                    own = _map_tensors((args[2], args[3]), torch.clone)
                    with model.weights(args[4]):  # type: ignore[arg-type]
                        return _map_tensors(model.apply(path, *own), torch.Tensor.contiguous)
                case target if target is g.assign:
                    self._weights[node] = args[2]  # type: ignore[assignment]
                    return None
                case target:
                    self._check_size(node, args, kwargs)
                    result = target(*args, **kwargs)  # type: ignore[operator]
                    operation = g.operation_of(node)
                    return (
                        result.to(self.admitted.models[0].device) if operation and operation.kind == "draw" else result
                    )
        except PatchwireError as error:
            raise at(node, error) from None
        except torch.OutOfMemoryError as error:
            raise at(
                node, LimitError("The device has no memory for this operation.", hint="Give fewer or shorter prompts.")
            ) from error
        except Exception as error:
            name = g.operation_of(node).name if g.operation_of(node) else node.target.__name__  # type: ignore[union-attr]
            hint = "It failed on the values that it was given: save them in a trace of their own, and look."
            raise at(node, ExecutionError(f"`{name}` failed: {first_line(error)}", hint=hint)) from error

    def _gradients(self, node: torch.fx.Node) -> tuple[Tensor, ...]:
        loss, values, weights = node.args
        inputs = [self._origins[each][0] if each in self._origins else self._values[each] for each in values]  # type: ignore[union-attr, index]
        weigh = None if weights is None else self._values[weights]  # type: ignore[index]
        try:
            # The way back is kept: there may be more than one gradient.
            found = torch.autograd.grad(self._values[loss], inputs, weigh, retain_graph=True)  # type: ignore[index]
        except torch.OutOfMemoryError as error:
            raise at(
                node, LimitError("The device has no memory for this gradient.", hint="Give fewer or shorter prompts.")
            ) from error
        except Exception as error:
            if "modified by an inplace operation" in str(error):
                message = "There is no gradient here: the model changes in place what its gradient needs."
                hint = "PyTorch gives none either. Take it of a value before, or with respect to one after."
            else:
                message = f"There is no gradient here: {first_line(error)}"
                hint = (
                    "The gradient of a part, such as `h[:, -1]`, is a part of the gradient: `grad(loss, h)[:, -1]`. "
                    "And the loss must depend on the value itself, not on something that it was computed from."
                )
            raise at(node, ExecutionError(message, hint=hint)) from error
        taken = []
        for each, gradient in zip(values, found, strict=True):  # type: ignore[arg-type]
            if each in self._origins:
                access = self._origins[each][1]
                gradient = access.rows.take(gradient, access.leaf)
            taken.append(gradient.contiguous())
        return tuple(taken)

    def _check_size(self, node: torch.fx.Node, args: Any, kwargs: Any) -> None:
        """Check on fakes an operation whose shapes were not known before."""
        operation = g.operation_of(node)
        unknown = node.meta.get("unchecked") if operation is None else node.meta.get("fake") is None
        if not unknown:
            return
        fakes = _map_tensors((args, dict(kwargs)), lambda tensor: tensor.to("meta"))
        checker = self.admitted.checker
        if operation is None:
            checker.check_edit(*fakes[0])
            return
        checker.check_size(checker.run(operation.name, operation.function, *fakes))

    def _save(self, node: torch.fx.Node, value: Any, dtype: torch.dtype | None) -> None:
        if not isinstance(value, Tensor):
            raise ExecutionError(f"A {type(value).__name__} cannot be saved: it is not a tensor.", hint=_ITEM)
        as_it_is = value.device.type == "cpu" and value.is_contiguous() and dtype in (None, value.dtype)
        tensor = value if as_it_is else recycling.copy(value, dtype)
        self.cost.result_bytes += tensor.nbytes
        if self.result_bytes is not None and self.cost.result_bytes > self.result_bytes:
            raise LimitError(
                f"The saved values have more than {self.result_bytes:,} bytes.", hint="Save less: a slice, or a sum."
            )
        self.listener.saved(self.admitted.positions[node], tensor)

    def _carry(self, index: int, value: Any) -> None:
        before = self.admitted.graph.outside[index]
        assert before is not None
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (before.shape, before.dtype):
            raise ShapeError(f"The value that is carried is {describe(before)} and cannot become {describe(value)}.")
        self.carried[index] = value.detach().clone()

    def _keep(self, node: torch.fx.Node, value: Any, seconds: float) -> None:
        if not isinstance(value, Tensor):
            raise ExecutionError(f"A {type(value).__name__} cannot be kept: it is not a tensor.", hint=_ITEM)
        assert self.store is not None
        # On the CPU: the device's memory is for models.
        tensor = value.detach().to("cpu", copy=True).contiguous()
        handle = self.store.put(tensor, seconds)
        self._handles.append(handle)
        self.listener.kept(self.admitted.positions[node], handle, tensor, seconds)

    def _log(self, node: torch.fx.Node, parts: Sequence[str | Tensor]) -> None:
        if not all(isinstance(each, (str, Tensor)) for each in parts):
            raise ExecutionError("A value that is not one tensor cannot be logged.", hint=_ITEM)
        text = logs.to_text(parts)
        self.cost.logged += len(text)
        if self.cost.logged > logs.MAX_TOTAL:
            raise LimitError(
                f"The logs of the request have more than {logs.MAX_TOTAL:,} characters.",
                hint="Log less of each value: `value.norm()`, `value[0, -1, :5]`.",
            )
        self.listener.logged(self.admitted.positions[node], text)

    # --- what can go wrong --------------------------------------------------------------------------------------------

    def _too_late(self, node: torch.fx.Node, source: torch.fx.Node) -> OrderError:
        late = [each for each in _behind(source) if each.target is g.read and self._missing[each] == 0]
        lines = [g.line_of(node), *(g.line_of(each) for each in late[:1])]
        later = f"`{late[0].args[0]}`" if late else "a value"
        return OrderError(
            f"`{node.args[0]}` cannot be changed with {later}, which comes later in the forward pass.",
            hint="Save the later value, and write it in a second trace.",
            lines=[line for line in lines if line is not None],
        )

    def never_reached(self, accesses: Iterable[Access], calls: int) -> None:
        """Leave out what depends on a site that was not reached, if it was said that this may be.

        Raises:
            SiteError: it was not said.
        """
        for access in accesses:
            site = access.node.args[0]
            assert isinstance(site, g.Site)
            if site.step < calls:
                raise at(
                    access.node, SiteError(f"`{site}` was never reached in this run.", hint="Give it another prompt.")
                )
            if not site.open:
                hint = "Write `for step in gen.all():` for as many steps as there are."
                raise at(access.node, SiteError(f"`{site}` was never reached: there were {calls} steps.", hint=hint))
            self._leave_out(access.node)

    def _leave_out(self, node: torch.fx.Node) -> None:
        """Mark everything as absent that depends on a node."""
        stack = [node]
        while stack:
            each = stack.pop()
            if self._missing[each] < 0:
                continue
            self._missing[each] = -1
            site = each.args[0]
            if each.target is g.save:
                self.listener.absent(self.admitted.positions[each])
            elif each.target in (g.keep, g.carry):
                raise at(
                    each,
                    ExecutionError("A value of a step that was not reached cannot be kept or carried.", hint=_STEPS),
                )
            elif each.target is g.write and isinstance(site, g.Site) and not site.open:
                raise at(
                    each,
                    ExecutionError(
                        f"`{site}` was to be changed with a value of a step that was not reached.",
                        hint=_STEPS,
                    ),
                )
            stack += [user for user in each.users if user in self._missing]

    def _check_all_done(self) -> None:
        for node, missing in self._missing.items():
            if node.target in g.SINKS and missing >= 0:
                hint = "This is a defect of Patchwire itself, and the block that shows it is what helps to mend it."
                raise at(node, ExecutionError("A saved or logged value never came into being.", hint=hint))


_MADE_BY_PASSES = (g.read, g.generated, g.loop)


def _ended_together(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of token ids `[batch, seq]`, short ones after -1."""
    longest = max(map(len, rows))
    return torch.tensor([[-1] * (longest - len(row)) + list(row) for row in rows])


def _copied(value: Any, lent: list[Tensor]) -> Any:
    return _map_tensors(
        value, lambda tensor: tensor.clone() if any(g.same_storage(tensor, each) for each in lent) else tensor
    )


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: _map_tensors(each, function) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_map_tensors(each, function) for each in value]
        return type(value)(items) if not hasattr(value, "_fields") else type(value)(*items)
    return value


def _behind(node: torch.fx.Node) -> list[torch.fx.Node]:
    found = dict.fromkeys([node])
    stack = [node]
    while stack:
        for each in stack.pop().all_input_nodes:
            if each not in found:
                found[each] = None
                stack.append(each)
    return list(found)
