"""Logs: what values look like is printed where the program runs, while the pass goes on."""

from __future__ import annotations

import warnings
from pathlib import Path

import grpc
import pytest
import torch

import patchwire
from conformance.hooks import record
from integration import messages
from integration.refusals import refused
from patchwire import GraphError, SiteError, logs
from patchwire.results import Progress
from patchwire.status import error_from_call
from patchwire.v1 import graph_pb2, service_pb2

IDS = [1, 2, 3, 4, 5]


@pytest.fixture
def model(served) -> patchwire.Model:
    return served["gpt2"]


def line_of(mark: str) -> str:
    """The file and number of the line with a comment, as they are printed."""
    lines = Path(__file__).read_text().splitlines()
    return f"test_logging.py:{next(number for number, each in enumerate(lines, 1) if each.endswith(f'# {mark}'))}"


def log(*parts) -> graph_pb2.Node:
    return graph_pb2.Node(log=graph_pb2.Log(parts=[messages.argument(each) for each in parts]))


class TestALog:
    def test_is_printed_with_its_line_and_its_texts(self, model, capsys):
        with model.trace(IDS) as trace:
            norm = model.layers[1].output.norm()
            trace.log("norm", norm, 7)  # norm
            norm.save()

        assert capsys.readouterr().out == f"{line_of('norm')}  norm {norm.value!r} 7\n"

    def test_shows_what_a_hook_sees(self, model, references, capsys):
        with model.trace(IDS) as trace:
            trace.log(model.layers[1].output[0, 0, :4])

        seen = record(references["gpt2"], IDS)["transformer.h.1", "output", ()][0, 0, :4]
        assert repr(seen) in capsys.readouterr().out

    def test_shows_a_value_as_it_is_at_that_line(self, model, capsys):
        with model.trace(IDS) as trace:
            hidden = model.layers[1].output
            hidden[:] = 1
            trace.log("before", hidden.sum())
            hidden[:] = 2
            trace.log("after", hidden.sum())

        assert "before tensor(120.)" in (out := capsys.readouterr().out)
        assert "after tensor(240.)" in out

    def test_shows_large_tensors_as_pytorch_abbreviates_them(self, model, capsys):
        with model.trace(IDS) as trace:
            large = torch.arange(30_000.0).reshape(30, 1000)
            trace.log("large", large)

        assert repr(torch.arange(30_000.0).reshape(30, 1000)) in capsys.readouterr().out

    def test_shows_every_item_of_a_tuple(self, model, capsys):
        with model.trace(IDS) as trace:
            best = model.logits[0, -1].topk(2)
            trace.log("best", best)
            patchwire.save(best)

        out = capsys.readouterr().out
        assert repr(best.values.value) in out
        assert repr(best.indices.value) in out

    def test_is_enough_for_a_block(self, model, capsys):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with model.trace(IDS) as trace:
                trace.log("only", model.layers[0].output.sum())

        assert "only tensor(" in capsys.readouterr().out
        assert trace.stats.passes == 1

    def test_comes_from_every_prompt_with_its_own_numbers(self, model, capsys):
        with model.trace() as trace:
            sums = []
            for ids in (IDS, [7, 8]):
                with trace.invoke(ids):
                    sums.append(model.layers[1].output.sum().save())
                    trace.log(f"{len(ids)} tokens", sums[-1])

        out = capsys.readouterr().out
        assert f"5 tokens {sums[0].value!r}" in out
        assert f"2 tokens {sums[1].value!r}" in out

    def test_keeps_the_order_of_the_forward_pass(self, model, capsys):
        with model.trace(IDS) as trace:
            last, first = model.layers[2].output.sum(), model.layers[0].output.sum()
            trace.log("last", last)
            trace.log("first", first)

        out = capsys.readouterr().out
        assert out.index("first") < out.index("last")

    def test_leaves_the_progress_bar_alone(self, model, capsys, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")
        progress = Progress(show=True)
        progress.queued(3)
        progress.logged("norm tensor(1.)", None)
        progress.close()

        assert "norm tensor(1.)" in capsys.readouterr().out


class TestStreaming:
    def test_tells_a_log_while_the_pass_goes_on(self, stub):
        nodes = [messages.read("layers.0.output"), log("first", messages.node(0))]
        nodes += [messages.call("torch.Tensor.new_ones", messages.node(0), [1024, 1024])]
        nodes += [messages.call("operator.matmul", messages.node(2), messages.node(index)) for index in range(2, 60)]
        graph = messages.graph("gpt2", *nodes, messages.save(len(nodes) - 1))

        call = stub.Run(service_pb2.RunRequest(graph=graph))
        kinds = []
        for response in call:
            kinds += [event.WhichOneof("kind") for event in response.events]
            if "logged" in kinds:
                break
        call.cancel()

        assert "done" not in kinds

    def test_says_no_more_than_is_bounded(self, stub):
        long = log(*["x" * 256] * 100, messages.node(1))
        nodes = [messages.read("layers.0.output"), messages.call("torch.sum", messages.node(0))]
        graph = messages.graph("gpt2", *nodes, *[long] * 200)
        found = [
            e.logged for e in messages.events(stub.Run(service_pb2.RunRequest(graph=graph))) if e.HasField("logged")
        ]

        assert [each.node for each in found] == list(range(2, 202))
        assert all(len(each.text) <= logs.MAX_LENGTH for each in found)
        assert sum(len(each.text) for each in found) <= logs.MAX_TOTAL

        graph.nodes.extend([long] * 200)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Run(service_pb2.RunRequest(graph=graph)))
        assert "4,194,304 characters" in error_from_call(caught.value, "here").message

    @pytest.mark.parametrize(
        "part",
        [3, True, [messages.node(0)], None, "x" * 1000, messages.node(7), messages.node(1)],
        ids=["number", "bool", "list", "none", "long text", "later node", "pieces"],
    )
    def test_refuses_what_is_no_text_and_no_tensor(self, stub, part):
        nodes = [messages.read("layers.0.output"), messages.call("torch.unbind", messages.node(0))]
        graph = messages.graph("gpt2", *nodes, log("a", part))

        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Run(service_pb2.RunRequest(graph=graph)))

        assert type(error_from_call(caught.value, "here")) is GraphError


class TestRefusals:
    def test_after_the_block(self, model):
        with model.trace(IDS) as trace:
            norm = model.layers[1].output.norm().save()
        with refused(GraphError, "block has ended"):
            trace.log(norm)  # this line

    def test_of_a_tuple_that_is_not_one_tensor(self, model):
        with refused(SiteError, "not one tensor"), model.trace(IDS) as trace:
            trace.log(model.transformer.h[0].attn.output)  # this line

    def test_of_a_text_that_is_too_long(self, model):
        with refused(GraphError, "300 characters"), model.trace(IDS) as trace:
            trace.log("x" * 300)  # this line

    def test_in_a_branch(self, model):
        with refused(GraphError, "log a value"), model.trace(IDS) as trace:

            def branch(h):
                trace.log(h)  # this line
                return h

            patchwire.cond(model.layers[1].output.norm() > 0, branch, lambda h: h, model.layers[1].output)


def test_what_a_terminal_would_obey_is_not_printed(capsys):
    Progress().logged("a\x1b[2Jb\rc\nd", None)

    assert capsys.readouterr().out == "a�[2Jb�c\nd\n"
