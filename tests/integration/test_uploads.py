"""Constants: small ones travel in the graph, large ones once."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
import torch

import patchwire
from integration import messages
from integration.refusals import refused
from patchwire import graph as g
from patchwire import tensors
from patchwire.status import error_from_call
from patchwire.v1 import graph_pb2, service_pb2, service_pb2_grpc, tensor_pb2

LARGE = g.INLINE_BYTES // 4 + 1


@pytest.fixture
def uploads(monkeypatch) -> list[list[bytes]]:
    """The hashes that every upload of this test brings back; connect after asking for this."""
    seen: list[list[bytes]] = []

    class WatchedStub(service_pb2_grpc.PatchwireServiceStub):
        def __init__(self, channel: grpc.Channel) -> None:
            super().__init__(channel)
            upload = self.Upload

            def watched(*args, **kwargs):
                response = upload(*args, **kwargs)
                seen.append(list(response.hashes))
                return response

            self.Upload = watched

    monkeypatch.setattr(service_pb2_grpc, "PatchwireServiceStub", WatchedStub)
    return seen


@pytest.fixture
def model(uploads, server) -> Iterator[patchwire.Model]:
    """A model over a connection that has uploaded nothing yet, and is watched."""
    with patchwire.connect(server.address, progress=False) as client:
        yield client.model("gpt2")


def doubled(model: patchwire.Model, constant: torch.Tensor) -> torch.Tensor:
    with model.trace([1, 2, 3]):
        zero = model.layers[0].output.sum() * 0
        result = ((zero + constant)[:10] * 2).save()
    return result.value


def fresh(seed: int, length: int = LARGE) -> torch.Tensor:
    return torch.rand(length, generator=torch.Generator().manual_seed(seed))


def test_a_small_constant_travels_in_the_graph(model, uploads):
    constant = fresh(1, LARGE - 1)

    assert torch.equal(doubled(model, constant), constant[:10] * 2)
    assert uploads == []


def test_a_large_constant_is_uploaded_once(model, uploads):
    constant = fresh(2)

    for _ in range(3):
        assert torch.equal(doubled(model, constant), constant[:10] * 2)
    assert uploads == [[tensors.digest(constant)]]


def test_a_constant_that_was_changed_is_another_one(model, uploads):
    constant = fresh(3)
    doubled(model, constant)
    constant += 1

    assert torch.equal(doubled(model, constant), constant[:10] * 2)
    assert len(uploads) == 2


def test_a_constant_is_what_it_was_when_it_was_used(model):
    constant = fresh(4)
    before = constant.clone()
    with model.trace([1, 2, 3]):
        result = (model.layers[0].output.sum() * 0 + constant[:10]).save()
        constant.zero_()

    assert torch.equal(result.value, before[:10])


def test_the_same_constant_twice_in_a_graph_is_uploaded_once(model, uploads):
    constant = fresh(5)
    with model.trace([1, 2, 3]):
        zero = model.layers[0].output.sum() * 0
        result = (zero + constant + constant.clone()).save()

    assert torch.equal(result.value, constant * 2)
    assert len(uploads) == 1
    assert len(uploads[0]) == 1


def test_two_connections_share_what_one_has_uploaded(server, model):
    constant = fresh(6)
    doubled(model, constant)

    with patchwire.connect(server.address, progress=False) as other:
        assert torch.equal(doubled(other.model("gpt2"), constant), constant[:10] * 2)


def test_what_the_server_has_dropped_is_uploaded_again_unasked(uploads, strict_client, limits):
    model = strict_client.model("chatty")
    length = limits["constant_bytes"] // 4
    first = fresh(7, length)
    doubled(model, first)
    for seed in (8, 9):  # together they are more than the server keeps
        doubled(model, fresh(seed, length))

    assert torch.equal(doubled(model, first), first[:10] * 2)
    assert [each[0] for each in uploads].count(tensors.digest(first)) == 2


def test_many_that_the_server_has_dropped_are_all_uploaded_again(server, uploads):
    with patchwire.connect(server.address, progress=False) as client:
        many = [fresh(100 + seed) for seed in range(70)]  # an error names only the first 64
        client.connection._uploaded.update(tensors.digest(each) for each in many)  # as if it had been dropped since
        model = client.model("gpt2")
        with model.trace([1, 2, 3]):
            total = model.layers[0].output.sum() * 0
            for each in many:
                total = total + each
            total = total[:10].save()

    torch.testing.assert_close(total.value, sum(each[:10] for each in many))
    assert [len(each) for each in uploads] == [70]


def test_more_than_the_server_can_keep_is_refused_with_figures(strict_client, limits):
    model = strict_client.model("chatty")
    length = limits["constant_bytes"] // 4
    constants = [fresh(seed, length) for seed in (10, 11)]

    with (
        refused(patchwire.LimitError, "2 large tensors", "800,000 bytes", hint="smaller", line=False),
        model.trace([1, 2, 3]),
    ):
        zero = model.layers[0].output.sum() * 0
        (zero + constants[0] + constants[1])[:10].save()


def test_an_empty_constant_travels(model):
    with model.trace([1, 2, 3]):
        result = torch.cat([model.layers[0].output.flatten(), torch.empty(0)]).save()

    assert result.shape == (72,)


def test_a_hash_that_the_server_does_not_have_is_named(stub):
    graph = messages.graph("gpt2", messages.read("logits"), graph_pb2.Node(constant=0), messages.save(1))
    graph.constants.add(uploaded=b"\x01" * 32)

    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(service_pb2.CheckRequest(graph=graph))
    error = error_from_call(caught.value, "here")

    assert type(error) is patchwire.MissingTensorsError
    assert error.missing == (b"\x01" * 32,)


class TestTheUploadItself:
    def header(self, *shape: int) -> service_pb2.UploadRequest:
        return service_pb2.UploadRequest(header=tensor_pb2.TensorHeader(dtype=tensor_pb2.DTYPE_UINT8, shape=shape))

    def chunk(self, data: bytes) -> service_pb2.UploadRequest:
        return service_pb2.UploadRequest(chunk=data)

    def test_takes_several_tensors_and_names_each(self, stub):
        parts = [self.header(3), self.chunk(b"12"), self.chunk(b"3"), self.header(0), self.header(1), self.chunk(b"4")]

        hashes = stub.Upload(iter(parts)).hashes

        expected = [torch.tensor(each, dtype=torch.uint8) for each in ([49, 50, 51], [], [52])]
        assert list(hashes) == [tensors.digest(each) for each in expected]

    def test_of_nothing_is_nothing(self, stub):
        assert list(stub.Upload(iter([])).hashes) == []

    @pytest.mark.parametrize("wrong", ["no header", "nothing", "too many", "too few", "huge", "negative", "odd dtype"])
    def test_that_is_wrong_is_refused(self, stub, wrong):
        parts = {
            "no header": [self.chunk(b"1")],
            "nothing": [service_pb2.UploadRequest()],
            "too many": [self.header(1), self.chunk(b"12")],
            "too few": [self.header(3), self.chunk(b"12")],
            "huge": [self.header(1 << 50)],
            "negative": [self.header(-1)],
            "odd dtype": [service_pb2.UploadRequest(header=tensor_pb2.TensorHeader(dtype=77))],
        }[wrong]

        with pytest.raises(grpc.RpcError) as caught:
            stub.Upload(iter(parts))
        assert type(error_from_call(caught.value, "here")) in (patchwire.GraphError, patchwire.LimitError)

    @pytest.mark.parametrize("before", [0, 1])
    def test_whose_bytes_are_no_message_is_refused_as_the_client_s_mistake(self, server, before):
        parts = [self.header(1).SerializeToString()] * before + [b"\xff" * 20]

        with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
            channel.stream_unary("/patchwire.v1.PatchwireService/Upload")(iter(parts))
        error = error_from_call(caught.value, "here")

        assert type(error) is patchwire.GraphError
        assert "no message" in error.message
        assert error.hint
        assert "in a way that it must not" not in server.log
