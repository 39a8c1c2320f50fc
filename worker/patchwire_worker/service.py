"""The gRPC service: who asks, what they ask, and what goes back.

Each method is a few lines over the rooms below it; `answering` around all of them checks the token and turns errors
into a status with our detail in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial, wraps
from importlib import metadata
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status
from torch import Tensor

from patchwire import framing, ops, tensors
from patchwire import graph as g
from patchwire.checking import TookLongError, fake_of
from patchwire.errors import (
    AuthenticationError,
    BusyError,
    CancelledError,
    ConnectionLostError,
    ExecutionError,
    GraphError,
    LimitError,
    MissingTensorsError,
    PatchwireError,
    SiteError,
    SourceLine,
    VersionError,
)
from patchwire.garbage import rarely
from patchwire.sites import SOURCE, Address, Inside
from patchwire.status import error_to_status
from patchwire.v1 import graph_pb2, job_pb2, job_pb2_grpc, service_pb2, service_pb2_grpc, tensor_pb2
from patchwire.version import PROTOCOL_VERSION, VERSION
from patchwire_worker import scheduler
from patchwire_worker.admission import Admission, saved_bytes
from patchwire_worker.computing import apart
from patchwire_worker.config import MIB, ServerConfig
from patchwire_worker.executor import Iteration
from patchwire_worker.interleaving import Stopping
from patchwire_worker.jobs import Jobs, stopped
from patchwire_worker.kept import KeptStore
from patchwire_worker.models.hosted import HostedModel
from patchwire_worker.planned import planned_to_proto
from patchwire_worker.planner import plan
from patchwire_worker.scheduler import InternalError, Scheduler
from patchwire_worker.store import TensorStore
from patchwire_worker.waiting import Disk, OnDisk

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Request = TypeVar("Request")
Response = TypeVar("Response")
T = TypeVar("T")

_LIBRARIES = ("torch", "transformers", "nnsight")
_SMALL_GRAPH = 256
_MOST_LEARNT = 512
_SMALL_BYTES = 64 * 1024
_SMALL_SECONDS = 0.05
_THREADS = 4
_AHEAD_OF_DISK = 64 * MIB
_LONGEST_ID = 64


Refusal = tuple[grpc.StatusCode, str, Any]
"""A status code, its words, and the metadata after them."""


def _refusal(error: Exception) -> Refusal:
    """With what an RPC ends that failed."""
    if isinstance(error, CancelledError):
        return grpc.StatusCode.CANCELLED, error.message, ()
    if isinstance(error, ConnectionLostError):
        return grpc.StatusCode.UNAVAILABLE, error.message, ()
    if isinstance(error, PatchwireError):
        status = rpc_status.to_status(error_to_status(_short(error), VERSION))
        return status.code, status.details or "", status.trailing_metadata or ()
    if not isinstance(error, InternalError):
        log.error("a request failed in a way that it must not", exc_info=error)
        error = InternalError(type(error).__name__)
    return grpc.StatusCode.INTERNAL, f"internal error ({error}); the server's log has it", ()


def _short(error: PatchwireError) -> PatchwireError:
    """The same error, small enough for gRPC's trailing metadata, which clients take up to 8 KiB of."""
    error.message, error.hint = _cut(error.message, 2000), _cut(error.hint, 800)
    error.lines = tuple(SourceLine(_cut(each.file, 400), each.line, _cut(each.code, 300)) for each in error.lines[:3])
    if isinstance(error, MissingTensorsError):
        error.missing = error.missing[:64]
    return error


def _cut(text: str, length: int) -> str:
    return text.encode(errors="replace")[:length].decode(errors="ignore")


