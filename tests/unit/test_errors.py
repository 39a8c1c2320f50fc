"""Errors: what happened, at which line, what to write instead; the same words on both sides of the wire."""

from __future__ import annotations

import copy
import pickle

import grpc
import pytest
from google.rpc import status_pb2
from grpc_status import rpc_status

import patchwire
from patchwire import errors
from patchwire.errors import PatchwireError, SourceLine
from patchwire.status import error_from_call, error_to_status, line_from_proto, line_to_proto
from patchwire.v1 import error_pb2

CLASSES = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, PatchwireError)]
LINES = (SourceLine("/home/me/experiment.py", 14, "h[:] = 0"), SourceLine("/home/me/other.py", 3, "h = f()"))


class FakeCall(grpc.RpcError):
    """What gRPC raises: a code, words, and trailing metadata."""

    def __init__(self, code: grpc.StatusCode, words: str = "", metadata: tuple = ()) -> None:
        self.answer = (code, words, metadata)

    def code(self) -> grpc.StatusCode:
        return self.answer[0]

    def details(self) -> str:
        return self.answer[1]

    def trailing_metadata(self) -> tuple:
        return self.answer[2]


def over_the_wire(status: status_pb2.Status) -> PatchwireError:
    """The exception that a client raises for a status of a server."""
    sent = rpc_status.to_status(status)
    return error_from_call(FakeCall(sent.code, sent.details, sent.trailing_metadata), "gpu-box:50051")


class TestText:
    def test_says_what_happened_where_and_what_to_write(self):
        error = errors.SiteError("`x` does not exist.", hint="Write `y`.", lines=LINES)

        assert str(error) == (
            "`x` does not exist.\n\n    experiment.py:14    h[:] = 0\n    other.py:3    h = f()\n\nWrite `y`."
        )

    def test_of_a_message_alone_is_the_message(self):
        assert str(errors.LimitError("Too large.")) == "Too large."

    def test_of_a_line_in_a_notebook_keeps_its_name(self):
        assert str(SourceLine("<ipython-input-3>", 2, "x")) == "    <ipython-input-3>:2    x"

    def test_of_a_line_without_code_ends_with_its_number(self):
        assert str(SourceLine("/a/b.py", 2)) == "    b.py:2"


@pytest.mark.parametrize("kind", CLASSES, ids=lambda each: each.__name__)
class TestEveryClass:
    def test_can_be_pickled_and_copied(self, kind):
        error = kind("message", hint="hint", lines=LINES)

        for back in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
            assert type(back) is kind
            assert (back.message, back.hint, back.lines) == ("message", "hint", LINES)
            assert str(back) == str(error)

    def test_is_found_in_the_package_and_in_the_documentation(self, kind):
        assert getattr(patchwire, kind.__name__) is kind
        assert kind.__module__ == "patchwire"
        assert kind is PatchwireError or f"| `{kind.__name__}` |" in errors.__doc__


def test_missing_tensors_keep_their_names_when_pickled():
    error = errors.MissingTensorsError("gone")
    error.missing = (b"\x01" * 32,)

    assert pickle.loads(pickle.dumps(error)).missing == error.missing


@pytest.mark.parametrize(
    "kind",
    [
        errors.SiteError,
        errors.ShapeError,
        errors.OrderError,
        errors.OperationError,
        errors.GraphError,
        errors.LimitError,
        errors.ModelNotFoundError,
        errors.InputError,
        errors.ExecutionError,
        errors.VersionError,
        errors.MissingTensorsError,
        errors.AuthenticationError,
        errors.BusyError,
        errors.TimeoutError,
    ],
    ids=lambda each: each.__name__,
)
def test_an_error_of_the_server_is_the_same_error_on_the_laptop(kind):
    error = kind("message", hint="hint", lines=LINES)

    back = over_the_wire(error_to_status(error, "1.2.3"))

    assert type(back) is kind
    assert (back.message, back.hint, back.lines) == ("message", "hint", LINES)


def test_every_kind_of_the_protocol_has_its_class():
    kinds = set(error_pb2.ErrorKind.values()) - {error_pb2.ERROR_KIND_UNSPECIFIED}
    found = set()
    for kind in kinds:
        status = status_pb2.Status(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message="m")
        status.details.add().Pack(error_pb2.ErrorDetail(kind=kind, message="m"))
        found.add(type(over_the_wire(status)))

    assert len(found) == len(kinds)
    assert PatchwireError not in found


def test_a_kind_of_a_newer_server_is_an_error_with_its_words():
    status = status_pb2.Status(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message="m")
    status.details.add().Pack(error_pb2.ErrorDetail(kind=99, message="something new", hint="update"))

    back = over_the_wire(status)

    assert type(back) is PatchwireError
    assert (back.message, back.hint) == ("something new", "update")


def test_the_server_s_version_travels_with_an_error():
    status = error_to_status(errors.OperationError("no"), "1.2.3")
    detail = error_pb2.ErrorDetail()

    assert status.details[0].Unpack(detail)
    assert detail.server_version == "1.2.3"


def test_the_hashes_of_missing_tensors_travel_with_their_error():
    error = errors.MissingTensorsError("gone")
    error.missing = (b"\x01" * 32, b"\x02" * 32)

    assert over_the_wire(error_to_status(error)).missing == error.missing


def test_a_line_comes_back_from_its_message():
    assert line_from_proto(line_to_proto(LINES[0])) == LINES[0]


@pytest.mark.parametrize(
    ("code", "started", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, False, errors.ConnectionFailedError),
        (grpc.StatusCode.UNAVAILABLE, True, errors.ConnectionLostError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, True, errors.TimeoutError),
        (grpc.StatusCode.CANCELLED, True, errors.CancelledError),
        (grpc.StatusCode.UNAUTHENTICATED, False, errors.AuthenticationError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, False, errors.LimitError),
        (grpc.StatusCode.UNIMPLEMENTED, False, errors.VersionError),
        (grpc.StatusCode.INTERNAL, False, errors.ExecutionError),
        (grpc.StatusCode.UNKNOWN, True, errors.ExecutionError),
        (grpc.StatusCode.DATA_LOSS, False, errors.ExecutionError),
    ],
)
def test_a_status_without_our_detail_has_its_class_too(code, started, kind):
    error = error_from_call(FakeCall(code, "words"), "gpu-box:50051", started=started)

    assert type(error) is kind
    assert error.message


def test_a_server_with_too_many_requests_is_busy():
    error = error_from_call(FakeCall(grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!"), "here")

    assert type(error) is errors.BusyError


def test_details_that_contradict_their_call_are_not_believed():
    sent = rpc_status.to_status(error_to_status(errors.SiteError("no such site")))

    error = error_from_call(FakeCall(grpc.StatusCode.INTERNAL, "other words", sent.trailing_metadata), "gpu-box:50051")

    assert type(error) is errors.ExecutionError


def test_the_nearest_names_are_suggested_best_first():
    assert errors.nearest("mixr", ["mlp", "mixer", "norm"]) == ["mixer"]
    assert errors.nearest("zzz", ["mlp", "mixer", "norm"]) == []
