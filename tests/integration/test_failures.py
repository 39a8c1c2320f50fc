"""What goes wrong around a request: cancelled, late, one too many, a server that dies. Everybody else is served."""

from __future__ import annotations

import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

import patchwire
import tiny
from integration import messages
from integration.refusals import refused
from patchwire.results import Progress
from patchwire.status import error_from_call
from patchwire.v1 import graph_pb2, service_pb2
from serving import Server

# Longer than any request here takes, and shorter than what is cancelled would have taken.
PATIENCE = 120


def values(model: patchwire.Model, ids: list[int]) -> torch.Tensor:
    with model.trace(ids):
        logits = model.logits.save()
    return logits.value


def until(events, kind: str):
    """Read events up to the first of a kind."""
    for event in messages.events(events):
        if event.WhichOneof("kind") == kind:
            return event
    raise AssertionError(f"the request ended without {kind}")


def small(model: str) -> service_pb2.RunRequest:
    return service_pb2.RunRequest(graph=messages.graph(model, messages.read("logits"), messages.save(0)))


class TestAConnectionThatWasClosed:
    def test_says_so_instead_of_what_was_asked_for(self, server):
        client = patchwire.connect(server.address, progress=False)
        model = client.model("gpt2")
        client.close()
        for ask in (lambda: values(model, [1, 2]), client.models, client.jobs):
            with refused(patchwire.ConnectionFailedError, "closed by this program", hint="connect", line=False):
                ask()


class TestCancelling:
    def test_stops_a_pass_that_runs(self, stub):
        # Thousands of steps, many minutes of work: who comes next is served only if the rest of it is not done.
        events = stub.Run(service_pb2.RunRequest(graph=messages.slow("gpt2", steps=3_000)))
        until(events, "running")

        events.cancel()

        assert until(stub.Run(small("gpt2"), timeout=PATIENCE), "done")

    def test_is_noted_by_the_server(self, server, stub):
        before = server.log.count("cancelled by its client")
        events = stub.Run(service_pb2.RunRequest(graph=messages.slow("gpt2", steps=3_000)))
        until(events, "running")

        events.cancel()

        until(stub.Run(small("gpt2"), timeout=PATIENCE), "done")
        assert server.log.count("cancelled by its client") == before + 1
        assert "Traceback" not in server.log

    def test_takes_a_request_that_waits_out_of_the_queue(self, stub):
        running = stub.Run(service_pb2.RunRequest(graph=messages.slow("gpt2", steps=3_000)))
        until(running, "running")
        waiting = [stub.Run(service_pb2.RunRequest(graph=messages.slow("gpt2", steps=3_000))) for _ in range(3)]
        for each in waiting:
            until(each, "queued")

        for each in (*waiting, running):
            each.cancel()

        assert until(stub.Run(small("gpt2"), timeout=PATIENCE), "done")

    def test_does_not_disturb_a_request_of_another_model(self, stub, served, references):
        events = stub.Run(service_pb2.RunRequest(graph=messages.slow("gpt2", steps=3_000)))
        until(events, "running")

        during = values(served["mamba"], [1, 2, 3])
        events.cancel()

        with torch.no_grad():
            torch.testing.assert_close(during, references["mamba"](torch.tensor([[1, 2, 3]]), use_cache=False).logits)

    def test_does_not_keep_the_server_from_answering_who_looks_into_its_model(self, stub):
        # The second model of a request; and a function that no other test looks into.
        graph = small("gpt2").graph
        graph.traces.add(model="llama").invokes.add().rows.add(ids=[1, 2])
        address = "model.layers.2.mlp.source.self_down_proj_0.output"
        graph.nodes.add().read.site.MergeFrom(graph_pb2.Site(trace=1, address=address))
        graph.nodes.add().save.value = 2
        busy = stub.Run(service_pb2.RunRequest(graph=messages.slow("llama", steps=3_000)))
        until(busy, "running")

        looking = stub.Run(service_pb2.RunRequest(graph=graph))
        for _ in range(20):
            assert stub.ListModels(service_pb2.ListModelsRequest(), timeout=PATIENCE / 4).models
        assert busy.is_active()
        busy.cancel()

        assert until(looking, "done")


