"""What a server may be told: where it listens, and how much a request may ask."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from patchwire.v1 import service_pb2

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What a request may be at most; more is refused with `LimitError`."""

    nodes: int = 200_000
    """Operations in a graph."""
    message_bytes: int = 64 * MIB
    """Bytes of a request message; larger tensors are uploaded apart."""
    constant_bytes: int = 2 * GIB
    """Bytes of one tensor that comes with a request or is uploaded."""
    stored_bytes: int = 4 * GIB
    """Bytes of all uploaded tensors; the least recently used ones are dropped beyond it."""
    tokens: int = 262_144
    """Tokens of all rows of a trace, the padding of short rows included."""
    result_bytes: int = 8 * GIB
    """Bytes of all saved values of a request."""
    value_bytes: int = 8 * GIB
    """Bytes of one value computed by an operation."""
    seconds: float = 600.0
    """Seconds that a request may run."""
    queued: int = 256
    """Requests of one model that may wait."""
    jobs: int = 1000
    """Detached jobs that are kept."""
    job_bytes: int = 64 * GIB
    """Bytes of the results of all of them, on the disk."""
    job_seconds: float = 24 * 3600.0
    """Seconds that a job is kept after its end; also the longest that it may take until then."""
    iterations: int = 100_000
    """Iterations of a loop."""
    loop_tokens: int = 1 << 26
    """Tokens of all iterations of a loop, the padding of short rows included."""
    kept_bytes: int = 4 * GIB
    """Bytes of all values that are kept beyond their requests."""
    kept_seconds: float = 86_400.0
    """For how long a value may be kept."""
    waiting_bytes: int = 64 * GIB
    """Bytes of all saved values that wait, on the disk, for clients that take them more slowly than they are made."""

    def to_proto(self) -> service_pb2.Limits:
        """These limits as a message."""
        return service_pb2.Limits(
            nodes=self.nodes,
            message_bytes=self.message_bytes,
            constant_bytes=self.constant_bytes,
            tokens=self.tokens,
            result_bytes=self.result_bytes,
            value_bytes=self.value_bytes,
            seconds=self.seconds,
            queued=self.queued,
        )


@dataclass(frozen=True)
class ServerConfig:
    """How a server is reached."""

    host: str = "127.0.0.1"
    """The address to listen on."""
    port: int = 0
    """The port; 0 takes a free one."""
    token: str | None = None
    """What clients have to present; None lets everybody in."""
    certificate: Path | None = None
    """The server's certificate (PEM); with it the connection is encrypted."""
    key: Path | None = None
    """The key of the certificate (PEM)."""
    client_ca: Path | None = None
    """Certificates (PEM) that clients must show one of."""
    limits: Limits = field(default_factory=Limits)
    """What a request may ask."""
    jobs: Path | None = None
    """The directory of detached jobs, which outlive the server there; None takes one that goes with the server. Saved
    values wait there too."""
