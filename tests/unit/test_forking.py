"""Forks: what a layer is given has the rows of now, or nobody goes on."""

from __future__ import annotations

import pytest
import torch

from integration.refusals import refused
from patchwire.errors import ExecutionError
from patchwire.sites import INPUT, Axis, Dim, Leaf
from patchwire_worker.forking import Fork

HIDDEN = Leaf("layer", INPUT, ("args", 0), (Dim(Axis.BATCH), Dim(Axis.SEQ), Dim(Axis.CONSTANT, 5)), torch.float32, (1,))
FLAT = Leaf("layer", INPUT, ("kwargs", "flat"), (Dim(Axis.BATCH_SEQ),), torch.float32, (1,))
SOURCES = {1: torch.tensor([0, 0, 0]), 2: torch.tensor([0, 1, 0])}
FORK = Fork(INPUT, {HIDDEN.path: HIDDEN, FLAT.path: FLAT}, 3, SOURCES.get, 4)


def test_rows_are_copied_from_whatever_number_there_was():
    hidden, flat = torch.randn(2, 4, 5), torch.arange(4.0)
    (found,), rest = FORK(((hidden,), {"flat": flat, "other": None}))

    assert torch.equal(found, hidden[[0, 1, 0]])
    assert torch.equal(rest["flat"], flat.repeat(3))
    assert rest["other"] is None


def test_what_has_all_rows_stays():
    hidden = torch.randn(3, 4, 5)
    (found,), _ = FORK(((hidden,), {}))
    assert found is hidden


@pytest.mark.parametrize("unexpected", [{"mask": torch.ones(1, 4)}, {"flat": torch.ones(20)}])
def test_what_nobody_has_seen_before_is_refused(unexpected):
    with refused(ExecutionError, "hands something to its layers", hint="exact=True", line=False):
        FORK(((torch.randn(2, 4, 5),), unexpected))