class TestDeadlines:
    def test_are_honoured(self, server):
        with patchwire.connect(server.address, timeout=1.0, progress=False) as client:
            model = client.model("gpt2")
            with refused(patchwire.TimeoutError, "deadline", line=False), model.trace([1, 2, 3]):
                compute_for_a_long_time(model)

            assert values(model, [1, 2, 3]).shape == (1, 3, 61)


class TestAFullQueue:
    def test_refuses_the_next_at_once_and_says_what_to_do(self, strict_stub, authorized):
        running = strict_stub.Run(service_pb2.RunRequest(graph=messages.slow("chatty")), metadata=authorized)
        until(running, "running")
        waiting = strict_stub.Run(service_pb2.RunRequest(graph=messages.slow("chatty")), metadata=authorized)
        assert until(waiting, "queued").queued.position == 1

        with pytest.raises(grpc.RpcError) as caught:
            list(strict_stub.Run(small("chatty"), metadata=authorized))
        error = error_from_call(caught.value, "here")
        waiting.cancel()
        running.cancel()

        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert type(error) is patchwire.BusyError
        assert "Try again" in error.hint
        # Another model has a queue of its own, and this one is free again.
        assert until(strict_stub.Run(small("deep"), metadata=authorized, timeout=PATIENCE), "done")
        assert until(strict_stub.Run(small("chatty"), metadata=authorized, timeout=PATIENCE), "done")

    def test_refuses_who_asks_what_is_inside_a_model_meanwhile(self, strict_stub, authorized):
        running = strict_stub.Run(service_pb2.RunRequest(graph=messages.slow("deep")), metadata=authorized)
        until(running, "running")
        requests = [service_pb2.DescribeSourceRequest(model="deep", module=f"layers.{index}.mlp") for index in range(3)]
        asked = [strict_stub.DescribeSource.future(each, metadata=authorized) for each in requests]
        refusals = [error_from_call(each.exception(PATIENCE), "here") for each in asked if each.exception(PATIENCE)]
        running.cancel()

        assert len(refusals) == 1
        assert type(refusals[0]) is patchwire.BusyError
        assert "what is inside this model" in refusals[0].message
        assert "Try again" in refusals[0].hint


