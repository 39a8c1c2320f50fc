"""The program that `serving.Server` starts: serve the models that standard input names, until it is closed.

The first line of standard input is JSON:
`{"models": {name: {"path": …, "dtype": …}}, "token": …, "limits": {…}, "jobs": directory or ""}`.
"LISTENING host:port" is printed when requests can come.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import torch

import odd  # noqa: F401  registers a model
from patchwire_worker.config import Limits, ServerConfig
from patchwire_worker.models.hosted import HostedModel
from patchwire_worker.models.loading import load
from patchwire_worker.server import Server, serve


def main() -> None:
    """Load, listen, serve."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    told = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    torch.set_num_threads(1)
    models = {
        name: HostedModel(load(spec["path"], name=name, device="cpu", dtype=spec["dtype"], attention=spec["attention"]))
        for name, spec in told["models"].items()
    }
    jobs = Path(told["jobs"]) if told["jobs"] else None
    config = ServerConfig(token=told["token"], limits=Limits(**told["limits"]), jobs=jobs)
    asyncio.run(serve(models, config, _say))


def _say(server: Server) -> None:
    print(f"LISTENING {server.address}", flush=True)


def _end_with_standard_input() -> None:
    """Nobody is left who could use the server."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
