"""Messages written by hand, as a client of another make would, or a hostile one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import grpc

from patchwire.v1 import graph_pb2, service_pb2, service_pb2_grpc


def argument(value: Any) -> graph_pb2.Argument:
    """An argument; `("node", 3)` refers to node 3."""
    match value:
        case ("node", int(index)):
            return graph_pb2.Argument(node=index)
        case bool():
            return graph_pb2.Argument(boolean=value)
        case int():
            return graph_pb2.Argument(integer=value)
        case float():
            return graph_pb2.Argument(real=value)
        case str():
            return graph_pb2.Argument(text=value)
        case list():
            return graph_pb2.Argument(list=graph_pb2.Sequence(items=[argument(each) for each in value]))
        case tuple():
            return graph_pb2.Argument(tuple=graph_pb2.Sequence(items=[argument(each) for each in value]))
    return graph_pb2.Argument(none=graph_pb2.NoneValue())


def node(index: int) -> tuple[str, int]:
    return ("node", index)


def read(address: str) -> graph_pb2.Node:
    return graph_pb2.Node(read=graph_pb2.Read(site=graph_pb2.Site(address=address)))


def write(address: str, value: int) -> graph_pb2.Node:
    return graph_pb2.Node(write=graph_pb2.Write(site=graph_pb2.Site(address=address), value=value))


def call(name: str, *args: Any, **kwargs: Any) -> graph_pb2.Node:
    named = {key: argument(value) for key, value in kwargs.items()}
    return graph_pb2.Node(call=graph_pb2.Call(op=name, args=[argument(each) for each in args], kwargs=named))


def apply(module: str, *args: Any) -> graph_pb2.Node:
    return graph_pb2.Node(apply=graph_pb2.Apply(module=module, args=[argument(each) for each in args]))


def parameter(path: str) -> graph_pb2.Node:
    return graph_pb2.Node(parameter=graph_pb2.Parameter(path=path))


def save(value: int) -> graph_pb2.Node:
    return graph_pb2.Node(save=graph_pb2.Save(value=value))


def graph(model: str, *nodes: graph_pb2.Node, rows: Any = ((1, 2, 3),)) -> graph_pb2.Graph:
    """A graph of one trace with one invoke."""
    invoke = graph_pb2.Invoke(rows=[graph_pb2.TokenRow(ids=row) for row in rows])
    return graph_pb2.Graph(traces=[graph_pb2.Trace(model=model, invokes=[invoke])], nodes=nodes)


def at_a_line(graph: graph_pb2.Graph) -> graph_pb2.Graph:
    """The same graph, as if all of it, the bodies of its loops too, came from line 3 of user.py."""
    found = graph_pb2.Graph()
    found.CopyFrom(graph)
    found.lines.extend([graph_pb2.SourceLine(), graph_pb2.SourceLine(file="user.py", line=3, code="x")])
    for each in found.nodes:
        each.line = 1
    for trace in found.traces:
        if trace.HasField("loop"):
            trace.loop.body.CopyFrom(at_a_line(trace.loop.body))
    return found


def slow(model: str, steps: int = 50, size: int = 2048) -> graph_pb2.Graph:
    """A graph that computes for a long time at the first layer, in steps of which each is short."""
    nodes = [read("layers.0.output"), call("torch.Tensor.new_ones", node(0), [size, size])]
    nodes += [call("operator.matmul", node(1), node(index)) for index in range(1, steps)]
    total = call("torch.sum", node(len(nodes) - 1))
    return graph(model, *nodes, total, save(len(nodes)))


def stub(address: str) -> tuple[grpc.Channel, service_pb2_grpc.PatchwireServiceStub]:
    """A channel to a server, and the bare methods of the protocol."""
    channel = grpc.insecure_channel(address)
    return channel, service_pb2_grpc.PatchwireServiceStub(channel)


def events(responses: Iterable[service_pb2.RunResponse]) -> Iterator[service_pb2.Event]:
    """What responses tell, one after the other."""
    for response in responses:
        yield from response.events