class TestManyClients:
    def test_each_get_their_own_numbers(self, server, references):
        def work(number: int) -> list[torch.Tensor]:
            with patchwire.connect(server.address, progress=False) as client:
                model = client.model("gpt2")
                results = []
                for round_ in range(6):
                    with model.trace(tiny.prompt(3 + number, seed=round_)):
                        model.layers[1].mlp.output[:, -1] = float(number)
                        results.append(model.logits.save())
                return [each.value for each in results]

        def expected(number: int, round_: int) -> torch.Tensor:
            def ablate(module, args, output):
                output[:, -1] = float(number)

            handle = references["gpt2"].transformer.h[1].mlp.register_forward_hook(ablate)
            with torch.no_grad():
                logits = references["gpt2"](torch.tensor([tiny.prompt(3 + number, seed=round_)])).logits
            handle.remove()
            return logits

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(work, range(4)))

        for number, results in enumerate(found):
            for round_, logits in enumerate(results):
                torch.testing.assert_close(logits, expected(number, round_))

    def test_share_one_connection_from_several_threads(self, served, references):
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda length: values(served["llama"], tiny.prompt(length)), range(2, 10)))

        for length, logits in zip(range(2, 10), found, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(logits, references["llama"](torch.tensor([tiny.prompt(length)])).logits)


class TestDeadServers:
    def test_nobody_listens(self):
        with socket.socket() as taken:  # bound and not listening: nobody else can answer there
            taken.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(patchwire.ConnectionFailedError, match=f"No server answers at {address}") as caught:
                patchwire.connect(address)
        assert "patchwire serve" in caught.value.hint

    def test_the_address_is_none(self):
        with pytest.raises(patchwire.ConnectionFailedError):
            patchwire.connect("no-such-host.invalid:50051")

    def test_something_else_listens(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def answer() -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

            thread = threading.Thread(target=answer)
            thread.start()
            with pytest.raises(patchwire.ConnectionFailedError):
                patchwire.connect(f"127.0.0.1:{listener.getsockname()[1]}")
            thread.join()

    def test_it_is_killed_in_mid_run_and_stays_dead(self, tmp_path, monkeypatch):
        tiny.save("gpt2", tmp_path / "gpt2")
        with Server({"gpt2": tmp_path / "gpt2"}) as server, patchwire.connect(server.address, progress=False) as client:
            model = client.model()
            monkeypatch.setattr(Progress, "running", lambda *_: server.process.send_signal(signal.SIGKILL))
            with (
                refused(patchwire.ConnectionLostError, "in the middle", hint="run it again", line=False),
                model.trace([1, 2, 3]),
            ):
                compute_for_a_long_time(model)
            server.process.wait()

            with refused(patchwire.ConnectionFailedError, "No server answers", line=False), model.trace([1, 2, 3]):
                model.logits.save()

    def test_it_is_told_to_stop_in_mid_run(self, tmp_path, monkeypatch):
        tiny.save("gpt2", tmp_path / "gpt2")
        with Server({"gpt2": tmp_path / "gpt2"}) as server, patchwire.connect(server.address, progress=False) as client:
            model = client.model()
            monkeypatch.setattr(Progress, "running", lambda *_: server.process.send_signal(signal.SIGTERM))
            with pytest.raises((patchwire.CancelledError, patchwire.ConnectionLostError)), model.trace([1, 2, 3]):
                compute_for_a_long_time(model)

            assert server.process.wait(PATIENCE) == 0


def compute_for_a_long_time(model: patchwire.Model) -> None:
    value = model.layers[0].output.new_ones(2048, 2048)
    for _ in range(400):
        value = value @ value
    value.sum().save()


BAD = [
    messages.graph("gpt2"),
    messages.graph("gpt2", messages.save(0)),
    messages.graph("nobody", messages.read("logits")),
    messages.graph("gpt2", messages.read("layers.99.output"), messages.save(0)),
    messages.graph("gpt2", messages.read("logits"), messages.call("os.system", "true")),
    messages.graph("gpt2", messages.read("logits"), messages.call("torch.reshape", messages.node(0), [7])),
    messages.graph("gpt2", messages.read("logits"), messages.write("layers.0.output", 0)),
    messages.graph("gpt2", messages.call("operator.pow", 9, 10**9), messages.save(0)),
    messages.graph("gpt2", messages.apply("lm_head"), messages.save(0)),
    messages.graph("gpt2", messages.read("logits"), messages.apply("", messages.node(0)), messages.save(1)),
    messages.graph("gpt2", messages.read("a." * 300_000 + "output"), messages.save(0)),
    messages.graph("gpt2", messages.read("logits"), messages.save(0), rows=[[10**9]]),
]


@pytest.mark.parametrize("graph", BAD, ids=range(len(BAD)))
def test_after_a_bad_request_the_next_one_gets_its_numbers(stub, served, references, graph):
    try:
        list(stub.Run(service_pb2.RunRequest(graph=graph), timeout=PATIENCE))
        said = None
    except grpc.RpcError as failed:
        said = error_from_call(failed, "here")

    assert said is None or "internal" not in said.message
    with torch.no_grad():
        torch.testing.assert_close(
            values(served["gpt2"], [1, 2, 3]), references["gpt2"](torch.tensor([[1, 2, 3]])).logits
        )
