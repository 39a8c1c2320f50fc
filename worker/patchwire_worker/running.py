"""Running: the passes of a plan, one after the other, and one pass for several requests that can share it.

A pass meets the model at its locations. At each, rows fork, every request takes what it reads and evaluates what became
ready, and then everything is written. A request that fails ends alone: the others of its pass go on. A pass for which
the device has no memory runs again in two halves, and nobody is told anything twice.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from patchwire import graph as g
from patchwire.errors import ExecutionError, LimitError, PatchwireError, SourceLine, first_line
from patchwire_worker.executor import Cost, Execution, Within
from patchwire_worker.interleaving import SiteMediator, StopPass, Stopping
from patchwire_worker.looping import Iterations
from patchwire_worker.models.hosted import HostedModel
from patchwire_worker.models.remembered import Past
from patchwire_worker.placing import Access, Pass, Work, placed
from patchwire_worker.planner import Looping, halves

log = logging.getLogger(__name__)

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""What PyTorch says on the CPU, where it has no kind of error for it."""


def run(execution: Execution, between: Callable[[], None] = lambda: None) -> Cost:
    """Run all passes of a request.

    Args:
        execution: The request.
        between: Called between its passes, and between the iterations of its loops: others may run then.

    Raises:
        PatchwireError: of the kind of what went wrong, at the line that caused it.
    """
    plan, failed = execution.plan, True
    with _locked(execution.admitted.all_models), execution.differentiating():
        try:
            execution.begin()
            execution.remembered.wanted = Counter(each.past for each in plan.passes if isinstance(each, Pass))
            for number, each in enumerate(plan.passes, start=1):
                if number > 1:
                    between()
                execution.listener.running(number, len(plan.passes))
                if isinstance(each, Looping):
                    _run_loop(execution, each, between)
                else:
                    _run_pass(each, [execution])
                    execution.remembered.done(each.past)
                    if execution.failure is not None:
                        raise execution.failure
            execution.finish()
            failed = False
        finally:
            execution.close(failed=failed)
    return execution.cost


def run_together(executions: Sequence[Execution], each: Pass) -> list[Cost | Exception]:
    """Run requests of one pass each in one pass for all.

    Args:
        executions: The requests.
        each: The pass; its groups are those of the requests, in their order.

    Returns:
        What each took, or with what it failed.
    """
    with _locked([each.model]), torch.no_grad():
        try:
            for execution in executions:
                with _failing_alone(execution):
                    execution.begin()
                    execution.listener.running(1, 1)
            _run_pass(each, executions)
            for execution in executions:
                with _failing_alone(execution):
                    if execution.failure is None:
                        execution.finish()
        finally:
            for execution in executions:
                execution.close(failed=execution.failure is not None)
    return [execution.failure or execution.cost for execution in executions]


@contextlib.contextmanager
def _failing_alone(execution: Execution, *, in_pass: bool = False) -> Iterator[None]:
    """Keep what a request fails with, so that others go on.

    Args:
        execution: The request.
        in_pass: Whether a pass is under way, which may run in another way if there is no memory.

    Raises:
        Exception: there is no memory for the pass.
    """
    try:
        yield
    except Exception as error:
        if in_pass and _out_of_memory(error):
            raise
        execution.failure = execution.failure or error


@contextlib.contextmanager
def _locked(models: Iterable[HostedModel]) -> Iterator[None]:
    """Have models for ourselves; in one order everywhere, so that two requests never wait for each other."""
    with contextlib.ExitStack() as stack:
        for model in sorted(models, key=lambda each: each.name):
            stack.enter_context(model.lock)
        yield


class _AllStopping(Stopping):
    """Ends a pass when nobody of those that share it goes on."""

    def __init__(self, executions: Sequence[Execution]) -> None:
        super().__init__()
        self._executions = executions

    @property
    def reason(self) -> PatchwireError | None:
        """Why it has to end now, if it has to: the reason of one of them."""
        found = None
        for each in self._executions:
            if each.failure is None and each.stopping.reason is None:
                return None
            found = each.stopping.reason or found
        return found or ExecutionError("Nobody waits for this pass any more.")


def _run_pass(each: Pass, executions: Sequence[Execution]) -> None:
    """Run a pass; what a request fails with is its `failure` afterwards."""
    before = [execution.state() for execution in executions]
    try:
        _attempt(each, executions)
        return
    except Exception as error:
        stopped = all(one.failure is not None or one.stopping.reason is not None for one in executions)
        told = error if isinstance(error, PatchwireError) else _model_failed(each, error)
        if stopped or (len(executions) == 1 and not _out_of_memory(error)):
            _fail(executions, told)
            return
        if not _out_of_memory(error):
            log.info("a pass of %d requests failed, and each runs alone", len(executions), exc_info=error)
    for execution, state in zip(executions, before, strict=True):
        execution.restore(state)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(executions) > 1:
        for execution, group in zip(executions, each.groups, strict=True):
            if execution.failure is None:
                _run_pass(placed([group]), [execution])
        return
    parts = halves(each.groups[0])
    if parts == [each.groups[0]]:
        length = len(each.past) + each.ids.shape[1]
        message = f"The device has no memory for {each.rows} rows of {length} tokens."
        without = LimitError(message, hint="Give fewer or shorter prompts to a trace.")
        _fail(executions, told if isinstance(told, LimitError) else without)
        return
    log.info("%s has no memory for %d rows: they run in two halves", each.model.name, each.rows)
    for part in parts:
        if executions[0].failure is None:
            _run_pass(placed([part]), executions)


