"""Memory that is used again: only when nobody has it any more."""

from __future__ import annotations

import gc

import pytest
import torch

from patchwire import recycling

LENGTH = recycling.FROM_BYTES // 4


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch) -> None:
    monkeypatch.setattr(recycling, "_FREE", recycling._Free())


def test_memory_is_used_again_when_its_tensor_is_gone():
    first = recycling.empty((LENGTH,), torch.float32)
    place = first.data_ptr()
    del first

    assert recycling.empty((2, LENGTH // 2), torch.int32).data_ptr() == place


def test_a_view_keeps_its_memory_from_others():
    first = recycling.copy(torch.ones(LENGTH))
    view = first[-1:]
    del first
    gc.collect()
    second = recycling.empty((LENGTH,), torch.float32)
    second.zero_()

    assert view.item() == 1


def test_two_tensors_at_a_time_have_memory_of_their_own():
    first, second = (recycling.copy(torch.full((LENGTH,), float(each))) for each in range(2))

    assert first.unique().tolist() == [0.0]
    assert second.unique().tolist() == [1.0]


def test_no_more_is_kept_than_may_be(monkeypatch):
    monkeypatch.setattr(recycling, "KEPT_BYTES", 2 * recycling.FROM_BYTES)
    several = [recycling.empty((LENGTH,), torch.float32) for _ in range(5)]
    del several

    assert len(recycling._FREE._pieces) == 2


def test_what_does_not_fit_makes_room_for_what_is_needed():
    small = recycling.empty((LENGTH,), torch.float32)
    del small
    large = recycling.empty((10 * LENGTH,), torch.float32)

    assert large.shape == (10 * LENGTH,)
    assert not recycling._FREE._pieces


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5), (2, LENGTH)], ids=str)
def test_a_copy_is_contiguous_and_equal(shape, dtype):
    tensor = torch.randn(shape).transpose(0, -1) if shape else torch.randn(shape)

    copy = recycling.copy(tensor, dtype)

    assert copy.is_contiguous()
    assert torch.equal(copy, tensor.to(dtype or tensor.dtype))
