"""Chunks written and read by hand: what protobuf writes and reads, and nothing else is taken for one."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from patchwire import framing
from patchwire.v1 import job_pb2, service_pb2

KINDS = [service_pb2.RunResponse, job_pb2.FetchJobResponse]


def alone(kind, chunk: bytes):
    """The message whose only event is a chunk."""
    return kind(events=[service_pb2.Event(chunk=chunk)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [0, 1, 120, 123, 124, 127, 128, 16_379, 16_384, 1 << 19, (1 << 21) + 3])
def test_a_chunk_is_what_protobuf_makes_of_it(kind, length):
    chunk = bytes(range(256)) * (length // 256 + 1)
    chunk = chunk[:length]

    written = framing.response(memoryview(chunk))

    assert written == alone(kind, chunk).SerializeToString()
    assert kind.FromString(written).events[0].chunk == chunk
    found = framing.parser(kind)(written)
    assert isinstance(found, memoryview)
    assert found == chunk


def test_each_response_is_a_copy_of_its_own():
    content = bytearray(b"a" * 150 + b"b" * 150)
    view = memoryview(content)
    responses = framing.responses([view[:200], view[200:], view[300:]])
    first = next(responses)
    content[:] = b"c" * 300

    assert first == framing.response(b"a" * 150 + b"b" * 50)
    assert list(responses) == [framing.response(b"c" * 100), framing.response(b"")]


OTHERS = [
    service_pb2.RunResponse(),
    service_pb2.RunResponse(events=[service_pb2.Event()]),
    service_pb2.RunResponse(events=[service_pb2.Event(done=service_pb2.Done())]),
    service_pb2.RunResponse(events=[service_pb2.Event(chunk=b"a"), service_pb2.Event(chunk=b"b")]),
    service_pb2.RunResponse(events=[service_pb2.Event(chunk=b"a"), service_pb2.Event(done=service_pb2.Done(rows=1))]),
]


@pytest.mark.parametrize("message", OTHERS, ids=str)
def test_any_other_message_is_read_by_protobuf(message):
    assert framing.parser(service_pb2.RunResponse)(message.SerializeToString()) == message


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a",
        b"\x0a\x03\x22",
        b"\x0a\x03\x22\x02a",
        b"\x0a\x05\x22\x01a",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x22\x01a",
        b"\x0a\x80\x80\x80\x80\x80",
        b"\x0a\x04\x22\xff\xff\xff\xff\x0fa",
    ],
)
def test_what_is_no_message_is_refused_as_protobuf_refuses_it(data):
    assert framing.chunk_of(data) is None
    with pytest.raises(DecodeError):
        framing.parser(service_pb2.RunResponse)(data)


@given(st.binary(max_size=60) | st.binary(max_size=40).map(lambda data: b"\x0a" + bytes([len(data)]) + data))
def test_no_bytes_are_read_otherwise_than_by_protobuf(data):
    chunk = framing.chunk_of(data)

    if chunk is not None:
        (event,) = service_pb2.RunResponse.FromString(data).events
        assert event.chunk == bytes(chunk)
