"""What runs in the processes of `serving.Server`: serve the models that it names, until it goes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import odd  # noqa: F401  registers a model
from patchwire_worker.config import Limits, ServerConfig
from patchwire_worker.models.hosted import HostedModel
from patchwire_worker.models.loading import load
from patchwire_worker.server import Server, serve


def main(told: Mapping[str, Any], pipe: Connection) -> None:
    """Load, listen, serve.

    Args:
        told: `{"models": {name: {"path": …, "dtype": …, "attention": …}}, "token": …, "limits": {…}, "jobs": directory
            or ""}`.
        pipe: Is told the address when requests can come. When its other end is closed, nobody is left who could use
            the server, and it ends.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    torch.set_num_threads(1)
    models = {
        name: HostedModel(load(spec["path"], name=name, device="cpu", dtype=spec["dtype"], attention=spec["attention"]))
        for name, spec in told["models"].items()
    }
    jobs = Path(told["jobs"]) if told["jobs"] else None
    config = ServerConfig(token=told["token"], limits=Limits(**told["limits"]), jobs=jobs)

    def say(server: Server) -> None:
        pipe.send(server.address)

    asyncio.run(serve(models, config, say))


def _end_with(pipe: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    os.kill(os.getpid(), signal.SIGTERM)
