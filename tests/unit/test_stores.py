"""The stores of tensors: what they hold is bounded, however small each tensor is, and finding one takes no time."""

from __future__ import annotations

import time

import pytest
import torch

from patchwire.errors import GraphError, LimitError, MissingTensorsError
from patchwire_worker.kept import KeptStore
from patchwire_worker.store import TensorStore


class Clock:
    """Tells the time that a test says it is."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def test_uploaded_tensors_without_bytes_do_not_stay_for_ever():
    store = TensorStore(limit=100_000)
    names = [store.put(torch.empty(0, length)) for length in range(1_000)]

    with pytest.raises(MissingTensorsError):
        store.get(names[:1])
    assert store.get(names[-1:])[0].shape == (0, 999)


def test_kept_values_go_when_their_time_is_over_whatever_the_order(clock):
    store = KeptStore(limit=100_000)
    handles = {seconds: store.put(torch.full((2,), float(seconds)), seconds) for seconds in (5, 1, 9, 3)}

    for now in (0, 1, 4, 6):
        clock.now = now
        for seconds, handle in handles.items():
            if seconds > now:
                assert store.get(handle)[0] == seconds
            else:
                with pytest.raises(GraphError):
                    store.get(handle)


def test_what_goes_makes_room_once(clock):
    value = torch.zeros(100)
    store = KeptStore(limit=3 * (value.nbytes + 1024))

    def fill(seconds: float) -> list[bytes]:
        handles = [store.put(value, seconds) for _ in range(3)]
        with pytest.raises(LimitError):
            store.put(value, seconds)
        return handles

    handles = fill(10)
    assert store.forget([*handles, *handles, b"another"]) == 3
    clock.now = 11  # they would have gone now
    fill(10)
    clock.now = 22
    fill(10)


def test_what_is_forgotten_is_forgotten_entirely(clock):
    store = KeptStore(limit=100_000)
    kept = store.put(torch.ones(1), 1000)

    def held() -> int:
        return sum(len(each) for each in vars(store).values() if hasattr(each, "__len__"))

    before = held()
    for _ in range(1_000):
        store.forget([store.put(torch.ones(1), 1000)])

    assert held() <= before + 2
    assert store.get(kept) == 1


def test_many_kept_values_are_found_as_fast_as_few(clock):
    store = KeptStore(limit=1 << 30)
    looked_at = 0

    class Entries(dict):
        def items(self):
            nonlocal looked_at
            looked_at += len(self)
            return super().items()

        def values(self):
            nonlocal looked_at
            looked_at += len(self)
            return super().values()

    store._entries = Entries()
    handles = [store.put(torch.zeros(1), 1000) for _ in range(1_000)]
    for handle in handles:
        store.get(handle)

    assert looked_at <= len(handles)
