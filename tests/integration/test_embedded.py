"""A server inside a program ends whenever it is forgotten, wherever that happens."""

from __future__ import annotations

import asyncio
import threading

import pytest

import patchwire
import tiny
from patchwire_worker.embedded import EmbeddedServer
from patchwire_worker.models.hosted import HostedModel
from patchwire_worker.models.loading import Loaded

PATIENCE = 60


@pytest.fixture(scope="module")
def hosted() -> HostedModel:
    return HostedModel(Loaded("gpt2", tiny.build("gpt2"), None))


def thread_of(loop: asyncio.AbstractEventLoop) -> threading.Thread:
    async def current() -> threading.Thread:
        return threading.current_thread()

    return asyncio.run_coroutine_threadsafe(current(), loop).result(PATIENCE)


def test_stops_when_told_to(hosted):
    server = EmbeddedServer(hosted)
    thread = thread_of(server._loop)
    patchwire.connect(server.address, token=server.token).close()
    server.stop()
    server.stop()

    assert not thread.is_alive()
    assert server._loop.is_closed()


def test_stops_when_it_is_forgotten_on_its_own_thread(hosted):
    server = EmbeddedServer(hosted)
    loop = server._loop
    thread = thread_of(loop)
    kept = [server]
    del server
    loop.call_soon_threadsafe(kept.clear)
    thread.join(PATIENCE)

    assert not thread.is_alive()
    assert loop.is_closed()


def test_several_values_are_saved_beside_it(hosted):
    server = EmbeddedServer(hosted)
    with patchwire.connect(server.address, token=server.token) as client:
        model = client.model("gpt2")
        with model.trace([1, 2, 3]):
            values, indices = patchwire.save(model.logits.topk(2))
    server.stop()

    assert values.shape == indices.shape == (1, 3, 2)
