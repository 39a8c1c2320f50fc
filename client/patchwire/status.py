"""Errors on the wire: a gRPC status with one `ErrorDetail`, to and from exceptions.

One table says which exception class is which kind of error and which status code; both directions read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, cast

import grpc
from google.protobuf import any_pb2
from google.rpc import status_pb2
from grpc_status import rpc_status

from patchwire import errors
from patchwire.errors import PatchwireError, SourceLine
from patchwire.v1 import error_pb2 as pb
from patchwire.v1 import graph_pb2


class _Row(NamedTuple):
    kind: pb.ErrorKind
    error: type[PatchwireError]
    code: grpc.StatusCode


_TABLE = (
    _Row(pb.ERROR_KIND_SITE, errors.SiteError, grpc.StatusCode.INVALID_ARGUMENT),
    _Row(pb.ERROR_KIND_SHAPE, errors.ShapeError, grpc.StatusCode.INVALID_ARGUMENT),
    _Row(pb.ERROR_KIND_ORDER, errors.OrderError, grpc.StatusCode.INVALID_ARGUMENT),
    _Row(pb.ERROR_KIND_OPERATION, errors.OperationError, grpc.StatusCode.INVALID_ARGUMENT),
    _Row(pb.ERROR_KIND_GRAPH, errors.GraphError, grpc.StatusCode.INVALID_ARGUMENT),
    _Row(pb.ERROR_KIND_LIMIT, errors.LimitError, grpc.StatusCode.OUT_OF_RANGE),
    _Row(pb.ERROR_KIND_MODEL, errors.ModelNotFoundError, grpc.StatusCode.NOT_FOUND),
    _Row(pb.ERROR_KIND_INPUT, errors.InputError, grpc.StatusCode.INVALID_ARGUMENT),
    _Row(pb.ERROR_KIND_EXECUTION, errors.ExecutionError, grpc.StatusCode.ABORTED),
    _Row(pb.ERROR_KIND_VERSION, errors.VersionError, grpc.StatusCode.FAILED_PRECONDITION),
    _Row(pb.ERROR_KIND_MISSING_TENSORS, errors.MissingTensorsError, grpc.StatusCode.FAILED_PRECONDITION),
    _Row(pb.ERROR_KIND_AUTHENTICATION, errors.AuthenticationError, grpc.StatusCode.UNAUTHENTICATED),
    _Row(pb.ERROR_KIND_BUSY, errors.BusyError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    _Row(pb.ERROR_KIND_TIMEOUT, errors.TimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED),
    _Row(pb.ERROR_KIND_JOB, errors.JobError, grpc.StatusCode.NOT_FOUND),
)
_LONGEST_WORDS = 500
_BY_KIND = {row.kind: row for row in _TABLE}
_BY_ERROR = {row.error: row for row in _TABLE}


def line_to_proto(line: SourceLine) -> graph_pb2.SourceLine:
    """A line of the user's program as a message."""
    return graph_pb2.SourceLine(file=line.file, line=line.line, code=line.code)


def line_from_proto(message: graph_pb2.SourceLine) -> SourceLine:
    """A line of the user's program from a message."""
    return SourceLine(message.file, message.line, message.code)


def error_to_proto(error: PatchwireError, server_version: str = "") -> pb.ErrorDetail:
    """The detail of an error that the table knows."""
    detail = pb.ErrorDetail(
        kind=_BY_ERROR[type(error)].kind,
        message=error.message,
        hint=error.hint,
        lines=[line_to_proto(line) for line in error.lines],
        server_version=server_version,
    )
    if isinstance(error, errors.MissingTensorsError):
        detail.missing.extend(error.missing)
    return detail


def error_from_proto(detail: pb.ErrorDetail) -> PatchwireError:
    """The exception of a detail."""
    kind = _BY_KIND.get(detail.kind)
    found = (kind.error if kind else PatchwireError)(detail.message, hint=detail.hint, lines=_lines(detail.lines))
    if isinstance(found, errors.MissingTensorsError):
        found.missing = tuple(detail.missing)
    return found


def error_to_status(error: PatchwireError, server_version: str = "") -> status_pb2.Status:
    """The status of an error that the table knows."""
    packed = any_pb2.Any()
    packed.Pack(error_to_proto(error, server_version))
    # These words are for those who cannot read the detail; gRPC makes three bytes of each that is not ASCII.
    words = error.message[:_LONGEST_WORDS].encode("ascii", "replace").decode()
    return status_pb2.Status(code=_BY_ERROR[type(error)].code.value[0], message=words, details=[packed])


def error_from_call(error: grpc.RpcError, address: str, *, started: bool = False) -> PatchwireError:
    """The exception for an RPC that failed.

    Args:
        error: What gRPC raised.
        address: The server's address, for messages.
        started: Whether the server had answered before.
    """
    detail = _detail(error)
    if detail is not None:
        return error_from_proto(detail)
    code, words = error.code(), error.details() or ""
    match code:
        case grpc.StatusCode.UNAVAILABLE if started:
            return errors.ConnectionLostError(
                f"The server at {address} went away in the middle of the request.",
                hint="Nothing of this request is kept; run it again once the server is back.",
            )
        case grpc.StatusCode.UNAVAILABLE:
            return errors.ConnectionFailedError(
                f"No server answers at {address}.",
                hint="Start one with `patchwire serve MODEL`, or check the address, the port and TLS.",
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.TimeoutError(
                "The request took longer than its deadline.",
                hint="Ask for less in one trace, or connect with a longer `timeout`.",
            )
        case grpc.StatusCode.CANCELLED:
            return errors.CancelledError("The request was cancelled.")
        case grpc.StatusCode.UNAUTHENTICATED:
            return errors.AuthenticationError(words or "The token is missing or wrong.")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "Concurrent RPC limit" in words:
            return errors.BusyError("The server answers too many requests at once.", hint="Try again in a while.")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return errors.LimitError(f"A message is larger than allowed: {words}.")
        case grpc.StatusCode.UNIMPLEMENTED:
            return errors.VersionError(
                f"The server at {address} does not know this request: it is not a Patchwire server, or an older one.",
                hint="Compare `patchwire doctor` here and there.",
            )
    return errors.ExecutionError(f"The server at {address} failed: {words or code.name}.")


def _detail(error: grpc.RpcError) -> pb.ErrorDetail | None:
    try:
        status = rpc_status.from_call(cast(grpc.Call, error))
    except ValueError:  # details that contradict the call: not ours
        return None
    if status is None:
        return None
    detail = pb.ErrorDetail()
    for each in status.details:
        if each.Unpack(detail):
            return detail
    return None


def _lines(messages: Iterable[graph_pb2.SourceLine]) -> list[SourceLine]:
    return [line_from_proto(each) for each in messages]
