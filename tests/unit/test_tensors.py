"""Tensors on the wire: what comes out is what went in, to the bit, and hostile bytes get a clear error."""

from __future__ import annotations

import hashlib

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchwire import tensors
from patchwire.errors import GraphError, LimitError
from patchwire.v1 import tensor_pb2 as pb

DTYPES = list(tensors.DTYPES.values())
ZSTD = pb.COMPRESSION_ZSTD


def example(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor with every kind of bit pattern that its dtype has."""
    generator = torch.Generator().manual_seed(0)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = torch.empty(shape, dtype=dtype).nbytes
    return torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def received(tensor: Tensor, length: int = tensors.MIB, compression: pb.Compression = pb.COMPRESSION_UNSPECIFIED):
    """A tensor after its way through a header and chunks."""
    assembly = tensors.Assembly(tensors.header(tensor, compression))
    for chunk in tensors.chunks(tensor, length=length, compression=compression):
        assembly.add(chunk)
    return assembly.tensor()


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestEveryDtype:
    @pytest.mark.parametrize("shape", [(3, 5), (), (0,), (2, 0)], ids=str)
    def test_travels_in_one_message_bit_by_bit(self, dtype, shape):
        tensor = example(dtype, *shape)

        assert same(tensors.from_proto(tensors.to_proto(tensor)), tensor)

    @pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1, 1), (7,)], ids=str)
    def test_travels_in_chunks_whatever_its_shape(self, dtype, shape):
        tensor = example(dtype, *shape)

        assert same(received(tensor, length=3), tensor)

    def test_travels_compressed(self, dtype):
        tensor = example(dtype, 40, 5)

        assert same(received(tensor, length=64, compression=ZSTD), tensor)

    def test_has_a_name_that_reads_back(self, dtype):
        assert tensors.dtype_from_proto(tensors.dtype_to_proto(dtype)) is dtype


def test_a_tensor_is_received_in_another_of_its_shape_and_dtype():
    tensor, into = example(torch.float32, 3, 5), torch.zeros(3, 5)
    assembly = tensors.Assembly(tensors.header(tensor), into=into)
    for chunk in tensors.chunks(tensor, length=7):
        assembly.add(chunk)

    assert same(assembly.tensor(), tensor)
    assert same(into, tensor)


@pytest.mark.parametrize("into", [torch.zeros(5, 3), torch.zeros(3, 5).double()])
def test_a_tensor_is_not_received_in_one_of_another_shape_or_dtype(into):
    with pytest.raises(GraphError, match="does not fit into one of"):
        tensors.Assembly(tensors.header(torch.zeros(3, 5)), into=into)


def test_every_dtype_of_the_protocol_is_known():
    assert set(tensors.DTYPES) == set(pb.Dtype.values()) - {pb.DTYPE_UNSPECIFIED}


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(),
        lambda t: t[:, ::2],
        lambda t: t[1:2].expand(4, 6),
        lambda t: t.flip(0),
        lambda t: t.unfold(1, 2, 1),
    ],
    ids=["transposed", "strided", "expanded", "flipped", "overlapping"],
)
def test_a_view_travels_as_what_it_shows(view):
    tensor = view(torch.arange(24.0).reshape(4, 6))

    assert torch.equal(received(tensor, length=7), tensor)


def test_a_conjugate_view_travels_as_its_numbers():
    tensor = example(torch.complex64, 4).nan_to_num().conj()

    assert torch.equal(received(tensor), tensor.resolve_conj())


def test_a_negative_view_travels_as_its_numbers():
    tensor = torch.complex(torch.ones(3), torch.ones(3)).conj().imag

    assert tensor.is_neg()
    assert torch.equal(received(tensor), torch.full((3,), -1.0))


def test_bytes_are_little_endian_in_c_order():
    tensor = torch.tensor([[1, 2], [3, 4]], dtype=torch.int16).t()

    assert tensors.to_proto(tensor).data == b"\x01\x00\x03\x00\x02\x00\x04\x00"


def test_no_chunk_is_longer_than_asked():
    lengths = [len(chunk) for chunk in tensors.chunks(torch.zeros(1000, dtype=torch.uint8), length=300)]

    assert lengths == [300, 300, 300, 100]


def test_an_empty_tensor_needs_no_chunk():
    assert list(tensors.chunks(torch.empty(0, 3))) == []


def test_a_gradient_does_not_travel():
    tensor = torch.ones(3, requires_grad=True)

    assert not received(tensor).requires_grad


def test_a_received_tensor_may_be_changed():
    tensor = tensors.from_proto(tensors.to_proto(torch.zeros(3)))
    tensor += 1

    assert tensor.tolist() == [1, 1, 1]


@settings(deadline=None, max_examples=50)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=4),
    length=st.integers(1, 40),
    compression=st.sampled_from([pb.COMPRESSION_UNSPECIFIED, ZSTD]),
)
def test_any_tensor_comes_back_from_chunks_of_any_length(dtype, shape, length, compression):
    tensor = example(dtype, *shape)

    assert same(received(tensor, length, compression), tensor)


def test_a_dtype_without_a_name_is_refused_with_those_that_have_one():
    with pytest.raises(GraphError, match=r"uint16 cannot be sent.*\n\n.*torch\.bfloat16"):
        tensors.header(torch.zeros(2, dtype=torch.uint16))


class TestDigest:
    def test_is_the_sha_256_of_dtype_shape_and_bytes(self):
        tensor = torch.tensor([1, 2], dtype=torch.uint8)

        assert tensors.digest(tensor) == hashlib.sha256(f"{pb.DTYPE_UINT8}:2:".encode() + b"\x01\x02").digest()

    def test_is_of_the_content_not_of_the_memory(self):
        tensor = torch.arange(6.0).reshape(2, 3)

        assert tensors.digest(tensor.t()) == tensors.digest(tensor.t().contiguous())

    def test_differs_with_shape_and_with_dtype(self):
        tensor = torch.zeros(2, 3)
        others = [tensor, tensor.reshape(3, 2), tensor.reshape(6), tensor.int(), tensor + 1]

        assert len({tensors.digest(each) for each in others}) == len(others)


def hostile(shape=(4,), dtype=pb.DTYPE_FLOAT32, data=b"\0" * 16, compression=pb.COMPRESSION_UNSPECIFIED) -> pb.Tensor:
    return pb.Tensor(header=pb.TensorHeader(dtype=dtype, shape=shape, compression=compression), data=data)


class TestHostileHeaders:
    @pytest.mark.parametrize("shape", [(-1,), (-4, -1), (4, -(2**63))], ids=str)
    def test_a_negative_length_is_refused(self, shape):
        with pytest.raises(GraphError, match="is not a shape"):
            tensors.from_proto(hostile(shape))

    @pytest.mark.parametrize("shape", [(2**62,), (2**63 - 1, 2**63 - 1), (2**40, 2**40, 2**40)], ids=str)
    def test_a_huge_tensor_is_refused_before_memory_is_taken(self, shape):
        with pytest.raises(LimitError, match="at most 1,000 are allowed"):
            tensors.from_proto(hostile(shape), limit=1000)

    @pytest.mark.parametrize(
        "shape", [(2**62, 0, 2**62), (2**63 - 1, 2**63 - 1, 0), (0, 2**63 - 1, 2**63 - 1)], ids=str
    )
    def test_a_huge_shape_of_nothing_is_a_tensor_or_refused(self, shape):
        try:
            tensor = tensors.from_proto(hostile(shape, data=b""), limit=1000)
        except GraphError:
            return
        assert tensor.numel() == 0

    def test_too_many_dimensions_are_refused(self):
        with pytest.raises(GraphError, match="is not a shape"):
            tensors.from_proto(hostile([1] * 10_000))

    @pytest.mark.parametrize("dtype", [pb.DTYPE_UNSPECIFIED, 99, 2**31 - 1])
    def test_an_unknown_dtype_is_refused(self, dtype):
        with pytest.raises(GraphError, match=f"dtype {dtype} is not known"):
            tensors.from_proto(hostile(dtype=dtype))

    def test_an_unknown_compression_is_refused(self):
        with pytest.raises(GraphError, match="compression 7"):
            tensors.Assembly(pb.TensorHeader(dtype=pb.DTYPE_FLOAT32, shape=[1], compression=7))

    def test_a_compressed_tensor_inside_a_message_is_refused(self):
        with pytest.raises(GraphError, match="never compressed"):
            tensors.from_proto(hostile(compression=ZSTD))

    def test_the_limit_itself_is_allowed(self):
        assert tensors.from_proto(hostile(), limit=16).shape == (4,)


class TestWrongBytes:
    def test_too_few_are_refused(self):
        with pytest.raises(GraphError, match="ended after 15 of 16 bytes"):
            tensors.from_proto(hostile(data=b"\0" * 15))

    def test_too_many_are_refused(self):
        with pytest.raises(GraphError, match="more bytes than its header announced"):
            tensors.from_proto(hostile(data=b"\0" * 17))

    def test_too_many_in_a_later_chunk_are_refused(self):
        assembly = tensors.Assembly(pb.TensorHeader(dtype=pb.DTYPE_UINT8, shape=[4]))
        assembly.add(b"123")

        with pytest.raises(GraphError, match="more bytes"):
            assembly.add(b"45")

    def test_any_for_an_empty_tensor_are_refused(self):
        with pytest.raises(GraphError, match="more bytes"):
            tensors.from_proto(hostile(shape=(0,), data=b"1"))

    @pytest.mark.parametrize("byte", [b"\x02", b"\xff"])
    def test_a_bool_that_is_neither_0_nor_1_is_refused(self, byte):
        with pytest.raises(GraphError, match="other than 0 and 1"):
            tensors.from_proto(hostile((3,), pb.DTYPE_BOOL, b"\x00\x01" + byte))


class TestCompressedBytes:
    def assembly(self, length: int) -> tensors.Assembly:
        return tensors.Assembly(pb.TensorHeader(dtype=pb.DTYPE_UINT8, shape=[length], compression=ZSTD))

    def test_a_bomb_is_refused_before_it_is_unpacked(self):
        bomb = zstandard.ZstdCompressor().compress(b"\0" * (64 << 20))

        with pytest.raises(GraphError, match="too large"):
            self.assembly(1000).add(bomb)

    def test_a_chunk_of_more_than_4_mib_is_refused_even_if_the_tensor_has_room(self):
        chunk = zstandard.ZstdCompressor().compress(b"\0" * ((4 << 20) + 1))

        with pytest.raises(GraphError, match="too large"):
            self.assembly(64 << 20).add(chunk)

    def test_a_chunk_of_4_mib_is_taken(self):
        assembly = self.assembly(4 << 20)
        assembly.add(zstandard.ZstdCompressor().compress(b"\0" * (4 << 20)))

        assert assembly.complete

    def test_a_frame_that_hides_its_size_is_refused(self):
        packer = zstandard.ZstdCompressor(write_content_size=False).compressobj()
        frame = packer.compress(b"\0" * (1 << 20)) + packer.flush()

        with pytest.raises(GraphError, match="does not say its size"):
            self.assembly(1 << 20).add(frame)

    def test_a_frame_that_lies_about_its_size_is_refused(self):
        honest = bytearray(zstandard.ZstdCompressor(level=1).compress(b"ab" * 600))
        assert zstandard.frame_content_size(bytes(honest)) == 1200
        # A frame of 256 to 65791 bytes has its size, less 256, in the two bytes after magic number and descriptor.
        honest[5:7] = (100).to_bytes(2, "little")

        with pytest.raises(GraphError):
            self.assembly(2000).add(bytes(honest))

    @pytest.mark.parametrize(
        "chunk", [b"", b"\0", b"not zstd at all", zstandard.ZstdCompressor().compress(b"x" * 99)[:-5]]
    )
    def test_what_is_no_frame_is_refused(self, chunk):
        with pytest.raises(GraphError):
            self.assembly(99).add(chunk)

    @settings(deadline=None, max_examples=100)
    @given(st.binary(max_size=64))
    def test_random_bytes_are_refused_or_fit(self, chunk):
        assembly = self.assembly(16)
        try:
            assembly.add(chunk)
        except GraphError:
            return
        assert assembly.filled <= 16


@settings(deadline=None, max_examples=200)
@given(
    dtype=st.integers(-5, 20),
    shape=st.lists(st.one_of(st.integers(-1, 5), st.integers(-(2**63), 2**63 - 1)), max_size=5),
    data=st.binary(max_size=40),
)
def test_any_header_with_any_bytes_is_a_tensor_or_a_clear_error(dtype, shape, data):
    message = pb.Tensor(header=pb.TensorHeader(dtype=dtype, shape=shape), data=data)
    try:
        tensor = tensors.from_proto(message, limit=100)
    except (GraphError, LimitError):
        return
    assert tensor.nbytes == len(data)
