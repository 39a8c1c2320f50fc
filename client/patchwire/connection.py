"""The connection to a server: one channel, its credentials, and the calls of the protocol in Python's terms."""

from __future__ import annotations

import contextlib
import math
import secrets
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import grpc
import torch
from google.protobuf.message import Message
from torch import Tensor

from patchwire import framing, ops, recycling, tensors
from patchwire import graph as g
from patchwire.background import Cancellation
from patchwire.errors import (
    ConnectionFailedError,
    ConnectionLostError,
    GraphError,
    LimitError,
    MissingTensorsError,
    PatchwireError,
    SourceLine,
    VersionError,
)
from patchwire.results import Progress, Results, Stats, To
from patchwire.status import error_from_call, line_from_proto
from patchwire.v1 import graph_pb2, job_pb2, job_pb2_grpc, model_pb2, service_pb2, service_pb2_grpc, tensor_pb2
from patchwire.version import PROTOCOL_VERSION, VERSION

T = TypeVar("T")

_SERVICE = service_pb2.DESCRIPTOR.services_by_name["PatchwireService"].full_name
_JOBS = job_pb2.DESCRIPTOR.services_by_name["JobService"].full_name
_CONNECT_SECONDS = 10.0
_REMEMBERED_UPLOADS = 65536
_LARGEST_RESULT = 1 << 36
_LONGEST_HANDLE = 64
_STRANGE = "Compare `patchwire doctor` here and there."


@dataclass(frozen=True)
class TLS:
    """How to encrypt a connection; each file in PEM form."""

    ca: str | Path | None = None
    """Certificates to trust instead of the system's."""
    certificate: str | Path | None = None
    """The client's own certificate, if the server asks for one."""
    key: str | Path | None = None
    """The key of the client's certificate."""

    def credentials(self) -> grpc.ChannelCredentials:
        """What gRPC makes of them."""

        def content(path: str | Path | None) -> bytes | None:
            return None if path is None else Path(path).read_bytes()

        return grpc.ssl_channel_credentials(content(self.ca), content(self.key), content(self.certificate))


