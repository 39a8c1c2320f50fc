"""Execution: a graph's nodes are evaluated as the values that they need come into being, inside the forward pass.

One `Execution` holds the values of one request. Before the first pass it evaluates what needs no model; at each site a
mediator brings the value, every node that became ready runs, saved values go to the sink, and what the site's writes
say goes back into the model. A value lives until its last user has run. Whatever outlives its site is copied, because
the model may go on to change its tensors in place.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.fx.node import map_arg

from patchwire import graph as g
from patchwire import logs
from patchwire.checking import describe
from patchwire.errors import (
    ExecutionError,
    LimitError,
    OperationError,
    OrderError,
    PatchwireError,
    ShapeError,
    SiteError,
    SourceLine,
    first_line,
)
from patchwire.sites import spell
from patchwire_worker import containers
from patchwire_worker.admission import Admitted, at
from patchwire_worker.interleaving import SiteMediator, StopPass, Stopping
from patchwire_worker.planner import Access, Pass, Plan, Work

Sink = Callable[[int, Tensor], None]
"""Takes a saved value as soon as it exists: the save's position in the request, and a tensor on the CPU of its own."""

LogSink = Callable[[int, str], None]
"""Takes what the values of a log look like: the log's position in the request, and a text."""


@dataclass
class Cost:
    """What an execution took."""

    passes: int = 0
    rows: int = 0
    modules_skipped: int = 0
    seconds: float = 0.0
    result_bytes: int = 0