def _answering(method: Callable[..., Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
    """A unary method that checks the token and answers errors with a status."""

    @wraps(method)
    async def wrapper(self: PatchwireService | JobService, request: Any, context: Context) -> Response:
        try:
            self.authenticate(context)
            return await method(self, request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            refusal = _refusal(error)
        # Out here, because gRPC keeps what `abort` raises, and that would keep the error that was being handled.
        await context.abort(*refusal)
        raise AssertionError("`abort` raises")

    return wrapper


class PatchwireService(service_pb2_grpc.PatchwireServiceServicer):
    """The methods of the protocol, over the models of one server."""

    def __init__(self, models: Mapping[str, HostedModel], config: ServerConfig) -> None:
        self.models = models
        self.config = config
        self.store = TensorStore(config.limits.stored_bytes)
        self.kept = KeptStore(config.limits.kept_bytes)
        self.admission = Admission(models, config.limits, self.store, self.kept)
        disk = Disk(config.limits.waiting_bytes, config.jobs)
        self.schedulers = {name: Scheduler(name, config.limits, self.kept, disk) for name in models}
        self.jobs = Jobs(config.jobs, config.limits)
        self._stoppings: dict[bytes, Stopping] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="requests")
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizers")  # these bear no two threads at a time
        # One for each model, so that nobody waits for another model's pass to end.
        self._learning = {name: ThreadPoolExecutor(1, thread_name_prefix=f"learning-{name}") for name in models}
        self._askers = Counter[str]()

    def close_queues(self) -> None:
        """End what runs and what waits; from now on nothing runs."""
        for each in self.schedulers.values():
            each.close()

    def close(self) -> None:
        """End everything."""
        self.close_queues()
        for each in (self._threads, self._tokenizing, *self._learning.values()):
            each.shutdown(wait=False, cancel_futures=True)

    def authenticate(self, context: Context) -> None:
        """Check the token of an RPC.

        Raises:
            AuthenticationError: it is missing or wrong.
        """
        if self.config.token is None:
            return
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        given = given.decode() if isinstance(given, bytes) else given
        if not hmac.compare_digest(given.encode(), f"Bearer {self.config.token}".encode()):
            raise AuthenticationError(
                "The token is wrong." if given else "This server asks for a token.",
                hint="Write `patchwire.connect(address, token=…)`, with what `patchwire serve --token` was given.",
            )

    def owner(self, context: Context) -> str:
        """Whose jobs an RPC may see: all who have the server's token are one."""
        return hashlib.sha256(self.config.token.encode()).hexdigest() if self.config.token is not None else ""

    @_answering
    async def Handshake(self, request: service_pb2.HandshakeRequest, context: Context) -> service_pb2.HandshakeResponse:
        if request.protocol_version != PROTOCOL_VERSION:
            raise VersionError(
                f"The server (version {VERSION}) speaks protocol {PROTOCOL_VERSION}, the client (version "
                f"{request.client_version[:50]}) protocol {request.protocol_version}.",
                hint="Install the same version of patchwire on both sides.",
            )
        return service_pb2.HandshakeResponse(
            server_version=VERSION,
            protocol_version=PROTOCOL_VERSION,
            operations_version=ops.VERSION,
            limits=self.config.limits.to_proto(),
            libraries={name: metadata.version(name) for name in _LIBRARIES},
        )

    @_answering
    async def ListModels(
        self, request: service_pb2.ListModelsRequest, context: Context
    ) -> service_pb2.ListModelsResponse:
        return service_pb2.ListModelsResponse(models=[each.summary for each in self.models.values()])

    @_answering
    async def DescribeModel(
        self, request: service_pb2.DescribeModelRequest, context: Context
    ) -> service_pb2.DescribeModelResponse:
        return service_pb2.DescribeModelResponse(model=self.admission.model(request.model).description)

    @_answering
    async def DescribeSource(
        self, request: service_pb2.DescribeSourceRequest, context: Context
    ) -> service_pb2.DescribeSourceResponse:
        model = self.admission.model(request.model)
        module = model.catalogue.module(request.module).path

        path = tuple(request.path)
        source = model.catalogue.sources.get((module, path))
        if source is None:
            source = await self._learn(model.name, lambda: model.catalogue.source(module, path))
        return service_pb2.DescribeSourceResponse(source=source.to_proto())

    @_answering
    async def Tokenize(self, request: service_pb2.TokenizeRequest, context: Context) -> service_pb2.TokenizeResponse:
        model = self.admission.model(request.model)

        def work() -> list[list[int]]:
            if request.texts:
                return model.tokenize_texts(list(request.texts))
            return model.tokenize_messages([{"role": each.role, "content": each.content} for each in request.messages])

        # A tokenizer takes its time, however short a text is: a chat template is a program.
        rows = await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)
        return service_pb2.TokenizeResponse(rows=[graph_pb2.TokenRow(ids=row) for row in rows])

    @_answering
    async def Upload(
        self, request: AsyncIterator[service_pb2.UploadRequest], context: Context
    ) -> service_pb2.UploadResponse:
        hashes: list[bytes] = []
        assembly: tensors.Assembly | None = None

        async def keep() -> None:
            if assembly is not None:
                hashes.append(await self._apart(partial(self._keep, assembly), small=assembly.total <= _SMALL_BYTES))

        async for message in _readable(request):
            match message.WhichOneof("part"):
                case "header":
                    await keep()
                    assembly = tensors.Assembly(message.header, self.config.limits.constant_bytes)
                case "chunk" if assembly is not None:
                    await self._apart(partial(assembly.add, message.chunk), small=assembly.total <= _SMALL_BYTES)
                case _:
                    raise GraphError("An upload starts with a header.")
        await keep()
        return service_pb2.UploadResponse(hashes=hashes)

    def _keep(self, assembly: tensors.Assembly) -> bytes:
        return self.store.put(assembly.tensor())

    @contextlib.contextmanager
    def _interruptible(self, name: bytes) -> Iterator[Stopping]:
        """What stops a request, which can be interrupted by its name if it has one."""
        stopping = Stopping()
        if len(name) > _LONGEST_ID or name in self._stoppings:
            raise GraphError("The request's id is too long, or another's.")
        if name:
            self._stoppings[name] = stopping
        try:
            yield stopping
        finally:
            if name:
                del self._stoppings[name]

    @_answering
    async def Interrupt(self, request: service_pb2.InterruptRequest, context: Context) -> service_pb2.InterruptResponse:
        stopping = self._stoppings.get(request.id)
        if stopping is not None:
            stopping.interrupted = True
        return service_pb2.InterruptResponse(found=stopping is not None)

    @_answering
    async def Forget(self, request: service_pb2.ForgetRequest, context: Context) -> service_pb2.ForgetResponse:
        return service_pb2.ForgetResponse(forgotten=self.kept.forget(request.handles))

    @_answering
    async def Check(self, request: service_pb2.CheckRequest, context: Context) -> service_pb2.CheckResponse:
        admitted = (await self._admit(request.graph))[0]
        response = service_pb2.CheckResponse()
        for node in admitted.graph.fx.find_nodes(op="call_function", target=g.save):
            fake = fake_of(node.args[0])
            header = response.saved.add()
            if isinstance(fake, Tensor):
                header.dtype = tensors.dtype_to_proto(node.args[1] or fake.dtype)
                header.shape.extend(fake.shape)
        return response

    @_answering
    async def Plan(self, request: service_pb2.PlanRequest, context: Context) -> service_pb2.PlanResponse:
        return await self._apart(partial(planned_to_proto, *await self._admit(request.graph)))

    async def _admit(self, message: graph_pb2.Graph) -> Any:
        def work(until: float = math.inf) -> Any:
            with rarely():
                admitted = self.admission.admit(message, until=until)
                return admitted, plan(admitted)

        self.admission.check_nodes(message)
        await self._learn_sources(message)
        if len(message.nodes) <= _SMALL_GRAPH and message.ByteSize() <= _SMALL_BYTES:
            # A few operations of a few bytes may be much to check all the same.
            with contextlib.suppress(TookLongError):
                return work(time.monotonic() + _SMALL_SECONDS)
        return await self._apart(work)

    async def _learn_sources(self, message: graph_pb2.Graph) -> None:
        """Learn what is inside the functions that a graph looks into, apart from others: the model has to run for it.

        Raises:
            LimitError: these are too many at once.
        """
        wanted: dict[str, set[Inside]] = {}
        for name, address in {(name, site.address) for name, site in _sites(message) if SOURCE in site.address}:
            if (model := self.models.get(name)) is not None:
                needed = model.catalogue.needed_sources(Address(address))
                wanted.setdefault(name, set()).update(each for each in needed if each not in model.catalogue.sources)
        count = sum(map(len, wanted.values()))
        if count > _MOST_LEARNT:
            raise LimitError(
                f"The graph looks into {count:,} functions; the server learns {_MOST_LEARNT} at a time.",
                hint="Split it into several traces.",
            )
        for name, insides in wanted.items():
            if insides:
                await self._learn(name, partial(self._learn_all, name, insides))

    def _learn_all(self, model: str, insides: Iterable[Inside]) -> None:
        for inside in sorted(insides, key=lambda each: len(each[1])):
            with contextlib.suppress(SiteError):  # which is said again, at the line that names it
                self.models[model].catalogue.source(*inside)

    async def _learn(self, model: str, work: Callable[[], T]) -> T:
        """What `work` returns, which runs a model to learn something of it; one after the other, and between passes.

        Raises:
            BusyError: too many wait for that.
        """
        if self._askers[model] > self.config.limits.queued:
            raise BusyError("Too many want to know what is inside this model.", hint="Try again in a while.")
        self._askers[model] += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._learning[model], apart, work)
        finally:
            self._askers[model] -= 1

    async def _apart(self, work: Callable[[], T], *, small: bool = False) -> T:
        """What `work` returns, done on one of a few threads so that others need not wait for it.

        Small work is done here and now: that is sooner than a thread takes it over.
        """
        return work() if small else await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def Run(  # type: ignore[override]  # server.py sends bytes as they are
        self, request: service_pb2.RunRequest, context: Context
    ) -> AsyncIterator[service_pb2.RunResponse | bytes]:
        done = False
        try:
            self.authenticate(context)
            async with contextlib.aclosing(self._run(request)) as messages:
                async for message in messages:
                    done = _ends(message)
                    yield message
            return
        except grpc.aio.AbortError:
            raise
        except (asyncio.CancelledError, GeneratorExit):
            if not done:
                log.info("a request was cancelled by its client")
            raise
        except Exception as error:
            refusal = _refusal(error)
        await context.abort(*refusal)  # out here, as in `_answering`

    async def _run(self, request: service_pb2.RunRequest) -> AsyncGenerator[service_pb2.RunResponse | bytes, None]:
        _check_compression(request.compression)
        with self._interruptible(request.id) as stopping:
            admitted, planned = await self._admit(request.graph)
            events = self.schedulers[admitted.models[0].name].run(admitted, planned, stopping)
            handles: list[bytes] = []
            done = False
            try:
                async with contextlib.aclosing(events):
                    async for news in events:
                        handles += [each.handle for each in news if isinstance(each, scheduler.Kept)]
                        async for message in self.messages(service_pb2.RunResponse, news, request.compression):
                            done = _ends(message)
                            yield message
            finally:
                if not done:
                    self.kept.forget(handles)  # who asked has left, and cannot know all of them

    async def messages(
        self, kind: type[Message], news: list[scheduler.Event], compression: tensor_pb2.Compression
    ) -> AsyncGenerator[Message | bytes, None]:
        """Events as messages; what is on the disk is read apart. The events are dropped once all have been sent."""
        messages = _messages(kind, news, compression)
        small = not any(isinstance(each, scheduler.Chunk) and isinstance(each.response, OnDisk) for each in news)
        while (message := await self._apart(partial(next, messages, None), small=small)) is not None:
            yield message
        news.clear()