class Connection:
    """A channel to one server."""

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: bool | TLS = False,
        compression: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """
        Args:
            address: "host:port".
            token: The server's token, if it asks for one.
            tls: Encrypt the connection: `True` trusts the system's certificates, `TLS(...)` names others.
            compression: "zstd" to compress the tensors that come back.
            timeout: Seconds after which a request is given up.

        Raises:
            ConnectionFailedError: no server answers.
            VersionError: it speaks another version of the protocol.
            AuthenticationError: the token is missing or wrong.
        """
        if compression not in (None, "zstd"):
            raise ValueError(f"compression is None or 'zstd', not {compression!r}")
        self.address = address
        self.timeout = timeout
        self.compression = tensor_pb2.COMPRESSION_ZSTD if compression else tensor_pb2.COMPRESSION_UNSPECIFIED
        if "://" in address or not address.rpartition(":")[2].isdigit():
            hint = 'Write "host:port", for example "gpu-box:50051".'
            raise ConnectionFailedError(f"`{address}` is not an address.", hint=hint)
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            # A connection of its own: clients of one program that share one wait for each other's threads to read it.
            ("grpc.use_local_subchannel_pool", 1),
            # A server that comes back is found again within a second.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 1000),
            # Large results: longer frames, and more of them on the way.
            ("grpc.http2.max_frame_size", tensors.MIB),
            ("grpc.http2.lookahead_bytes", 16 * tensors.MIB),
        ]
        recycling.keep_freed()
        if tls:
            credentials = (TLS() if tls is True else tls).credentials()
            self._channel = grpc.secure_channel(address, credentials, options=options)
        else:
            self._channel = grpc.insecure_channel(address, options=options)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._stub = service_pb2_grpc.PatchwireServiceStub(self._channel)
        self._jobs = job_pb2_grpc.JobServiceStub(self._channel)
        self._run = self._streams(_SERVICE, "Run", service_pb2.RunResponse)
        self._fetch = self._streams(_JOBS, "FetchJob", job_pb2.FetchJobResponse)
        self._uploaded: set[bytes] = set()
        self._lock = threading.Lock()
        weakref.finalize(self, self._channel.close)
        self._answers = False
        self._closed = False
        try:
            self.server = self._handshake()
        except BaseException:
            self._channel.close()
            raise

    def close(self) -> None:
        """End the connection."""
        self._closed = True
        self._channel.close()

    def _streams(self, service: str, method: str, response: type[Message]) -> Callable[..., Any]:
        """A method that streams responses; those that are chunks come as the bytes of the chunk."""
        call: Callable[..., Any] = self._channel.unary_stream(
            f"/{service}/{method}",
            request_serializer=framing.serialize,
            response_deserializer=framing.parser(response),
        )
        return call

    def _check_not_closed(self) -> None:
        if self._closed:
            raise ConnectionFailedError(
                f"The connection to {self.address} was closed by this program.",
                hint="Connect again: `patchwire.connect(…)`. Detached jobs go on; `client.job(id)` finds them.",
            )

    @property
    def limits(self) -> service_pb2.Limits:
        """What a request may be at most."""
        return self.server.limits

    def _call(self, call: Callable[..., T], request: Any, timeout: float | None = None) -> T:
        self._check_not_closed()
        try:
            response = call(request, metadata=self._metadata, timeout=timeout or self.timeout)
        except grpc.RpcError as error:
            raise error_from_call(error, self.address) from None
        self._answers = True
        return response

    def _handshake(self) -> service_pb2.HandshakeResponse:
        request = service_pb2.HandshakeRequest(
            client_version=VERSION, protocol_version=PROTOCOL_VERSION, operations_version=ops.VERSION
        )
        server = self._call(self._stub.Handshake, request, _CONNECT_SECONDS)
        if server.protocol_version != PROTOCOL_VERSION:
            raise VersionError(
                f"The server at {self.address} speaks protocol {server.protocol_version} (version "
                f"{server.server_version}), this client protocol {PROTOCOL_VERSION} (version {VERSION}).",
                hint="Install the same version of patchwire on both sides.",
            )
        return server

    def models(self) -> list[model_pb2.ModelSummary]:
        """The models that the server holds."""
        return list(self._call(self._stub.ListModels, service_pb2.ListModelsRequest()).models)

    def describe(self, model: str) -> model_pb2.ModelDescription:
        """Everything about one model.

        Raises:
            ModelNotFoundError: the server does not hold it.
        """
        return self._call(self._stub.DescribeModel, service_pb2.DescribeModelRequest(model=model)).model

    def describe_source(self, model: str, module: str, path: Sequence[str] = ()) -> model_pb2.Source:
        """What is inside the forward of a module, or inside a function that operations in it lead to.

        Raises:
            SiteError: a forward pass does not call it, or its text is not to be had.
        """
        request = service_pb2.DescribeSourceRequest(model=model, module=module, path=path)
        return self._call(self._stub.DescribeSource, request).source

    def tokenize(
        self, model: str, *, texts: Sequence[str] = (), messages: Sequence[dict[str, str]] = ()
    ) -> list[list[int]]:
        """The token ids of texts, or of a conversation.

        Raises:
            InputError: the model has no tokenizer, or no chat template.
        """
        request = service_pb2.TokenizeRequest(
            model=model,
            texts=texts,
            messages=[service_pb2.ChatMessage(role=each["role"], content=each["content"]) for each in messages],
        )
        return [list(row.ids) for row in self._call(self._stub.Tokenize, request).rows]

    def upload(self, constants: Sequence[Tensor], cancellation: Cancellation | None = None) -> list[bytes]:
        """Store tensors on the server; those that it has are not sent again.

        Returns:
            The hash of each.
        """
        hashes = [tensors.digest(each) for each in constants]
        with self._lock:
            wanted = {name: each for name, each in zip(hashes, constants, strict=True) if name not in self._uploaded}
        if wanted:
            self._send(wanted, cancellation or Cancellation())
        return hashes

    def _send(self, wanted: dict[bytes, Tensor], cancellation: Cancellation) -> None:
        for each in wanted.values():
            if each.nbytes > self.limits.constant_bytes:
                raise LimitError(
                    f"A tensor of {each.nbytes:,} bytes is too large: the server takes {self.limits.constant_bytes:,}."
                )

        # A chunk and what is around it must fit into a message.
        length = min(tensors.MIB, self.limits.message_bytes // 2 or tensors.MIB)

        def parts() -> Iterator[service_pb2.UploadRequest]:
            for each in wanted.values():
                yield service_pb2.UploadRequest(header=tensors.header(each))
                for chunk in tensors.chunks(each, length=length):
                    if cancellation.cancelled:
                        return  # the server refuses half a tensor
                    yield service_pb2.UploadRequest(chunk=chunk)

        stored = self._call(self._stub.Upload, parts()).hashes
        if list(stored) != list(wanted):
            raise GraphError("The server stored other tensors than were sent.", hint=_STRANGE)
        with self._lock:
            if len(self._uploaded) > _REMEMBERED_UPLOADS:
                self._uploaded.clear()
            self._uploaded.update(wanted)

    def run(self, graph: g.Graph, progress: Progress, cancellation: Cancellation | None = None) -> Results:
        """Run a graph.

        Args:
            graph: What to run.
            progress: Told what happens.
            cancellation: Says whether it is still wanted.

        Raises:
            PatchwireError: of the kind that the server says.
            ConnectionLostError: the server went away.
        """
        wanted = cancellation or Cancellation()

        def ask(message: graph_pb2.Graph) -> Results:
            arriving = _Arriving.of(graph, message)
            name = secrets.token_bytes(16) if arriving.loops else b""
            request = service_pb2.RunRequest(graph=message, compression=self.compression, id=name)
            with self._interruptible(name, progress):
                return self._receive(self._run, request, arriving, progress, wanted)

        return self._with_uploads(graph, ask, wanted)

    def interrupt(self, request: bytes) -> bool:
        """Have the loops of a running request end after the iteration that they are in; whether there is such a one."""
        return self._call(self._stub.Interrupt, service_pb2.InterruptRequest(id=request)).found

    def forget(self, handles: Sequence[bytes]) -> int:
        """Have the server drop what it keeps; how many there were of these."""
        return self._call(self._stub.Forget, service_pb2.ForgetRequest(handles=handles)).forgotten

    @contextlib.contextmanager
    def _interruptible(self, request: bytes, progress: Progress) -> Iterator[None]:
        """Have the first Ctrl-C end the loops of a request, if it has any, and the second the program's wait for it."""
        before = signal.getsignal(signal.SIGINT)
        on_main = threading.current_thread() is threading.main_thread()
        if not request or not on_main or before is not signal.default_int_handler:
            yield
            return

        over = threading.Event()

        def interrupt() -> None:
            # If the server is gone, the request itself says so; if it does not know the request yet, it soon will.
            with contextlib.suppress(PatchwireError):
                while not self.interrupt(request) and not over.wait(0.05):
                    pass

        def first(*_: object) -> None:
            signal.signal(signal.SIGINT, before)
            progress.interrupted()
            threading.Thread(target=interrupt, daemon=True).start()

        signal.signal(signal.SIGINT, first)
        try:
            yield
        finally:
            over.set()
            signal.signal(signal.SIGINT, before)

    def submit(
        self, graph: g.Graph, cancellation: Cancellation | None = None
    ) -> tuple[job_pb2.Job, Mapping[int, Expected | None], Mapping[Place, To]]:
        """Submit a graph as a detached job.

        Returns:
            The job; what each save brings as far as that is known, by its position in the graph; and where it goes.

        Raises:
            PatchwireError: of the kind that the server says.
        """

        def ask(message: graph_pb2.Graph) -> tuple[job_pb2.Job, Mapping[int, Expected | None], Mapping[Place, To]]:
            request = job_pb2.SubmitJobRequest(graph=message, compression=self.compression)
            return self._call(self._jobs.SubmitJob, request).job, _saves(graph), _takers(graph)

        return self._with_uploads(graph, ask, cancellation or Cancellation())

    def jobs(self) -> list[job_pb2.Job]:
        """The detached jobs of whoever has this connection's token, the newest first."""
        return list(self._call(self._jobs.ListJobs, job_pb2.ListJobsRequest()).jobs)

    def job(self, id: str, wait_seconds: float = 0.0) -> job_pb2.Job:
        """A detached job, once it has ended or so many seconds have passed.

        Raises:
            JobError: there is none of this id.
        """
        request = job_pb2.GetJobRequest(id=id, wait_seconds=wait_seconds)
        return self._call(self._jobs.GetJob, request, wait_seconds + (self.timeout or _CONNECT_SECONDS)).job

    def fetch(
        self,
        id: str,
        expected: Mapping[int, Expected | None] | None,
        progress: Progress,
        cancellation: Cancellation | None = None,
        *,
        takers: Mapping[Place, To] | None = None,
    ) -> Results:
        """The results of a detached job that has ended.

        Args:
            id: Which.
            expected: What each save brings, by its position in the graph; None if that is not known here.
            progress: Told what happens.
            cancellation: Says whether they are still wanted.
            takers: Where saved values go when they come.

        Returns:
            What came back.

        Raises:
            JobError: there is none of this id, or its results have expired.
            PatchwireError: of the kind of what went wrong when it ran.
        """
        request = job_pb2.FetchJobRequest(id=id)
        try:
            arriving = _Arriving(expected, takers=takers or {})
            return self._receive(self._fetch, request, arriving, progress, cancellation or Cancellation())
        except ConnectionLostError as error:
            raise ConnectionLostError(error.message, hint="The job is kept by the server: fetch it again.") from None

    def cancel_job(self, id: str) -> job_pb2.Job:
        """Stop a detached job; it, once it has ended.

        Raises:
            JobError: there is none of this id.
        """
        return self._call(self._jobs.CancelJob, job_pb2.CancelJobRequest(id=id)).job

    def forget_job(self, id: str) -> None:
        """Remove a detached job and its results.

        Raises:
            JobError: there is none of this id.
        """
        self._call(self._jobs.ForgetJob, job_pb2.ForgetJobRequest(id=id))

    def check(self, graph: g.Graph) -> list[tensor_pb2.TensorHeader]:
        """Check a graph on the server without running it: the shape and dtype of each saved value."""

        def ask(message: graph_pb2.Graph) -> service_pb2.CheckResponse:
            return self._call(self._stub.Check, service_pb2.CheckRequest(graph=message))

        return list(self._with_uploads(graph, ask, Cancellation()).saved)

    def plan(self, graph: g.Graph) -> service_pb2.PlanResponse:
        """Have the server plan a graph without running it."""

        def ask(message: graph_pb2.Graph) -> service_pb2.PlanResponse:
            return self._call(self._stub.Plan, service_pb2.PlanRequest(graph=message))

        return self._with_uploads(graph, ask, Cancellation())

    def _with_uploads(self, graph: g.Graph, ask: Callable[[graph_pb2.Graph], T], cancellation: Cancellation) -> T:
        """What `ask` gets for a graph's message, with its large constants sent again if the server has dropped some."""
        try:
            return ask(self._message(graph, cancellation))
        except MissingTensorsError:
            with self._lock:
                self._uploaded.clear()  # the error names only some of what is missing
        try:
            return ask(self._message(graph, cancellation))
        except MissingTensorsError:
            large = self._large(graph)
            raise LimitError(
                f"The server cannot keep the {len(large)} large tensors of this request together: they have "
                f"{sum(each.nbytes for each in large):,} bytes.",
                hint="Use fewer of them in one trace, or smaller ones.",
            ) from None

    def _message(self, graph: g.Graph, cancellation: Cancellation) -> graph_pb2.Graph:
        large = self._large(graph)
        hashes = self.upload(large, cancellation)
        cancellation.check()
        names = {id(each): name for each, name in zip(large, hashes, strict=True)}
        message = g.graph_to_proto(_with_names(graph, names))
        if self.limits.message_bytes and message.ByteSize() > self.limits.message_bytes:
            raise LimitError(
                f"The request has {message.ByteSize():,} bytes; the server takes {self.limits.message_bytes:,}.",
                hint="Split it into several traces.",
            )
        return message

    @staticmethod
    def _large(graph: g.Graph) -> list[Tensor]:
        """The constants that are uploaded apart."""
        constants = [each for part in g.parts(graph) for each in part.constants]
        return [each for each in constants if isinstance(each, Tensor) and each.nbytes > g.INLINE_BYTES]

    def _receive(
        self,
        method: Callable[..., Any],
        request: Any,
        arriving: _Arriving,
        progress: Progress,
        cancellation: Cancellation,
    ) -> Results:
        """What a stream brings."""
        self._check_not_closed()
        assembly: tensors.Assembly | None = None
        current: _Key | None = None
        stats: Stats | None = None
        answers = self._answers  # a server that did so the last time, and is not there, went away
        call = method(request, metadata=self._metadata, timeout=self.timeout)
        cancellation.watch(call)
        try:
            for event in _events(call):
                answers = self._answers = True
                if isinstance(event, memoryview):
                    _add(assembly, event, progress)
                else:
                    match event.WhichOneof("kind"):
                        case "queued":
                            progress.queued(event.queued.position)
                        case "running":
                            progress.running(event.running.number, event.running.passes)
                        case "saved":
                            current = arriving.key(event.saved)
                            _check_header(event.saved.header, arriving.expected(current))
                            assembly = tensors.Assembly(event.saved.header, _LARGEST_RESULT, arriving.into(current))
                            progress.bytes(0, assembly.total)
                        case "chunk":
                            _add(assembly, event.chunk, progress)
                        case "absent":
                            arriving.found[arriving.key(event.absent)] = None
                        case "kept":
                            arriving.keep(event.kept)
                        case "iterated":
                            arriving.iterated(event.iterated)
                            progress.iterated(event.iterated.done, event.iterated.count)
                        case "tokens":
                            progress.tokens(event.tokens.trace, event.tokens.invoke, list(event.tokens.ids))
                        case "logged":
                            progress.logged(event.logged.text, arriving.log(event.logged))
                        case "done":
                            stats = Stats.from_proto(event.done)
                            break  # the status that follows says nothing new, and waiting for it takes a while
                if assembly is not None and assembly.complete:
                    assert current is not None
                    arriving.take(current, assembly.tensor())
                    assembly = None
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                self._answers = False
            raise error_from_call(error, self.address, started=answers) from None
        finally:
            # Before the end this stops the pass at its next site.
            with contextlib.suppress(Exception):
                call.cancel()
            progress.close()
        if stats is None:
            raise ConnectionLostError(f"The server at {self.address} ended the request early.", hint="Run it again.")
        return arriving.results(stats)


def _events(
    call: Iterable[service_pb2.RunResponse | job_pb2.FetchJobResponse | memoryview],
) -> Iterator[service_pb2.Event | memoryview]:
    """What responses tell, one after the other; a chunk that came alone as its bytes."""
    for response in call:
        if isinstance(response, memoryview):
            yield response
        else:
            yield from response.events


def _add(assembly: tensors.Assembly | None, chunk: bytes | memoryview, progress: Progress) -> None:
    """Put a chunk into the value that was announced last.

    Raises:
        GraphError: there is none, or it has no room for it.
    """
    if assembly is None:
        raise GraphError("The server sent bytes of no value.", hint=_STRANGE)
    assembly.add(chunk)
    progress.bytes(len(chunk), 0)


def _line(message: graph_pb2.Graph, node: int) -> SourceLine | None:
    """The user's line that a node came from."""
    line = message.lines[message.nodes[node].line]
    return line_from_proto(line) if line.file else None


Expected = tuple[list[int], torch.dtype]
"""The shape and dtype of a value that is to come."""
Place = tuple[int | None, int]
"""A save or log: the loop in whose body it is, and its position."""
_Key = tuple[int | None, int, int]
"""What a save or log brings: the loop in whose body it is, its position, and the iteration."""


@dataclass
class _Arriving:
    """What of a request's results has come, and what is still to come."""

    announced: Mapping[int, Expected | None] | None
    """What each save brings, by its position in the graph; None if that is not known here."""
    in_loops: Mapping[Place, Expected | None] = field(default_factory=dict)
    """What each save in the body of a loop brings in an iteration."""
    loops: Mapping[int, int] = field(default_factory=dict)
    """How many iterations each loop has, by its position in the graph's traces."""
    keeps: Sequence[int] = ()
    """What is kept, by its position in the graph."""
    logs: Mapping[Place, SourceLine | None] | None = None
    """The lines of the logs; None if they are not known here."""
    takers: Mapping[Place, To] = field(default_factory=dict)
    """Where saved values go when they come."""
    done: dict[int, int] = field(init=False)
    found: dict[_Key, Tensor | None] = field(init=False, default_factory=dict)
    kept: dict[int, tuple[g.KeptTensor, float]] = field(init=False, default_factory=dict)
    logged: set[_Key] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.done = dict.fromkeys(self.loops, 0)

    @classmethod
    def of(cls, graph: g.Graph, message: graph_pb2.Graph) -> _Arriving:
        """What a graph asks for."""
        in_loops: dict[Place, Expected | None] = {}
        for index, loop in graph.loops.items():
            known = not any(each.batches for trace in loop.body.traces for each in trace.invokes)
            in_loops |= {(index, node): each if known else None for node, each in _saves(loop.body).items()}
        bodies = [(None, message), *((index, message.traces[index].loop.body) for index in graph.loops)]
        return cls(
            _saves(graph),
            in_loops,
            {index: loop.count for index, loop in graph.loops.items()},
            [index for index, node in enumerate(graph.fx.nodes) if node.target is g.keep],
            {
                (index, number): _line(part, number)
                for index, part in bodies
                for number, node in enumerate(part.nodes)
                if node.HasField("log")
            },
            _takers(graph),
        )

    def _key(self, message: service_pb2.Saved | service_pb2.Absent | service_pb2.Logged) -> _Key:
        loop = message.iteration.loop if message.HasField("iteration") else None
        number = message.iteration.number if loop is not None else 0
        if loop is not None and number >= self.loops.get(loop, 0):
            raise GraphError("The server runs another loop than it was asked to run.", hint=_STRANGE)
        return loop, message.node, number

    def key(self, message: service_pb2.Saved | service_pb2.Absent) -> _Key:
        """Which value a message is of.

        Raises:
            GraphError: none that was asked for.
        """
        loop, node, number = self._key(message)
        asked = (self.announced is None or node in self.announced) if loop is None else (loop, node) in self.in_loops
        if not asked or (loop, node, number) in self.found:
            raise GraphError("The server sent a value that was not asked for.", hint=_STRANGE)
        return loop, node, number

    def expected(self, key: _Key) -> Expected | None:
        """What a value is like, if that is known."""
        if key[0] is not None:
            return self.in_loops[key[:2]]
        return None if self.announced is None else self.announced[key[1]]

    def into(self, key: _Key) -> Tensor | None:
        """What a value is received in; None if it has memory of its own.

        Raises:
            GraphError: it is of an iteration for which there is no room.
        """
        loop, node, number = key
        taker = self.takers.get((loop, node))
        if not isinstance(taker, Tensor) or loop is None:
            return taker if isinstance(taker, Tensor) else None
        if number >= len(taker):
            raise GraphError(
                f"A tensor of shape {list(taker.shape)} has no room for iteration {number}.",
                hint="`save(to=…)` in a loop takes a tensor with a dimension for the iterations in front.",
            )
        return taker[number]

    def take(self, key: _Key, tensor: Tensor) -> None:
        """A value is complete."""
        taker = self.takers.get(key[:2])
        if taker is None or isinstance(taker, Tensor):
            self.found[key] = tensor
        else:
            self.found[key] = None
            taker(tensor)

    def log(self, message: service_pb2.Logged) -> SourceLine | None:
        """The line that a log is of.

        Raises:
            GraphError: none that was asked for.
        """
        key = self._key(message)
        if self.logs is None:
            return None
        if key[:2] not in self.logs or key in self.logged:
            raise GraphError("The server sent a log that was not asked for.", hint=_STRANGE)
        self.logged.add(key)
        return self.logs[key[:2]]

    def keep(self, message: service_pb2.Kept) -> None:
        """The server keeps a value."""
        if message.node not in self.keeps or message.node in self.kept or len(message.handle) > _LONGEST_HANDLE:
            raise GraphError("The server kept a value that it was not asked to keep.", hint=_STRANGE)
        tensors.size(message.header)
        dtype = tensors.dtype_from_proto(message.header.dtype)
        fake = torch.empty(tuple(message.header.shape), dtype=dtype, device="meta")
        self.kept[message.node] = g.KeptTensor(message.handle, fake), message.seconds

    def iterated(self, message: service_pb2.Iterated) -> None:
        """A loop has come so far."""
        if not self.done.get(message.loop, math.inf) <= message.done <= self.loops.get(message.loop, 0):
            raise GraphError("The server runs another loop than it was asked to run.", hint=_STRANGE)
        self.done[message.loop] = message.done

    def results(self, stats: Stats) -> Results:
        """All of it.

        Raises:
            GraphError: something is missing.
        """
        expected = {(None, node, 0) for node in self.announced} if self.announced is not None else None
        found = {key: each for key, each in self.found.items() if key[0] is None}
        iterations = {(loop, node, number) for loop, node in self.in_loops for number in range(self.done[loop or 0])}
        if (
            (expected is not None and found.keys() != expected)
            or self.found.keys() - found.keys() != iterations
            or len(self.kept) != len(self.keeps)
        ):
            raise GraphError("The server ended the request without all saved values.", hint=_STRANGE)

        def saved(of: int, number: int) -> list[Tensor | None]:
            return [self.found[loop, node, number] for loop, node in self.in_loops if loop == of]

        return Results(
            stats,
            [self.found[key] for key in sorted(found, key=itemgetter(1))],
            [self.kept[node] for node in self.keeps],
            {loop: [saved(loop, number) for number in range(done)] for loop, done in self.done.items()},
        )


def _saves(graph: g.Graph) -> dict[int, Expected | None]:
    """What each save of a graph brings, if that is known before it runs, by its position."""
    return {index: _expected(node) for index, node in enumerate(graph.fx.nodes) if node.target is g.save}


def _takers(graph: g.Graph) -> dict[Place, To]:
    """Where the saved values of a graph and of its loops go."""
    parts = [(None, graph), *((index, loop.body) for index, loop in graph.loops.items())]
    return {
        (loop, index): node.meta["to"]
        for loop, part in parts
        for index, node in enumerate(part.fx.nodes)
        if node.meta.get("to") is not None
    }


def _with_names(graph: g.Graph, names: Mapping[int, bytes]) -> g.Graph:
    """The same graph, with the hashes of those constants that are uploaded apart, given by their ids."""
    traces = [
        replace(each, loop=replace(each.loop, body=_with_names(each.loop.body, names))) if each.loop else each
        for each in graph.traces
    ]
    return replace(graph, traces=traces, constants=[names.get(id(each), each) for each in graph.constants])


def _expected(save: torch.fx.Node) -> Expected | None:
    """What a save brings, if that is known before it runs."""
    value, dtype = save.args[0], save.args[1]
    fake = value.meta.get("fake") if isinstance(value, torch.fx.Node) else None
    return (list(fake.shape), dtype or fake.dtype) if isinstance(fake, Tensor) else None  # type: ignore[return-value]


def _check_header(header: tensor_pb2.TensorHeader, expected: Expected | None) -> None:
    """Check that a value is what was asked for.

    Raises:
        GraphError: it has another shape or dtype.
    """
    found = list(header.shape), tensors.dtype_from_proto(header.dtype)
    if expected is not None and found != expected:
        raise GraphError(
            f"The server sent a value of shape {found[0]} and {found[1]} where {expected[0]} and {expected[1]} was "
            "asked for."
        )
