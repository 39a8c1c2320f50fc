"""Limits: each is refused with figures, before it costs anything, and the next request is served."""

from __future__ import annotations

import grpc
import pytest
import torch

import patchwire
from integration import messages
from integration.refusals import refused
from patchwire.status import error_from_call
from patchwire.v1 import graph_pb2, service_pb2


@pytest.fixture(autouse=True)
def still_serves(chatty):
    """After every test of this file the server answers the next request as before."""
    yield
    with chatty.trace([1, 2, 3]):
        logits = chatty.logits.save()
    assert logits.value.isfinite().all()


def answer(stub, graph, metadata, method="Run") -> patchwire.PatchwireError:
    request = service_pb2.RunRequest(graph=graph) if method == "Run" else service_pb2.CheckRequest(graph=graph)
    ask = getattr(stub, method)
    with pytest.raises(grpc.RpcError) as caught:
        _ = [*ask(request, metadata=metadata)] if method == "Run" else ask(request, metadata=metadata)
    return error_from_call(caught.value, "here")


class TestFoundByTheServer:
    @pytest.mark.parametrize("method", ["Check", "Run"])
    @pytest.mark.parametrize(
        ("graph", "figures"),
        [
            (messages.graph("chatty", *[messages.read("logits")] * 61), ["61", "60"]),
            (messages.graph("chatty", messages.read("logits"), messages.save(0), rows=[[1] * 21, [1]]), ["42", "40"]),
            (
                messages.graph(
                    "chatty",
                    messages.read("logits"),
                    messages.call("torch.Tensor.new_zeros", messages.node(0), [125_001]),
                    messages.save(1),
                ),
                ["500,004", "500,000"],
            ),
            (
                messages.graph(
                    "chatty",
                    messages.read("logits"),
                    messages.call("torch.Tensor.new_zeros", messages.node(0), [5_000_001]),
                    messages.call("torch.sum", messages.node(1)),
                    messages.save(2),
                ),
                ["20,000,004", "20,000,000"],
            ),
        ],
        ids=["nodes", "tokens", "result bytes", "value bytes"],
    )
    def test_before_anything_runs(self, strict_stub, authorized, method, graph, figures):
        error = answer(strict_stub, graph, authorized, method)

        assert type(error) is patchwire.LimitError
        assert all(figure in error.message for figure in figures)

    @pytest.mark.parametrize("method", ["Check", "Run"])
    def test_of_many_traces(self, strict_stub, authorized, method):
        graph = messages.graph("chatty", messages.read("logits"), messages.save(0))
        graph.traces.extend([graph.traces[0]] * 60)

        error = answer(strict_stub, graph, authorized, method)

        assert type(error) is patchwire.LimitError
        assert "61 traces; the server takes 60" in error.message

    @pytest.mark.parametrize("method", ["Check", "Run"])
    def test_of_the_tokens_that_a_generation_may_add(self, strict_stub, authorized, method):
        graph = messages.graph("chatty", messages.read("logits"), messages.save(0))
        graph.traces[0].generation.max_new_tokens = 38

        error = answer(strict_stub, graph, authorized, method)

        assert type(error) is patchwire.LimitError
        assert "would have 41 tokens; the server takes 40" in error.message

    @pytest.mark.parametrize("method", ["Check", "Run"])
    def test_before_anything_looks_at_each_of_many_invokes(self, strict_stub, authorized, method):
        graph = messages.graph("chatty", messages.read("logits"), messages.save(0))
        graph.traces[0].invokes.extend(graph_pb2.Invoke() for _ in range(50_000))

        error = answer(strict_stub, graph, authorized, method)

        assert type(error) is patchwire.LimitError
        assert "more than 100 rows" in error.message

    def test_when_the_size_depends_on_values(self, strict_stub, authorized):
        nodes = [
            messages.read("logits"),
            messages.call("torch.Tensor.new_ones", messages.node(0), [2, 50_000]),
            messages.call("operator.gt", messages.node(1), 0.0),
            messages.call("torch.nonzero", messages.node(2)),  # [100000, 2] int64: more than may be sent
            messages.save(3),
        ]

        error = answer(strict_stub, messages.graph("chatty", *nodes), authorized)

        assert type(error) is patchwire.LimitError
        assert "500,000" in error.message

    def test_when_a_value_grows_from_one_of_unknown_size(self, strict_stub, authorized):
        nodes = [
            messages.read("logits"),
            messages.call("torch.nonzero", messages.node(0)),
            messages.call("torch.Tensor.repeat", messages.node(1), 10_000, 10_000),
            messages.call("torch.sum", messages.node(2)),
            messages.save(3),
        ]

        error = answer(strict_stub, messages.graph("chatty", *nodes), authorized)

        assert type(error) is patchwire.LimitError
        assert "20,000,000" in error.message

    def test_of_the_message_itself(self, strict_stub, authorized):
        graph = messages.graph("chatty", messages.read("logits"))
        graph.lines.add(file="x" * 250_000)

        error = answer(strict_stub, graph, authorized)

        assert type(error) is patchwire.LimitError
        assert "200000" in error.message.replace(",", "")

    def test_of_one_constant(self, strict_client, limits):
        large = torch.zeros(limits["constant_bytes"] // 4 + 1)

        with pytest.raises(patchwire.LimitError, match="400,004 bytes") as caught:
            strict_client.connection.upload([large])
        assert "400,000" in caught.value.message

    def test_of_the_time_that_a_request_may_run(self, strict_stub, authorized):
        error = answer(strict_stub, messages.slow("chatty"), authorized)

        assert type(error) is patchwire.TimeoutError
        assert "5 seconds" in error.message


class TestFoundOnTheLaptop:
    def test_where_the_line_is_that_makes_too_much(self, chatty):
        with refused(patchwire.LimitError, "20,000,000", hint="smaller parts"), chatty.trace([1, 2, 3]):
            hidden = chatty.layers[0].output
            hidden.repeat(10_000, 1, 10).save()  # this line

    def test_when_more_is_saved_than_is_sent(self, chatty):
        with refused(patchwire.LimitError, "800,000", "500,000", hint="bfloat16", line=False), chatty.trace([1, 2, 3]):
            chatty.logits.new_zeros(200_000).save()

    def test_when_the_message_is_too_large(self, chatty):
        with refused(patchwire.LimitError, "200,000", hint="several traces", line=False), chatty.trace([1, 2, 3]):
            total = chatty.logits.sum()
            for number in range(4):
                total = total + torch.full((15_000,), float(number))
            total.save()

    def test_when_there_are_too_many_tokens(self, chatty):
        with refused(patchwire.LimitError, "42", "40", hint="traces", line=False), chatty.trace([[1] * 21, [1]]):
            chatty.logits.save()

    def test_when_there_are_too_many_nodes(self, chatty):
        with refused(patchwire.LimitError, "72", "60", hint="traces", line=False), chatty.trace([1, 2, 3]):
            total = chatty.logits
            for _ in range(70):
                total = total + 1
            total.save()


class TestWorkOfChecking:
    def test_a_short_graph_that_takes_long_to_check_is_answered_as_others_are(self, stub):
        zeros = messages.call("torch.Tensor.new_zeros", messages.node(0), [128, 70])
        diffs = [messages.call("torch.diff", messages.node(1), 63) for _ in range(100)]
        graph = messages.graph("gpt2", messages.read("logits"), zeros, *diffs, messages.save(2))

        saved = stub.Check(service_pb2.CheckRequest(graph=graph)).saved

        assert [list(each.shape) for each in saved] == [[128, 7]]
