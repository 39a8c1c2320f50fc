"""Tensors on the wire: dtype, shape and raw little-endian bytes, in chunks.

A tensor is one header and as many chunks as it needs. Bytes are never re-ordered or re-typed: what leaves the device is
what is written, and what is read is viewed in place.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
import zstandard
from torch import Tensor

from patchwire import recycling
from patchwire.errors import GraphError, LimitError
from patchwire.v1 import tensor_pb2 as pb

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("patchwire needs a little-endian machine: tensors travel as little-endian bytes")

MIB = 1 << 20

DTYPES: Mapping[pb.Dtype, torch.dtype] = {
    pb.DTYPE_BOOL: torch.bool,
    pb.DTYPE_UINT8: torch.uint8,
    pb.DTYPE_INT8: torch.int8,
    pb.DTYPE_INT16: torch.int16,
    pb.DTYPE_INT32: torch.int32,
    pb.DTYPE_INT64: torch.int64,
    pb.DTYPE_FLOAT16: torch.float16,
    pb.DTYPE_BFLOAT16: torch.bfloat16,
    pb.DTYPE_FLOAT32: torch.float32,
    pb.DTYPE_FLOAT64: torch.float64,
    pb.DTYPE_COMPLEX64: torch.complex64,
    pb.DTYPE_COMPLEX128: torch.complex128,
    pb.DTYPE_FLOAT8_E4M3FN: torch.float8_e4m3fn,
    pb.DTYPE_FLOAT8_E5M2: torch.float8_e5m2,
}
_WIRE = {dtype: wire for wire, dtype in DTYPES.items()}
_MAX_DIMENSIONS = 64
_MAX_BYTES = 1 << 63
_LARGEST_CHUNK = 4 * MIB

COMPRESSIONS = (pb.COMPRESSION_UNSPECIFIED, pb.COMPRESSION_ZSTD)
"""How chunks may be packed."""


class Described(Protocol):
    """Anything that has the dtype and shape of a tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Its element type."""

    @property
    def shape(self) -> torch.Size:
        """Its lengths."""


def dtype_to_proto(dtype: torch.dtype) -> pb.Dtype:
    """The wire's name of a dtype.

    Raises:
        GraphError: the wire has no name for it.
    """
    try:
        return _WIRE[dtype]
    except KeyError:
        raise GraphError(
            f"{dtype} cannot be sent.", hint=f"These can: {', '.join(str(each) for each in _WIRE)}."
        ) from None


def dtype_from_proto(wire: pb.Dtype) -> torch.dtype:
    """The dtype of a wire name.

    Raises:
        GraphError: there is no such name.
    """
    try:
        return DTYPES[wire]
    except KeyError:
        raise GraphError(f"dtype {wire} is not known to this version.") from None


def header(tensor: Described, compression: pb.Compression = pb.COMPRESSION_UNSPECIFIED) -> pb.TensorHeader:
    """What `tensor` is, before its bytes."""
    return pb.TensorHeader(dtype=dtype_to_proto(tensor.dtype), shape=tensor.shape, compression=compression)


def size(head: pb.TensorHeader, limit: int | None = None) -> int:
    """The number of bytes of a tensor with this header.

    Raises:
        GraphError: a length is negative, there are too many dimensions, or the dtype is not known.
        LimitError: there are more than `limit` bytes.
    """
    if len(head.shape) > _MAX_DIMENSIONS or any(length < 0 for length in head.shape):
        raise GraphError(f"{list(head.shape)[:8]} is not a shape.")
    itemsize = dtype_from_proto(head.dtype).itemsize
    total = math.prod(head.shape) * itemsize
    if limit is not None and total > limit:
        raise LimitError(f"A tensor of shape {list(head.shape)} has {total:,} bytes; at most {limit:,} are allowed.")
    if math.prod(max(length, 1) for length in head.shape) * itemsize >= _MAX_BYTES:
        raise GraphError(f"{list(head.shape)[:8]} is not a shape.")
    return total


def data(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in C order; no copy if it is contiguous and on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if flat.is_conj() or flat.is_neg():
        flat = flat.resolve_conj().resolve_neg()
    if flat.numel() == 0:
        return memoryview(bytearray())
    if flat.stride() != (1,):  # one element counts as contiguous whatever its stride, but cannot be viewed as bytes
        flat = flat.as_strided((1,), (1,))
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def pieces(tensor: Tensor, length: int = MIB) -> Iterator[memoryview]:
    """The bytes of a tensor in C order, `length` at a time, in place if it is contiguous and on the CPU."""
    view = data(tensor)
    for start in range(0, len(view), length):
        yield view[start : start + length]


def packed(parts: Iterable[bytes | memoryview], compression: pb.Compression) -> Iterator[bytes | memoryview]:
    """Parts of a tensor's bytes as chunks, each packed on its own."""
    if compression != pb.COMPRESSION_ZSTD:
        yield from parts
        return
    pack = zstandard.ZstdCompressor(level=1).compress
    for each in parts:
        yield pack(each)


