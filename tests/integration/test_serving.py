"""A server inside the tests' own process: what it keeps of a request, and how it stops."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import torch

import patchwire
import tiny
from integration import messages
from integration.refusals import refused
from patchwire.status import error_from_call
from patchwire.v1 import service_pb2
from patchwire_worker import server as worker
from patchwire_worker.config import Limits, ServerConfig
from patchwire_worker.models.hosted import HostedModel
from patchwire_worker.models.loading import Loaded
from patchwire_worker.server import Server


class Serving:
    """A server on a loop in a thread of its own."""

    def __init__(self, model: HostedModel, limits: Limits | None = None) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.server = Server({"gpt2": model}, ServerConfig(limits=limits or Limits()))
        self.on_loop(self.server.start())

    def on_loop(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def end(self) -> None:
        self.on_loop(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def hosted() -> HostedModel:
    return HostedModel(Loaded("gpt2", tiny.build("gpt2"), None))


@pytest.fixture
def serving(hosted) -> Iterator[Serving]:
    serving = Serving(hosted)
    yield serving
    serving.end()


FAILS = messages.graph(
    "gpt2",
    messages.read("logits"),
    messages.call("torch.nonzero", messages.node(0)),
    messages.call("torch.reshape", messages.node(1), [7]),
    messages.save(2),
)


def test_a_request_that_failed_is_forgotten(serving, monkeypatch):
    admission = serving.server.service.admission
    admit, seen = admission.admit, []

    def watched(message, **rest):
        admitted = admit(message, **rest)
        seen.append(weakref.ref(admitted))
        return admitted

    monkeypatch.setattr(admission, "admit", watched)
    channel, stub = messages.stub(serving.server.address)
    gc.collect()
    gc.disable()
    try:
        with channel, pytest.raises(grpc.RpcError):
            list(stub.Run(service_pb2.RunRequest(graph=FAILS)))
        end = time.monotonic() + 60
        while seen[0]() is not None and time.monotonic() < end:
            time.sleep(0.01)
        assert seen[0]() is None
    finally:
        gc.enable()


def test_a_server_that_stops_ends_its_requests_and_says_so(hosted, caplog):
    serving = Serving(hosted)
    channel, stub = messages.stub(serving.server.address)
    with channel, caplog.at_level(logging.INFO):
        running = stub.Run(service_pb2.RunRequest(graph=messages.slow("gpt2", steps=3_000)))
        next(iter(running))
        waiting = stub.Run(service_pb2.RunRequest(graph=messages.slow("gpt2", steps=3_000)))
        assert next(messages.events(waiting)).HasField("queued")
        serving.end()
        for each in (running, waiting):
            with pytest.raises(grpc.RpcError) as caught:
                list(each)
            error = error_from_call(caught.value, "here", started=True)
            assert type(error) is patchwire.ConnectionLostError
            assert "shutting down" in caught.value.details()

    assert "Traceback" not in caplog.text


def test_one_more_than_a_server_answers_at_a_time_is_told_so(hosted, monkeypatch):
    monkeypatch.setattr(worker, "_OTHER_RPCS", 0)
    serving = Serving(hosted, Limits(queued=0))
    channel, stub = messages.stub(serving.server.address)
    with channel:
        running = stub.Run(service_pb2.RunRequest(graph=messages.slow("gpt2", steps=3_000)))
        next(iter(running))
        with pytest.raises(grpc.RpcError) as caught:
            stub.ListModels(service_pb2.ListModelsRequest())
        serving.end()

    assert type(error_from_call(caught.value, "here")) is patchwire.BusyError


def test_a_tensor_that_does_not_fit_into_the_store_is_refused_with_figures(hosted):
    serving = Serving(hosted, Limits(stored_bytes=1000))
    with (
        patchwire.connect(serving.server.address, progress=False) as client,
        refused(patchwire.LimitError, "4,004 bytes does not fit", "keeps 1,000", hint="smaller", line=False),
    ):
        client.connection.upload([torch.zeros(1001)])
    serving.end()


class TestTheLoop:
    """What takes long is done elsewhere: the loop answers others meanwhile."""

    @pytest.fixture
    def threads(self, serving, monkeypatch) -> list[str]:
        """The names of the threads that admit a graph or keep a tensor."""
        service, names = serving.server.service, []

        def watch(owner: Any, name: str) -> None:
            function = getattr(owner, name)

            def watched(*args: Any, **rest: Any) -> Any:
                names.append(threading.current_thread().name)
                return function(*args, **rest)

            monkeypatch.setattr(owner, name, watched)

        watch(service.admission, "admit")
        watch(service.store, "put")
        return names

    @pytest.mark.parametrize(
        ("nodes", "words", "apart"),
        [(1, 10, False), (300, 10, True), (1, 100_000, True)],
        ids=["small", "nodes", "bytes"],
    )
    def test_checks_only_small_graphs(self, serving, threads, nodes, words, apart):
        graph = messages.graph("gpt2", *[messages.read("logits")] * nodes)
        graph.lines.add(file="x" * words)
        channel, stub = messages.stub(serving.server.address)
        with channel:
            stub.Check(service_pb2.CheckRequest(graph=graph))

        assert [name.startswith("requests") for name in threads] == [apart]

    @pytest.mark.parametrize(("length", "apart"), [(100, False), (100_000, True)])
    def test_keeps_only_small_tensors(self, serving, threads, length, apart):
        with patchwire.connect(serving.server.address, progress=False) as client:
            client.connection.upload([torch.ones(length)])

        assert [name.startswith("requests") for name in threads] == [apart]