async def _readable(parts: AsyncIterator[Request]) -> AsyncIterator[Request]:
    """The parts of a stream. One that is no message reaches us here, where gRPC refuses a request of one part itself.

    Raises:
        GraphError: a part is no message.
    """
    try:
        async for part in parts:
            yield part
    except DecodeError:
        raise GraphError(
            "A part of the stream is no message of this protocol.",
            hint="Use the same version of Patchwire on both sides.",
        ) from None


def _sites(message: graph_pb2.Graph) -> Iterator[tuple[str, graph_pb2.Site]]:
    """The sites that a graph and the bodies of its loops name, each after the name of its model."""
    for part in (message, *(trace.loop.body for trace in message.traces if trace.HasField("loop"))):
        for node in part.nodes:
            kind = node.WhichOneof("body")
            if kind in ("read", "write"):
                site = getattr(node, kind).site
                if site.trace < len(part.traces):
                    yield part.traces[site.trace].model, site


class JobService(job_pb2_grpc.JobServiceServicer):
    """The methods for detached jobs, over the same models and queues."""

    def __init__(self, service: PatchwireService) -> None:
        self.service = service
        self.jobs = service.jobs

    def authenticate(self, context: Context) -> None:
        """Check the token of an RPC."""
        self.service.authenticate(context)

    @_answering
    async def SubmitJob(self, request: job_pb2.SubmitJobRequest, context: Context) -> job_pb2.SubmitJobResponse:
        _check_compression(request.compression)
        admitted, planned = await self.service._admit(request.graph)
        if admitted.bodies or any(node.target is g.keep for node in admitted.graph.nodes):
            raise GraphError(
                "A detached job cannot loop, or keep values: nobody waits for it.",
                hint="Run it as an ordinary request.",
            )
        queue = self.service.schedulers[admitted.models[0].name]
        queue.check_room()
        job = await self.jobs.submit(
            self.service.owner(context),
            admitted.models[0].name,
            self._lasting(queue.run(admitted, planned, ahead=_AHEAD_OF_DISK), request.compression),
            expected_bytes=saved_bytes(admitted.graph.nodes),
            position=partial(queue.position, planned),
        )
        return job_pb2.SubmitJobResponse(job=job)

    @_answering
    async def GetJob(self, request: job_pb2.GetJobRequest, context: Context) -> job_pb2.GetJobResponse:
        job = await self.jobs.get(self.service.owner(context), request.id, request.wait_seconds)
        return job_pb2.GetJobResponse(job=job)

    @_answering
    async def ListJobs(self, request: job_pb2.ListJobsRequest, context: Context) -> job_pb2.ListJobsResponse:
        return job_pb2.ListJobsResponse(jobs=self.jobs.of(self.service.owner(context)))

    async def FetchJob(  # type: ignore[override]  # as `Run`
        self, request: job_pb2.FetchJobRequest, context: Context
    ) -> AsyncIterator[job_pb2.FetchJobResponse | bytes]:
        try:
            self.authenticate(context)
            async with contextlib.aclosing(self.jobs.fetch(self.service.owner(context), request.id)) as responses:
                async for response in responses:
                    yield response
            return
        except Exception as error:
            refusal = _refusal(error)
        await context.abort(*refusal)  # out here, as in `_answering`

    @_answering
    async def CancelJob(self, request: job_pb2.CancelJobRequest, context: Context) -> job_pb2.CancelJobResponse:
        return job_pb2.CancelJobResponse(job=await self.jobs.cancel(self.service.owner(context), request.id))

    @_answering
    async def ForgetJob(self, request: job_pb2.ForgetJobRequest, context: Context) -> job_pb2.ForgetJobResponse:
        await self.jobs.forget(self.service.owner(context), request.id)
        return job_pb2.ForgetJobResponse()

    async def _lasting(
        self, events: AsyncGenerator[list[scheduler.Event], None], compression: tensor_pb2.Compression
    ) -> AsyncGenerator[job_pb2.FetchJobResponse | bytes, None]:
        """What happens to a job, as messages; raises only errors that can be told later, in a message too."""
        try:
            async with contextlib.aclosing(events):
                async for news in events:
                    async for message in self.service.messages(job_pb2.FetchJobResponse, news, compression):
                        yield message
        except ConnectionLostError:
            raise stopped() from None
        except InternalError as error:
            raise ExecutionError(
                f"internal error ({error}); the server's log has it",
                hint="Whoever runs the server finds there what happened.",
            ) from None
        except PatchwireError as error:
            raise _short(error) from None