class Execution:
    """Runs one plan."""

    def __init__(
        self,
        admitted: Admitted,
        plan: Plan,
        sink: Sink,
        stopping: Stopping,
        *,
        result_bytes: int | None = None,
        log_sink: LogSink = lambda node, text: None,
    ) -> None:
        """
        Args:
            admitted: The graph.
            plan: Its passes.
            sink: Takes the saved values.
            stopping: Says when to give up.
            result_bytes: How many bytes the saved values may have.
            log_sink: Takes the logs.
        """
        self.admitted = admitted
        self.model = admitted.model
        self.plan = plan
        self.sink = sink
        self.stopping = stopping
        self.result_bytes = result_bytes
        self.log_sink = log_sink
        self._logged = 0
        self.cost = Cost()
        self._values: dict[torch.fx.Node, Any] = {}
        self._missing: dict[torch.fx.Node, int] = {}
        self._uses: dict[torch.fx.Node, int] = {}
        self._ready: list[tuple[int, torch.fx.Node]] = []
        self._fresh: list[torch.fx.Node] = []
        for node in admitted.graph.fx.nodes:
            if node in plan.needed:
                self._missing[node] = len(node.all_input_nodes)
                self._uses[node] = sum(1 for user in node.users if user in plan.needed)
                if not node.all_input_nodes and node.target is not g.read:
                    self._push(node)

    def run(self, on_pass: Callable[[int, int], None]) -> Cost:
        """Run all passes.

        Args:
            on_pass: Told before each pass its number, from 1, and how many there are.

        Raises:
            PatchwireError: of the kind of what went wrong, at the line that caused it.
        """
        start = time.perf_counter()
        try:
            with torch.no_grad():
                self._evaluate_ready()
                for number, each in enumerate(self.plan.passes, start=1):
                    on_pass(number, len(self.plan.passes))
                    self._run_pass(each)
                    self.cost.passes += 1
                    self.cost.rows += each.ids.shape[0]
                    self.cost.modules_skipped += each.modules_skipped
            self._check_all_done()
        finally:
            # An error's traceback would keep them alive.
            self._values.clear()
            self._ready.clear()
            self._fresh.clear()
        self.cost.seconds = time.perf_counter() - start
        return self.cost

    # --- a pass -------------------------------------------------------------------------------------------------------

    def _run_pass(self, each: Pass) -> None:
        waiting = {work.location: work for work in each.works}

        def arrive(work: Work, value: Any) -> Any:
            del waiting[work.location]
            value = self._at(work, value)
            if not waiting:
                raise StopPass
            return value

        mediators = [SiteMediator(work.location, partial(arrive, work)) for work in each.works]
        try:
            self.model.run(each.ids, mediators, self.stopping)
        except PatchwireError:
            raise
        except torch.OutOfMemoryError as error:
            raise LimitError(
                f"The device has no memory for {each.ids.shape[0]} rows of {each.ids.shape[1]} tokens.",
                hint="Give fewer or shorter prompts to a trace.",
            ) from error
        except Exception as error:
            raise self._model_failed(each, error) from error
        if waiting:
            raise self._never_reached(next(iter(waiting.values())))

    def _at(self, work: Work, value: Any) -> Any:
        """What happens at a site: its value is taken, everything that became ready runs, and its new value is given."""
        self._fresh = []
        lent = []
        for access in work.reads:
            tensor = self._leaf(access, value)
            lent.append(tensor)
            # Contiguous, as its fake is, so that what a graph may do with it does not depend on who shares the pass.
            self._set(access.node, access.rows.take(tensor, access.leaf).contiguous())
        self._evaluate_ready()
        for access in work.writes:
            value = self._written(access, value)
        self._keep_own_copies(lent)
        return value

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
                    f"`{access.node.args[0]}` is {describe(tensor)} in this run, where {list(expected)} was expected."
                ),
            )
        return tensor

    def _written(self, access: Access, value: Any) -> Any:
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
        put = access.rows.put(old, access.leaf, new.to(old.device))
        if put is new:  # the model may go on to change it in place
            put = new.clone()
        return containers.replaced(value, access.leaf.side, access.leaf.path, put)

    def _keep_own_copies(self, lent: list[Tensor]) -> None:
        """Copy every value that stays and shares memory with what the model has lent."""
        for node in self._fresh:
            value = self._values.get(node)
            if value is not None:
                self._values[node] = _copied(value, lent)

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
                if self._missing[user] == 0 and user.target is not g.write:
                    self._push(user)

    def _use(self, node: torch.fx.Node) -> None:
        self._uses[node] -= 1
        if self._uses[node] == 0:
            self._values.pop(node, None)

    def _evaluate_ready(self) -> None:
        while self._ready:
            _, node = heapq.heappop(self._ready)
            if self.stopping.reason is not None:
                raise self.stopping.reason
            value = self._evaluate(node)
            for each in node.all_input_nodes:
                self._use(each)
            self._set(node, value)

    def _evaluate(self, node: torch.fx.Node) -> Any:
        values = self._values
        args = map_arg(node.args, values.__getitem__)
        kwargs = map_arg(node.kwargs, values.__getitem__)
        try:
            match node.target:
                case target if target is g.save:
                    return self._save(node, args[0], args[1])  # type: ignore[arg-type]
                case target if target is g.log:
                    return self._log(node, args[0])  # type: ignore[arg-type]
                case target if target is g.constant:
                    constant = self.admitted.graph.constants[args[0]]  # type: ignore[index]
                    return constant.to(self.model.device)  # type: ignore[union-attr]
                case target if target is g.parameter:
                    return self.model.parameter(args[1]).contiguous()  # type: ignore[arg-type]
                case target if target is g.apply:
                    path = self.model.catalogue.module(args[1]).path  # type: ignore[arg-type]
                    if self.model.catalogue.holds_layers(path):
                        raise OperationError(
                            f"`{spell(str(args[1]))}` holds the layers and cannot be applied to a value.",
                            hint="Give a prompt to a trace of its own.",
                        )
                    # A module may change its arguments in place, and these may be weights, or values of others.
                    own = _map_tensors((args[2], args[3]), torch.clone)
                    return _map_tensors(self.model.apply(path, *own), torch.Tensor.contiguous)
                case target:
                    self._check_size(node, args, kwargs)
                    result = target(*args, **kwargs)  # type: ignore[operator]
                    operation = g.operation_of(node)
                    return result.to(self.model.device) if operation and operation.kind == "draw" else result
        except PatchwireError as error:
            raise at(node, error) from None
        except torch.OutOfMemoryError as error:
            raise at(node, LimitError("The device has no memory for this operation.")) from error
        except Exception as error:
            name = g.operation_of(node).name if g.operation_of(node) else node.target.__name__  # type: ignore[union-attr]
            hint = "It failed on the values that it was given: save them in a trace of their own, and look."
            raise at(node, ExecutionError(f"`{name}` failed: {first_line(error)}", hint=hint)) from error

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
            raise ExecutionError(f"A {type(value).__name__} cannot be saved: it is not a tensor.")
        tensor = value.detach()
        tensor = tensor.to("cpu", dtype or tensor.dtype, copy=True).contiguous()
        self.cost.result_bytes += tensor.nbytes
        if self.result_bytes is not None and self.cost.result_bytes > self.result_bytes:
            raise LimitError(f"The saved values have more than {self.result_bytes:,} bytes.")
        self.sink(self.admitted.positions[node], tensor)

    def _log(self, node: torch.fx.Node, parts: Sequence[str | Tensor]) -> None:
        if not all(isinstance(each, (str, Tensor)) for each in parts):
            raise ExecutionError("A value that is not one tensor cannot be logged.")
        text = logs.to_text(parts)
        self._logged += len(text)
        if self._logged > logs.MAX_TOTAL:
            raise LimitError(
                f"The logs of the request have more than {logs.MAX_TOTAL:,} characters.",
                hint="Log less of each value: `value.norm()`, `value[0, -1, :5]`.",
            )
        self.log_sink(self.admitted.positions[node], text)

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

    def _never_reached(self, work: Work) -> PatchwireError:
        node = [*work.reads, *work.writes][0].node
        return at(node, SiteError(f"`{node.args[0]}` was never reached in this run."))

    def _model_failed(self, each: Pass, error: Exception) -> ExecutionError:
        writes = [g.line_of(access.node) for work in each.works for access in work.writes]
        lines: list[SourceLine] = [line for line in writes if line is not None]
        hint = "It may be due to what these lines write into it." if lines else ""
        return ExecutionError(f"The model failed: {first_line(error)}", hint=hint, lines=lines[-3:])

    def _check_all_done(self) -> None:
        for node, missing in self._missing.items():
            if node.target in (g.save, g.log) and missing >= 0:
                raise at(node, ExecutionError("A saved or logged value never came into being."))


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
