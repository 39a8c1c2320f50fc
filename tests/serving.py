"""A real server in a process of its own, on a free port of this machine, for as long as a test needs it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

_PROGRAM = Path(__file__).with_name("serve_for_tests.py")
_SECONDS_TO_START = 120
_SECONDS_TO_STOP = 10


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
        self.process: subprocess.Popen[str]
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
        self.process = subprocess.Popen(
            [sys.executable, str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(self._told), file=self.process.stdin, flush=True)
        late = threading.Timer(_SECONDS_TO_START, self.process.kill)
        late.start()
        said = self.process.stdout.readline()
        late.cancel()
        if not said.startswith("LISTENING "):
            self.process.kill()
            self.process.wait()
            raise RuntimeError(f"The server did not start:\n{self.log}")
        self.address = said.split()[1]
        return self

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self._stderr.close()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
