"""A server that goes away early, or sends what nobody asked for: the client says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

import patchwire
from integration import messages
from integration.refusals import refused
from patchwire import graph as g
from patchwire import tensors
from patchwire.connection import Connection
from patchwire.jobs import JobStatus
from patchwire.results import Progress
from patchwire.v1 import graph_pb2 as pb
from patchwire.v1 import job_pb2, model_pb2, service_pb2, service_pb2_grpc
from patchwire.version import PROTOCOL_VERSION

LIMITS = service_pb2.Limits(constant_bytes=1000)


class Strange(service_pb2_grpc.PatchwireServiceServicer):
    """Shakes hands, and then answers a run with what it is told to."""

    answer: Callable[[grpc.ServicerContext], Iterator[service_pb2.RunResponse]]

    protocol_version = PROTOCOL_VERSION

    def Handshake(self, request, context):
        return service_pb2.HandshakeResponse(
            protocol_version=self.protocol_version, server_version="9.9", limits=LIMITS
        )

    def Upload(self, request_iterator, context):
        return service_pb2.UploadResponse(hashes=[b"another" for each in request_iterator if each.HasField("header")])

    def ListModels(self, request, context):
        return service_pb2.ListModelsResponse(models=[model_pb2.ModelSummary(name="any")])

    def DescribeModel(self, request, context):
        modules = [model_pb2.Module(path="", class_name="Any", calls=1)]
        return service_pb2.DescribeModelResponse(model=model_pb2.ModelDescription(modules=modules))

    def DescribeSource(self, request, context):
        return service_pb2.DescribeSourceResponse(source=model_pb2.Source(module="another", path=["function_0"]))

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


LOOP = pb.Graph(
    traces=[
        *messages.graph("any").traces,
        pb.Trace(
            model="any", loop=pb.Loop(body=messages.graph("any", messages.read("logits"), messages.save(0)), count=2)
        ),
    ],
    nodes=[messages.read("logits"), messages.save(0), pb.Node(loop=pb.RunLoop(trace=1))],
)
"""A request of a value and of a loop of two iterations, which keeps nothing."""


def tells(*events: service_pb2.Event) -> Callable[[grpc.ServicerContext], Iterator[service_pb2.RunResponse]]:
    return lambda context: iter([service_pb2.RunResponse(events=events)])


DONE = service_pb2.Event(done=service_pb2.Done())


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


@pytest.mark.parametrize(
    ("events", "kind", "says"),
    [
        ([], patchwire.ConnectionLostError, "ended the request early"),
        ([DONE], patchwire.GraphError, "without all saved values"),
        ([service_pb2.Event(saved=service_pb2.Saved(node=7))], patchwire.GraphError, "a value that was not asked for"),
        ([service_pb2.Event(chunk=b"1234")], patchwire.GraphError, "bytes of no value"),
        ([service_pb2.Event(logged=service_pb2.Logged(node=7))], patchwire.GraphError, "a log that was not asked for"),
    ],
)
def test_what_was_not_asked_for_is_not_taken(strange, events, kind, says):
    servicer, connection = strange
    servicer.answer = tells(*events)

    with refused(kind, says, line=False):
        run(connection)


@pytest.mark.parametrize(
    ("event", "says"),
    [
        (service_pb2.Event(iterated=service_pb2.Iterated(loop=1, done=3, count=3)), "runs another loop"),
        (service_pb2.Event(iterated=service_pb2.Iterated(loop=0, done=1, count=2)), "runs another loop"),
        (
            service_pb2.Event(saved=service_pb2.Saved(node=1, iteration=service_pb2.Iteration(loop=1, number=2))),
            "runs another loop",
        ),
        (service_pb2.Event(kept=service_pb2.Kept(node=1, handle=b"x", seconds=1.0)), "kept a value that it was not"),
    ],
    ids=["too many iterations", "no loop", "of an iteration too many", "kept"],
)
def test_what_was_not_asked_of_a_loop_is_not_taken(strange, event, says):
    servicer, connection = strange
    servicer.answer = tells(event, DONE)

    with refused(patchwire.GraphError, says, hint="patchwire doctor", line=False):
        connection.run(g.graph_from_proto(LOOP), Progress(show=False))


def test_one_of_another_protocol_is_not_asked_anything(strange):
    servicer, connection = strange
    servicer.protocol_version = PROTOCOL_VERSION + 1

    with refused(patchwire.VersionError, rf"protocol {PROTOCOL_VERSION + 1} \(version 9\.9\)", line=False):
        Connection(connection.address)


def test_one_that_keeps_other_tensors_is_not_trusted(strange):
    _, connection = strange

    with refused(patchwire.GraphError, "other tensors than were sent", line=False):
        connection.upload([torch.ones(3)])


def test_one_that_describes_another_function_is_not_believed(strange):
    _, connection = strange
    model = patchwire.Client(connection).model("any")

    with refused(patchwire.GraphError, "another function than was asked for"):
        print(model.source)  # this line


def test_a_job_in_a_state_of_the_future_is_not_guessed_at():
    with refused(patchwire.VersionError, "state 99", hint="same version", line=False):
        JobStatus.from_proto(job_pb2.Job(state=99))


@pytest.mark.parametrize("address", ["gpu-box", "http://gpu-box:50051", "gpu-box:port"])
def test_what_is_no_address_is_refused_before_anything_is_sent(address):
    with refused(patchwire.ConnectionFailedError, "is not an address", hint="host:port", line=False):
        patchwire.connect(address)
