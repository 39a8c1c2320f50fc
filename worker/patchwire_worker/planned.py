"""A plan as clients are shown it: the passes, and what each would cost.

What is here says again, in words and numbers, what planner.py has decided and models/costs.py has learnt; it decides
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

from patchwire import graph as g
from patchwire.sites import OUTPUT, SOURCE, Catalogue, Location
from patchwire.v1 import service_pb2
from patchwire_worker.admission import Admitted, saved_bytes
from patchwire_worker.placing import Pass
from patchwire_worker.planner import Looping, Plan, plan


def planned_to_proto(admitted: Admitted, planned: Plan) -> service_pb2.PlanResponse:
    """The message of a plan."""
    passes = [each for part in planned.passes for each in _passes(admitted, part)]
    known = saved_bytes(admitted.graph.nodes)
    for index, loop in admitted.graph.loops.items():
        known += loop.count * saved_bytes(admitted.bodies[index].graph.nodes)
    return service_pb2.PlanResponse(passes=passes, result_bytes=known)


def _passes(admitted: Admitted, part: Pass | Looping) -> Iterator[service_pb2.PlannedPass]:
    if isinstance(part, Pass):
        yield _pass(part)
        return
    loop, body = admitted.graph.traces[part.trace].loop, admitted.bodies[part.trace]
    assert loop is not None
    # Iterations of whose rows the same ones begin alike, for as many tokens, are planned alike.
    alike: dict[tuple[object, ...], list[int]] = {}
    varies = any(invoke.batches for trace in body.graph.traces for invoke in trace.invokes)
    for number in range(loop.count if varies else 1):
        rows = [invoke.rows for trace in body.graph.at(number).traces for invoke in trace.invokes]
        alike.setdefault(_beginnings(rows), []).append(number)
    for numbers in alike.values():
        of_one = plan(replace(body, graph=body.graph.at(numbers[0])))
        for each in of_one.passes:
            assert isinstance(each, Pass), "there is no loop in a loop"
            message = _pass(each)
            message.iterations = len(numbers) if varies else loop.count
            yield message


def _beginnings(invokes: Iterable[Sequence[Sequence[int]]]) -> tuple[object, ...]:
    """What is equal among the beginnings of rows, whatever the tokens are: a number for each beginning."""
    known: dict[tuple[int, int], int] = {}

    def numbers(row: Sequence[int]) -> tuple[int, ...]:
        steps = accumulate(row, lambda before, token: known.setdefault((before, token), len(known) + 1), initial=0)
        return tuple(steps)

    return tuple(tuple(map(numbers, rows)) for rows in invokes)


def _pass(each: Pass) -> service_pb2.PlannedPass:
    model, (rows, tokens) = each.model, each.ids.shape
    nodes = [access.node for work in each.works for access in (*work.reads, *work.writes)]
    sites: list[g.Site] = [node.args[0] for node in nodes]  # type: ignore[misc]
    invokes = {(site.trace, site.invoke) for site in sites}
    last = each.works[-1] if each.works else None
    message = service_pb2.PlannedPass(
        model=model.name,
        layers=model.catalogue.num_layers,
        rows=rows,
        tokens=tokens,
        cached=len(each.past),
        forks=[service_pb2.PlannedFork(before=_part(model.catalogue, at), rows=n) for at, n in _forks(each)],
        modules_skipped=each.modules_skipped,
        positions=None if each.positions is None else len(each.positions),
        columns=None if each.columns is None else len(each.columns),
        calls=1,
        iterations=1,
    )
    to_the_end = last is None or last.location == Location("", OUTPUT)
    if each.generation is not None:
        invokes.add((each.generation.trace, each.generation.invoke))
        to_the_end = bool(each.generation.results)
        message.generates = each.generation.options.max_new_tokens
        message.calls = message.generates if to_the_end or last is None else last.step + 1
    until = None if to_the_end or last is None else model.layers_before(last.order)
    message.layers_computed = model.catalogue.num_layers if until is None else until
    if until is not None and message.calls == 1:  # a generation needs those of every step before its last
        message.positions = 0
    message.stops_after = "" if to_the_end or last is None else _address(model.catalogue, last.location)
    message.traces.extend(sorted({trace for trace, _ in invokes}))
    message.invokes = len(invokes)
    _add_costs(message, each, until if message.calls == 1 else None)
    return message


def _add_costs(message: service_pb2.PlannedPass, each: Pass, until: int | None) -> None:
    costs = each.model.costs
    ways = {(work.location.module, work.location.operations) for work in each.works}
    stepwise = each.model.interleaver.goes_stepwise(ways)
    starts: list[tuple[int | None, int]] = [(None, message.rows)]
    starts += _forks(each)
    # All but the last position of a prompt are generated from without their logits.
    positions = None if each.positions is None else len(each.positions)
    positions = message.rows if each.generation is not None else positions
    columns = None if each.columns is None else len(each.columns)
    for (since, rows), (end, _) in pairwise([*starts, (until, 0)]):
        part: Any = partial(dict, past=message.cached, since=since, until=end, positions=positions, columns=columns)
        message.flops += costs.flops(rows, message.tokens, **part())
        message.bytes = max(message.bytes, int(costs.bytes(rows, message.tokens, **part(stepwise=stepwise))))
    if message.cached:
        message.bytes += int(costs.cache(1, message.cached))
    if message.calls > 1:  # the steps after the prompt have a token each, and attend to ever more
        steps, rows = message.calls - 1, message.rows
        message.flops += steps * costs.flops(rows, 1, past=message.tokens + steps // 2)
        message.bytes += int(costs.cache(rows, message.tokens + steps))


def _forks(each: Pass) -> list[tuple[int, int]]:
    """The first layer that has so many rows, and how many, wherever rows fork; behind the last layer is the norm.

    Rows that fork when a layer has returned something are first computed apart by the next.
    """
    layers = {path: at for at, path in enumerate(each.model.catalogue.layers)}
    return [(layers.get(place.module, len(layers)) + (place.side == OUTPUT), rows) for place, rows in each.forks]


def _part(catalogue: Catalogue, index: int) -> str:
    return f"layers.{index}" if index < catalogue.num_layers else "norm"


def _address(catalogue: Catalogue, location: Location) -> str:
    inside = [part for operation in location.operations for part in (SOURCE, operation)]
    if inside:  # what has a short name of its own is known by that
        raw = ".".join([location.module, *inside, location.side])
        named = [each.name for each in catalogue.names.values() if each.part and _is_at(each.part.address, raw)]
        if len(named) == 1:
            return named[0]
    return ".".join([part for part in (_name(catalogue, location), *inside, location.side) if part])


def _is_at(address: str, location: str) -> bool:
    """Whether an address is of a value there, or of a part of one."""
    address = address.replace("[*]", "")
    return address == location or address.startswith(f"{location}[")


def _name(catalogue: Catalogue, location: Location) -> str:
    """The canonical name of a module, or that of the one around it and the way from there."""
    path, rest = location.module, list[str]()
    names = catalogue.canonical
    while path and path not in names:
        path, _, tail = path.rpartition(".")
        rest.insert(0, tail)
    return ".".join([*([names[path]] if path else []), *rest])
