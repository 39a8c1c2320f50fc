"""A real server in a process of its own, on a free port of this machine, for as long as a test needs it.

The processes are forked off one that has imported PyTorch and transformers already: a server starts in a fraction of a
second, and shares nothing else with its siblings.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any

_SECONDS_TO_START = 120
_SECONDS_TO_STOP = 10
_ARCHITECTURES = ("gpt2", "llama", "gpt_neox", "mamba", "mamba2")


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    models = [f"transformers.models.{name}.modeling_{name}" for name in _ARCHITECTURES]
    context.set_forkserver_preload(["patchwire_worker.server", "patchwire_worker.models.loading", *models])
    return context


_CONTEXT = _context()


class Process(ForkServerProcess):
    """A process, with the methods of `subprocess.Popen`."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not, after so many seconds.
        """
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired("a server", timeout or 0.0)
        return self.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.exitcode is None:
            assert self.pid is not None
            os.kill(self.pid, number)


def _serve(told: Mapping[str, Any], log: str, pipe: Connection) -> None:
    """In the new process."""
    with open(log, "ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    import serve_for_tests

    serve_for_tests.main(told, pipe)


class Server:
    """Serves models from directories.

    Attributes:
        address: Where it listens: "127.0.0.1:port".
        process: The process.

    Example:
        >>> with Server({"tiny": directory}) as server:
        ...     model = patchwire.connect(server.address).model("tiny")
    """

    def __init__(
        self,
        specs: Mapping[str, str | Path],
        token: str | None = None,
        limits: Mapping[str, Any] | None = None,
        dtypes: Mapping[str, str] | None = None,
        attention: str | None = None,
        jobs: str | Path | None = None,
    ) -> None:
        """
        Args:
            specs: The directory, or .gguf file, of each model, by the name that clients use.
            token: What clients have to present.
            limits: Fields of `patchwire_worker.config.Limits`.
            dtypes: The element type to load a model in, by its name; float32 for the others.
            attention: How attention is computed, if not as transformers prefers.
            jobs: The directory of detached jobs.
        """
        models = {
            name: {"path": str(path), "dtype": (dtypes or {}).get(name, "float32"), "attention": attention}
            for name, path in specs.items()
        }
        self._told = {"models": models, "token": token, "limits": dict(limits or {}), "jobs": str(jobs or "")}
        self._stderr = tempfile.NamedTemporaryFile(prefix="patchwire-server-", suffix=".log")  # noqa: SIM115
        self.process: Process
        self.address = ""

    @property
    def log(self) -> str:
        """What it has written to its standard error."""
        return Path(self._stderr.name).read_text(errors="replace")

    def start(self) -> Server:
        """Start it; it listens when this returns.

        Raises:
            RuntimeError: it ended, or took too long; the message has its log.
        """
        self._pipe, its = _CONTEXT.Pipe()
        self.process = Process(target=_serve, args=(self._told, self._stderr.name, its))
        self.process.start()
        its.close()
        try:
            if not self._pipe.poll(_SECONDS_TO_START):
                raise EOFError
            self.address = self._pipe.recv()
        except EOFError:
            self.process.kill()
            self.process.join()
            raise RuntimeError(f"The server did not start:\n{self.log}") from None
        return self

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.join(_SECONDS_TO_STOP)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        self._pipe.close()
        self._stderr.close()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
