"""Chunks of tensors as messages, with one copy on each side: straight from the tensor into the bytes that gRPC sends.

A response that carries nothing but a chunk is a few bytes, known by heart, and then the chunk. They are written and
read here by hand: protobuf would copy the chunk twice more. What is written is what protobuf writes for the same
response, and whatever does not look like it goes to protobuf; neither side has to know how the other one does it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

_EVENTS = b"\x0a"
"""The tag of `RunResponse.events` and of `FetchJobResponse.events`: field 1, of a length."""
_CHUNK = b"\x22"
"""The tag of `Event.chunk`: field 4, of a length."""
_LONGEST_VARINT = 5

# `PyBytes_FromStringAndSize(NULL, length)` is Python's own way to make bytes that are filled before anybody sees them.
_NEW_BYTES = ctypes.pythonapi.PyBytes_FromStringAndSize
_NEW_BYTES.argtypes, _NEW_BYTES.restype = (ctypes.c_void_p, ctypes.c_ssize_t), ctypes.py_object
_ADDRESS = ctypes.pythonapi.PyBytes_AsString
_ADDRESS.argtypes, _ADDRESS.restype = (ctypes.py_object,), ctypes.c_void_p


def response(chunk: bytes | memoryview) -> bytes:
    """The response, of a run or of a job, whose only event is a chunk."""
    return b"".join((_head(len(chunk)), chunk))


def responses(chunks: Iterable[memoryview]) -> Iterator[bytes]:
    """Each chunk as a response, copied when it is asked for; other threads may run meanwhile."""
    for chunk in chunks:
        head = _head(len(chunk))
        message: bytes = _NEW_BYTES(None, len(head) + len(chunk))
        place = (ctypes.c_char * len(message)).from_address(_ADDRESS(message))
        memory = np.frombuffer(memoryview(place), np.uint8)
        memory[: len(head)] = np.frombuffer(head, np.uint8)
        memory[len(head) :] = np.frombuffer(chunk, np.uint8)
        yield message


def chunk_of(message: bytes) -> memoryview | None:
    """The chunk of a response whose only event it is, in place; None if the message is anything else."""
    event = _field(memoryview(message), _EVENTS)
    return None if event is None else _field(event, _CHUNK)


def serialize(message: Message | bytes) -> bytes:
    """The bytes of a message, which may be bytes already."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def parser(kind: type[M]) -> Callable[[bytes], M | memoryview]:
    """What reads a response of a kind: its chunk, in place, if that is all; or else the message."""

    def parse(message: bytes) -> M | memoryview:
        chunk = chunk_of(message)
        return kind.FromString(message) if chunk is None else chunk

    return parse


def _head(length: int) -> bytes:
    """What is before a chunk of so many bytes in a response."""
    inner = _CHUNK + _varint(length)
    return _EVENTS + _varint(len(inner) + length) + inner


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _field(message: memoryview, tag: bytes) -> memoryview | None:
    """The content of a message's only field; None if it has another field, or more, or less than it says."""
    if message[:1] != tag:
        return None
    length = 0
    for index, byte in enumerate(message[1 : 1 + _LONGEST_VARINT]):
        length |= (byte & 0x7F) << 7 * index
        if not byte & 0x80:
            content = message[2 + index :]
            return content if len(content) == length else None
    return None
