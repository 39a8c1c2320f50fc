"""A server that goes away early, or sends what nobody asked for: the client says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

import patchwire
from integration import messages
from patchwire import graph as g
from patchwire import tensors
from patchwire.connection import Connection
from patchwire.results import Progress
from patchwire.v1 import service_pb2, service_pb2_grpc
from patchwire.version import PROTOCOL_VERSION


class Strange(service_pb2_grpc.PatchwireServiceServicer):
    """Shakes hands, and then answers a run with what it is told to."""

    answer: Callable[[grpc.ServicerContext], Iterator[service_pb2.RunResponse]]

    def Handshake(self, request, context):
        return service_pb2.HandshakeResponse(protocol_version=PROTOCOL_VERSION)

    def Run(self, request, context):
        yield from self.answer(context)


@pytest.fixture
def strange() -> Iterator[tuple[Strange, Connection]]:
    servicer = Strange()
    server = grpc.server(ThreadPoolExecutor(2))
    service_pb2_grpc.add_PatchwireServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    connection = Connection(f"127.0.0.1:{port}")
    yield servicer, connection
    connection.close()
    server.stop(None).wait()


def run(connection: Connection, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Ask for a value of three numbers of float32, or of another dtype."""
    message = messages.graph("any", messages.read("logits"), messages.save(0))
    if dtype is not None:
        message.nodes[1].save.dtype = tensors.dtype_to_proto(dtype)
    graph = g.graph_from_proto(message)
    graph.nodes[0].meta["fake"] = torch.empty(3, device="meta")
    return connection.run(graph, Progress(show=False)).saved


def sends(tensor: torch.Tensor) -> Callable[[grpc.ServicerContext], Iterator[service_pb2.RunResponse]]:
    def answer(context: grpc.ServicerContext) -> Iterator[service_pb2.RunResponse]:
        saved = service_pb2.Event(saved=service_pb2.Saved(node=1, header=tensors.header(tensor)))
        chunks = [service_pb2.Event(chunk=chunk) for chunk in tensors.chunks(tensor)]
        yield service_pb2.RunResponse(events=[saved, *chunks, service_pb2.Event(done=service_pb2.Done())])

    return answer


def goes_away(context: grpc.ServicerContext) -> Iterator[service_pb2.RunResponse]:
    context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    yield service_pb2.RunResponse()


def test_one_that_goes_away_before_it_says_anything_is_lost_and_then_gone(strange):
    servicer, connection = strange
    servicer.answer = goes_away

    with pytest.raises(patchwire.ConnectionLostError):
        run(connection)
    with pytest.raises(patchwire.ConnectionFailedError):
        run(connection)

    servicer.answer = sends(torch.ones(3))
    assert torch.equal(run(connection)[0], torch.ones(3))
    servicer.answer = goes_away
    with pytest.raises(patchwire.ConnectionLostError):
        run(connection)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("sent", [torch.ones(4), torch.ones(3, 1), torch.ones(3).double(), torch.ones(3).half()])
def test_a_value_of_another_shape_or_dtype_is_not_taken(strange, dtype, sent):
    servicer, connection = strange
    servicer.answer = sends(sent)

    with pytest.raises(patchwire.GraphError, match=r"of shape .* and torch\.\w+ where \[3\] and torch\.\w+ was asked"):
        run(connection, dtype)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_value_of_the_dtype_that_was_asked_for_is_taken(strange, dtype):
    servicer, connection = strange
    servicer.answer = sends(torch.ones(3, dtype=dtype))

    assert run(connection, dtype)[0].dtype is (dtype or torch.float32)
