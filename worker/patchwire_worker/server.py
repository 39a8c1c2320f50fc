"""The server process: gRPC with our service, health and reflection, until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from patchwire import framing, recycling
from patchwire.errors import PatchwireError
from patchwire.v1 import job_pb2, job_pb2_grpc, service_pb2, service_pb2_grpc
from patchwire_worker.config import ServerConfig
from patchwire_worker.models.hosted import HostedModel
from patchwire_worker.service import JobService, PatchwireService

log = logging.getLogger(__name__)

SERVICE_NAME = service_pb2.DESCRIPTOR.services_by_name["PatchwireService"].full_name
JOBS_NAME = job_pb2.DESCRIPTOR.services_by_name["JobService"].full_name
_GRACE_SECONDS = 2.0
_OTHER_RPCS = 256


class Server:
    """A gRPC server over some models. Belongs to the event loop in which it is started."""

    def __init__(self, models: Mapping[str, HostedModel], config: ServerConfig) -> None:
        self.config = config
        self.service = PatchwireService(models, config)
        self.port = 0
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()

    @property
    def address(self) -> str:
        """ "host:port", once it is started."""
        return self._where.rpartition(":")[0] + f":{self.port}"

    @property
    def _where(self) -> str:
        host = self.config.host.strip("[]")  # an IPv6 address stands in brackets
        return f"[{host}]:{self.config.port}" if ":" in host else f"{host}:{self.config.port}"

    async def start(self) -> None:
        """Listen.

        Raises:
            PatchwireError: the address cannot be had.
        """
        recycling.keep_freed()
        options = [
            ("grpc.max_receive_message_length", self.config.limits.message_bytes),
            ("grpc.max_send_message_length", -1),
            # A second server on the same port is a mistake, not load balancing.
            ("grpc.so_reuseport", 0),
        ]
        # Every request that may run or wait, and as many others as a server of some clients has at a time.
        rpcs = len(self.service.models) * (self.config.limits.queued + 1) + _OTHER_RPCS
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=rpcs)
        jobs = JobService(self.service)
        service_pb2_grpc.add_PatchwireServiceServicer_to_server(self.service, server)
        job_pb2_grpc.add_JobServiceServicer_to_server(jobs, server)
        # In the place of what was just added for these methods.
        _register_stream(server, SERVICE_NAME, "Run", self.service.Run, service_pb2.RunRequest)
        _register_stream(server, JOBS_NAME, "FetchJob", jobs.FetchJob, job_pb2.FetchJobRequest)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE_NAME, JOBS_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        try:
            self.port = self._listen(server)
        except RuntimeError as error:
            hint = "Something else may be listening there; take another with `--port`."
            if self.config.certificate is not None:
                hint += " Or the certificate and the key are not a pair in PEM form."
            raise PatchwireError(f"The server cannot listen on {self._where}.", hint=hint) from error
        await server.start()
        self.service.jobs.start()
        for name in ("", SERVICE_NAME, JOBS_NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._server = server

    def _listen(self, server: grpc.aio.Server) -> int:
        if self.config.certificate is None and self.config.key is None and self.config.client_ca is None:
            return server.add_insecure_port(self._where)
        if self.config.certificate is None or self.config.key is None:
            raise PatchwireError("Encryption needs a certificate and its key; one of them was not given.")
        pair = (self.config.key.read_bytes(), self.config.certificate.read_bytes())
        ca = _content(self.config.client_ca)
        return server.add_secure_port(
            self._where, grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)
        )

    async def stop(self) -> None:
        """Stop listening, and end what runs: whoever waits for it has a moment to hear of it."""
        self.service.close_queues()
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(_GRACE_SECONDS)
        await self.service.jobs.close()
        self.service.close()


def _register_stream(
    server: grpc.aio.Server, service: str, method: str, behaviour: Callable[..., Any], request: type[Message]
) -> None:
    """Have a method stream responses, some of which are bytes already."""
    handler = grpc.unary_stream_rpc_method_handler(
        behaviour, request_deserializer=request.FromString, response_serializer=framing.serialize
    )
    server.add_registered_method_handlers(service, {method: handler})


def _content(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()


async def serve(models: Mapping[str, HostedModel], config: ServerConfig, started: Callable[[Server], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        models: What to serve, by name.
        config: Where and how.
        started: Told the server once it listens.
    """
    server = Server(models, config)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for each in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(each, stop.set)
    try:
        await server.start()
        started(server)
        await stop.wait()
    finally:
        await server.stop()