def _check_compression(compression: tensor_pb2.Compression) -> None:
    if compression not in tensors.COMPRESSIONS:
        raise GraphError(f"compression {compression} is not known to this version.")


_RESPONSE_BYTES = tensors.MIB
_APART_BYTES = 256 * 1024

Message = TypeVar("Message", service_pb2.RunResponse, job_pb2.FetchJobResponse)


def _messages(
    kind: type[Message], news: Iterable[scheduler.Event], compression: tensor_pb2.Compression
) -> Iterator[Message | bytes]:
    """Events as messages, as many in each as fit; a large chunk is one of its own, as bytes."""
    message, length = kind(), 0
    for event in (_event(each, compression) for each in news):
        apart = isinstance(event, bytes)
        size = len(event) if isinstance(event, bytes) else event.ByteSize()
        if length and (apart or length + size > _RESPONSE_BYTES):
            yield message
            message, length = kind(), 0
        if isinstance(event, bytes):
            yield event
            continue
        message.events.append(event)
        length += size
    if length:
        yield message


def _ends(message: service_pb2.RunResponse | bytes) -> bool:
    return isinstance(message, service_pb2.RunResponse) and message.events[-1].HasField("done")


def _chunk(response: bytes, compression: tensor_pb2.Compression) -> service_pb2.Event | bytes:
    """A chunk, packed if it is to be; a large one as the response whose only event it is."""
    chunk = framing.chunk_of(response)
    assert chunk is not None
    (packed,) = tensors.packed([chunk], compression)
    if len(packed) < _APART_BYTES:
        return service_pb2.Event(chunk=bytes(packed))
    return response if packed is chunk else framing.response(packed)