def _fail(executions: Sequence[Execution], error: Exception) -> None:
    for execution in executions:
        if execution.failure is None:
            execution.failure = execution.stopping.reason or error


def _attempt(each: Pass, executions: Sequence[Execution]) -> None:
    waiting = {(work.step, work.location): work for work in each.works}
    to_the_end = each.generation is not None and bool(each.generation.results)
    stopping = executions[0].stopping if len(executions) == 1 else _AllStopping(executions)
    remembered = executions[0].remembered
    past = remembered.get(each.model, each.past) if each.past else None
    noting = remembered.noting(each.model, each.unchanged) if len(executions) == 1 else None
    if past is not None:
        past.rows = each.ids.shape[0]

    def arrive(work: Work, value: Any) -> Any:
        del waiting[work.step, work.location]
        value = _at(work, value, executions, past)
        if not waiting and not to_the_end:
            raise StopPass
        return value

    steps: dict[int, list[SiteMediator]] = defaultdict(list)
    for work in each.works:
        steps[work.step].append(SiteMediator(work.location, partial(arrive, work)))
    generated = None
    exact = any(group.trace.exact for group in each.groups)
    with each.model.weights(executions[0].weights(each.weights)):
        if each.generation is None:
            each.model.run(each.ids, steps[0], stopping, each.positions, past or noting, each.columns, exact=exact)
            if noting is not None:
                remembered.note(each.model, noting)
        else:
            tell = partial(executions[0].listener.tokens, each.generation.trace, each.generation.invoke)
            generated = each.model.generate(each.ids, each.generation.options, steps, stopping, tell, exact=exact)
    calls = each.model.interleaver.calls
    for index, execution in enumerate(executions):
        with _failing_alone(execution):
            if execution.failure is not None:
                continue
            cost = execution.cost
            rows = each.rows if len(executions) == 1 else each.groups[index].count
            cost.add(Cost(calls, calls * rows, each.modules_skipped, len(each.forks), len(executions) - 1))
            left = [access for work in waiting.values() for access in (*work.reads, *work.writes)]
            execution.never_reached([access for access in left if access.group == index], calls)
            if each.generation is not None and generated is not None:
                execution.made(each.generation.results, generated)


def _at(work: Work, value: Any, executions: Sequence[Execution], past: Past | None) -> Any:
    """What happens at a location: the value to go on with.

    Raises:
        StopPass: nobody is left.
    """
    if work.fork is not None:
        value = work.fork(value, past)
    here = []
    for index, accesses in groupby(work.reads, key=lambda access: access.group):
        execution = executions[index]
        with _failing_alone(execution, in_pass=True):
            if _goes_on(execution):
                here.append(execution)
                value = execution.read(list(accesses), value)
    own: list[Tensor] = []
    for access in work.writes:
        execution = executions[access.group]
        with _failing_alone(execution, in_pass=True):
            if _goes_on(execution):
                value = execution.write(access, value, own)
    for execution in here:
        execution.leave()
    if all(execution.failure is not None for execution in executions):
        raise StopPass
    return value


def _goes_on(execution: Execution) -> bool:
    """Whether a request has neither failed nor been stopped.

    Raises:
        PatchwireError: why it is stopped.
    """
    if execution.failure is None and execution.stopping.reason is not None:
        raise execution.stopping.reason
    return execution.failure is None


def _run_loop(execution: Execution, each: Looping, between: Callable[[], None]) -> None:
    loop = execution.admitted.graph.traces[each.trace].loop
    assert loop is not None
    outside = execution.given(each.node)
    iterations = Iterations(execution.admitted.bodies[each.trace])
    for number in range(loop.count):
        if number:
            between()
        body, planned = iterations.at(number, outside)
        listener = Within(execution.listener, (each.trace, number))
        iteration = Execution(body, planned, listener, execution.stopping, result_bytes=execution.result_bytes)
        iteration.cost.result_bytes, iteration.cost.logged = execution.cost.result_bytes, execution.cost.logged
        cost = run(iteration, between)
        execution.cost.add(cost)
        execution.cost.result_bytes, execution.cost.logged = cost.result_bytes, cost.logged
        for index, value in iteration.carried.items():
            outside[index] = value
        last = execution.stopping.interrupted or number + 1 == loop.count
        execution.listener.iterated(each.trace, number + 1, loop.count, last=last)
        if last:
            break
    execution.made([each.node], tuple(outside[carry.args[0]] for carry in loop.carries))  # type: ignore[index]


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether this, or what it came from, is that there is no memory."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(each in str(error).lower() for each in _NO_MEMORY):
            return True
        error = error.__cause__
    return False


def _model_failed(each: Pass, error: Exception) -> ExecutionError:
    accesses: list[Access] = [access for work in each.works for access in work.writes]
    lines: list[SourceLine] = [line for line in (g.line_of(access.node) for access in accesses) if line is not None]
    hint = "It may be due to what these lines write into it." if lines else ""
    failed = ExecutionError(f"The model failed: {first_line(error)}", hint=hint, lines=lines[-3:])
    failed.__cause__ = error
    return failed
