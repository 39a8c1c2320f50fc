"""A model that computes in memory of its own: buffers that modules overwrite, and views of them that they hand on.

Whatever a graph does in the middle of a pass, the numbers are those of a plain forward pass.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import patchwire

IDS = [1, 2, 3, 4, 5]
WIDTH = 12


class Room(nn.Module):
    """Computes in a buffer, and returns a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("room", torch.zeros(64, WIDTH), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        count = hidden.shape[0] * hidden.shape[1]
        self.room[:count] = self.linear(hidden).flatten(0, 1)
        return self.room[:count].view_as(hidden)


class Remembering(nn.Module):
    """The model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.first = Room()
        self.second = Room()
        self.head = nn.Linear(WIDTH, 11)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor) -> SimpleNamespace | dict[str, Tensor]:
        first = self.first(self.embed(input_ids))
        second = self.second(first)
        return {"logits": self.head(first + second)}


@pytest.fixture(scope="module")
def reference() -> Remembering:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Remembering().eval().requires_grad_(False)


@pytest.fixture
def model(reference: Remembering) -> patchwire.Model:
    return patchwire.local(copy.deepcopy(reference), name="remembering", progress=False)


def logits_of(reference: Remembering) -> Tensor:
    logits: Tensor = reference(torch.tensor([IDS]))["logits"]
    return logits.clone()


@pytest.mark.parametrize("applied", ["head", "first", "second"])
def test_a_module_applied_in_a_pass_leaves_what_the_pass_remembers(model, reference, applied):
    with model.trace(IDS):
        hidden = model.first.output
        found = getattr(model, applied)(hidden).save()
        logits = model.logits.save()

    here = copy.deepcopy(reference)
    hidden = here.first(here.embed(torch.tensor([IDS]))).clone()
    torch.testing.assert_close(found.value, getattr(here, applied)(hidden))
    torch.testing.assert_close(logits.value, logits_of(here))


def test_a_module_applied_later_finds_the_model_as_it_was(model, reference):
    with model.session():
        with model.trace(IDS):
            hidden = model.first.output
            model.second.output.save()
        with model.trace(IDS):
            model.second(hidden).save()
            logits = model.logits.save()

    torch.testing.assert_close(logits.value, logits_of(copy.deepcopy(reference)))


def test_a_buffer_is_what_it_is_between_passes_wherever_it_is_used(model):
    with model.trace(IDS):
        early = (model.embed.output.sum() * 0 + model.second.room).save()
        late = (model.head.output.sum() * 0 + model.second.room).save()

    assert torch.equal(early.value, torch.zeros(64, WIDTH))
    assert torch.equal(late.value, torch.zeros(64, WIDTH))