def _iteration(iteration: Iteration | None) -> service_pb2.Iteration | None:
    return None if iteration is None else service_pb2.Iteration(loop=iteration[0], number=iteration[1])


def _event(event: scheduler.Event, compression: tensor_pb2.Compression) -> service_pb2.Event | bytes:
    """The event of the protocol for what happened; a large chunk as the response whose only event it is."""
    match event:
        case scheduler.Queued():
            return service_pb2.Event(queued=service_pb2.Queued(position=event.position))
        case scheduler.Running():
            return service_pb2.Event(running=service_pb2.Running(number=event.number, passes=event.passes))
        case scheduler.Saved():
            header = tensors.header(event, compression)
            saved = service_pb2.Saved(node=event.node, header=header, iteration=_iteration(event.iteration))
            return service_pb2.Event(saved=saved)
        case scheduler.Chunk():
            response = event.response.read() if isinstance(event.response, OnDisk) else event.response
            return _chunk(response, compression)
        case scheduler.Kept():
            kept = service_pb2.Kept(node=event.node, handle=event.handle, seconds=event.seconds)
            kept.header.CopyFrom(tensors.header(event.tensor))
            return service_pb2.Event(kept=kept)
        case scheduler.Absent():
            absent = service_pb2.Absent(node=event.node, iteration=_iteration(event.iteration))
            return service_pb2.Event(absent=absent)
        case scheduler.Iterated():
            return service_pb2.Event(iterated=service_pb2.Iterated(**vars(event)))
        case scheduler.Tokens():
            return service_pb2.Event(tokens=service_pb2.Tokens(trace=event.trace, invoke=event.invoke, ids=event.ids))
        case scheduler.Logged():
            logged = service_pb2.Logged(node=event.node, text=event.text, iteration=_iteration(event.iteration))
            return service_pb2.Event(logged=logged)
        case scheduler.Done():
            cost = event.cost
            return service_pb2.Event(
                done=service_pb2.Done(
                    passes=cost.passes,
                    rows=cost.rows,
                    modules_skipped=cost.modules_skipped,
                    seconds_queued=event.seconds_queued,
                    seconds_running=cost.seconds,
                    result_bytes=cost.result_bytes,
                    forks=cost.forks,
                    companions=cost.companions,
                )
            )
