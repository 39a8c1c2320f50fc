"""Where a program starts: `connect` to a server, or start one here with `local`."""

from __future__ import annotations

from typing import Any

from patchwire.connection import TLS, Connection
from patchwire.errors import ModelNotFoundError, nearest
from patchwire.jobs import Job
from patchwire.model import Model
from patchwire.session import Session
from patchwire.v1 import model_pb2


class Client:
    """A server, as seen from here."""

    def __init__(self, connection: Connection, *, progress: bool = True) -> None:
        self.connection = connection
        self.progress = progress

    def models(self) -> list[model_pb2.ModelSummary]:
        """The models that the server holds: name, architecture, parameters, dtype, device, layers."""
        return self.connection.models()

    def model(self, name: str | None = None) -> Model:
        """The proxy of a model.

        Args:
            name: What the server calls it; may be left out if it holds only one.

        Raises:
            ModelNotFoundError: the server does not hold it.
        """
        known = [each.name for each in self.models()]
        if name is None and len(known) == 1:
            name = known[0]
        if name not in known:
            near = nearest(name, known) if name else []
            raise ModelNotFoundError(
                f"The server has no model `{name}`." if name else "Say which model.",
                hint=f"Did you mean `{near[0]}`?"
                if near
                else f"It has {', '.join(f'`{each}`' for each in known) or 'none'}.",
            )
        assert name is not None
        return Model(self.connection, self.connection.describe(name), progress=self.progress)

    def session(self, *, blocking: bool = True, exact: bool = False) -> Session:
        """A block of many traces, of one model or several, that are sent as one request (see `Session`)."""
        return Session(self.connection, progress=self.progress, blocking=blocking, exact=exact)

    def jobs(self) -> list[Job]:
        """The detached jobs that the server keeps for you, the newest first."""
        return [Job(self.connection, each, progress=self.progress) for each in self.connection.jobs()]

    def job(self, id: str) -> Job:
        """A detached job.

        Args:
            id: What `trace.job.id` was.

        Raises:
            JobError: the server has none of this id.
        """
        return Job(self.connection, self.connection.job(id), progress=self.progress)

    def close(self) -> None:
        """End the connection."""
        self.connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<patchwire server {self.connection.server.server_version} at {self.connection.address}>"


def connect(
    address: str,
    *,
    token: str | None = None,
    tls: bool | TLS = False,
    compression: str | None = None,
    timeout: float | None = None,
    progress: bool = True,
) -> Client:
    """Connect to a server.

    Args:
        address: "host:port".
        token: The server's token, if it asks for one.
        tls: Encrypt the connection: `True` trusts the system's certificates, `patchwire.TLS(...)` names others.
        compression: "zstd" to compress the tensors that come back.
        timeout: Seconds after which a request is given up.
        progress: Whether to show progress bars.

    Raises:
        ConnectionFailedError: no server answers.
        VersionError: it speaks another version of the protocol.
        AuthenticationError: the token is missing or wrong.
    """
    connection = Connection(address, token=token, tls=tls, compression=compression, timeout=timeout)
    return Client(connection, progress=progress)


def local(model: Any, *, progress: bool = True, **options: Any) -> Model:
    """A model on this machine, behind a server in this process: the same experiments over the same wire.

    Args:
        model: A Hugging Face hub id, a local directory, a `.gguf` file, `zoo:NAME`, or a loaded Hugging Face model.
        progress: Whether to show progress bars of requests; those of loading are transformers'.
        options: `device`, `dtype`, `tokenizer`, `attention`, `matmul` and `name`, as for
            `patchwire_worker.embedded.start`.

    Raises:
        ModelNotFoundError: the worker is not installed, or the model cannot be loaded.
    """
    try:
        from patchwire_worker.embedded import start
    except ModuleNotFoundError as error:
        raise ModelNotFoundError(
            f"Running a model on this machine needs the worker ({error}).",
            hint='Install it: `pip install "patchwire[worker]"`, or `patchwire.connect` to a server.',
        ) from None
    server = start(model, **options)
    client = connect(server.address, token=server.token, progress=progress)
    proxy = client.model()
    object.__setattr__(proxy, "_server", server)  # the server lives as long as the model's proxy
    return proxy