def chunks(
    tensor: Tensor, *, length: int = MIB, compression: pb.Compression = pb.COMPRESSION_UNSPECIFIED
) -> Iterator[bytes]:
    """The bytes of a tensor in C order, `length` at a time, each chunk packed on its own."""
    yield from map(bytes, packed(pieces(tensor, length), compression))


class Assembly:
    """A tensor that is being received: memory of the right size, filled chunk by chunk."""

    def __init__(self, head: pb.TensorHeader, limit: int | None = None, into: Tensor | None = None) -> None:
        """
        Args:
            head: What is to come.
            limit: The most bytes that it may have.
            into: A contiguous tensor on the CPU to receive it in; None takes new memory.

        Raises:
            GraphError: it is no tensor, or not one of the shape and dtype of `into`.
            LimitError: there are more than `limit` bytes.
        """
        self.total = size(head, limit)
        self.filled = 0
        shape, dtype = torch.Size(head.shape), dtype_from_proto(head.dtype)
        if into is not None and (into.shape, into.dtype) != (shape, dtype):
            raise GraphError(f"A value of shape {list(shape)} and {dtype} does not fit into one of {_told(into)}.")
        self._tensor = recycling.empty(shape, dtype) if into is None else into.detach()
        self._bytes = np.frombuffer(data(self._tensor), np.uint8)
        if head.compression not in COMPRESSIONS:
            raise GraphError(f"compression {head.compression} is not known to this version.")
        self._unpack = zstandard.ZstdDecompressor() if head.compression == pb.COMPRESSION_ZSTD else None

    @property
    def complete(self) -> bool:
        """Whether all bytes are here."""
        return self.filled == self.total

    def add(self, chunk: bytes | memoryview) -> None:
        """Put the next bytes in their place.

        Raises:
            GraphError: there are more bytes than the header announced, or they cannot be unpacked.
        """
        room = self.total - self.filled
        if self._unpack is not None:
            chunk = self._decompress(chunk, room)
        if len(chunk) > room:
            raise GraphError("A tensor has more bytes than its header announced.")
        # NumPy lets other threads run meanwhile: the one that takes the next chunk from gRPC needs the time.
        self._bytes[self.filled : self.filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
        self.filled += len(chunk)

    def _decompress(self, chunk: bytes | memoryview, room: int) -> bytes:
        assert self._unpack is not None
        try:
            announced = zstandard.frame_content_size(chunk)
            if announced < 0 or announced > min(room, _LARGEST_CHUNK):
                raise GraphError("A compressed chunk does not say its size, or it is too large.")
            return self._unpack.decompress(chunk, max_output_size=room)
        except zstandard.ZstdError as error:
            raise GraphError(f"A chunk cannot be decompressed: {error}.") from None

    def tensor(self) -> Tensor:
        """The tensor.

        Raises:
            GraphError: bytes are missing.
        """
        if not self.complete:
            raise GraphError(f"A tensor ended after {self.filled:,} of {self.total:,} bytes.")
        if self._tensor.dtype == torch.bool and self._tensor.view(torch.uint8).gt(1).any():
            raise GraphError("A bool tensor has bytes other than 0 and 1.")
        return self._tensor


def _told(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)} and {tensor.dtype}"


def to_proto(tensor: Tensor) -> pb.Tensor:
    """A whole tensor in one message."""
    return pb.Tensor(header=header(tensor), data=bytes(data(tensor)))


def from_proto(message: pb.Tensor, limit: int | None = None) -> Tensor:
    """The tensor of a message; see `Assembly` for errors."""
    if message.header.compression != pb.COMPRESSION_UNSPECIFIED:
        raise GraphError("A tensor inside a message is never compressed.")
    assembly = Assembly(message.header, limit)
    assembly.add(message.data)
    return assembly.tensor()


def digest(tensor: Tensor) -> bytes:
    """The name of a tensor's content: SHA-256 of its dtype, shape and bytes."""
    sha = hashlib.sha256(_identity(dtype_to_proto(tensor.dtype), tensor.shape))
    sha.update(data(tensor))
    return sha.digest()


def _identity(dtype: int, shape: Sequence[int]) -> bytes:
    return f"{dtype}:{','.join(str(length) for length in shape)}:".encode()
