"""A server inside the program that uses it: the same service over the same wire, on a free port of this machine."""

from __future__ import annotations

import asyncio
import secrets
import threading
import weakref
from typing import Any

from torch import nn

from patchwire_worker.config import ServerConfig
from patchwire_worker.models.hosted import HostedModel, host
from patchwire_worker.server import Server

_STOP_SECONDS = 5.0


class EmbeddedServer:
    """A server on a thread of its own. Ends with `stop`, or when it is forgotten, or with the program.

    Attributes:
        address: Where it listens: "127.0.0.1:port".
        token: What it asks of clients, so that no other program on this machine gets in.
    """

    def __init__(self, model: HostedModel) -> None:
        self.token = secrets.token_urlsafe()
        self._loop = asyncio.new_event_loop()
        server = Server({model.name: model}, ServerConfig(token=self.token))
        thread = threading.Thread(target=_run, args=(self._loop,), name="patchwire-server", daemon=True)
        thread.start()
        try:
            asyncio.run_coroutine_threadsafe(server.start(), self._loop).result()
        except BaseException:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise
        self.address = server.address
        self._finalizer = weakref.finalize(self, _stop, server, self._loop, thread)

    def stop(self) -> None:
        """End the server."""
        self._finalizer()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _stop(server: Server, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """End the server, and wait for it a while.

    A server that is forgotten may be collected on any thread and in the middle of anything: on its own thread, where
    waiting would be for ever, or while somebody holds what the server needs to end.
    """
    asyncio.run_coroutine_threadsafe(server.stop(), loop).add_done_callback(lambda _: loop.stop())
    if threading.current_thread() is not thread:
        thread.join(_STOP_SECONDS)


def start(spec: str | nn.Module, **options: Any) -> EmbeddedServer:
    """Load a model and serve it on this machine.

    Args:
        spec: A hub id, a directory, a `.gguf` file, `zoo:NAME`, or a loaded Hugging Face model.
        options: As for `patchwire_worker.models.loading.load`: `name`, `device`, `dtype`, `tokenizer`, `attention`,
            `matmul`.

    Raises:
        ModelNotFoundError: the model cannot be loaded.
    """
    return EmbeddedServer(host(spec, **options))
