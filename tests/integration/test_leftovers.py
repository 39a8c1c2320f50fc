"""What a trace has computed goes when it is over: neither with the request, nor when Python collects its garbage."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchwire

TRACES = 5


class Memory:
    """Stands for what a call has computed."""


class Double(torch.autograd.Function):
    """`2 * value`, which remembers something of its own."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, memory: Memory) -> Tensor:
        ctx.memory = memory
        return value * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * 2, None


class Watched(nn.Module):
    """Counts of how many earlier calls something is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.remembered: list[weakref.ref[Any]] = []
        self.alive: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.alive.append(sum(each() is not None for each in self.remembered))
        memory = Memory()
        self.remembered.append(weakref.ref(memory))
        if torch.is_grad_enabled():
            return Double.apply(hidden, memory)  # type: ignore[no-untyped-call, no-any-return]
        result = hidden * 2
        result.memory = memory  # type: ignore[attr-defined]
        return result


class Watching(nn.Module):
    """A model with a place before and a place after what is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.watched = Watched()
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.middle(self.watched(self.embed(input_ids))))}


@pytest.fixture
def module() -> Watching:
    return Watching().eval().requires_grad_(False)


@pytest.fixture
def model(module: Watching) -> Iterator[patchwire.Model]:
    """A model that has been learnt already; nobody collects garbage meanwhile."""
    model = patchwire.local(module, name="watching", progress=False)
    module.watched.remembered.clear()
    module.watched.alive.clear()
    gc.disable()
    yield model
    gc.enable()


def test_the_way_back_through_a_trace_is_forgotten_before_the_next(model, module):
    found = []
    with model.session():
        for token in range(TRACES):
            with model.trace([token, 2, 3]):
                early, late = model.embed.output, model.middle.output
                found.append([each.save() for each in patchwire.grad(model.logits[0, -1, token], [early, late])])

    assert module.watched.alive == [0] * TRACES
    for token, (_, late) in enumerate(found):
        assert torch.equal(late.value[0, -1], module.head.weight[token])


def test_a_pass_that_ends_early_leaves_nothing_behind(model, module):
    with model.session(exact=True):
        for _ in range(TRACES):
            with model.trace([1, 2, 3]):
                model.middle.input.sum().save()

    assert module.watched.alive == [0] * TRACES


def site(model: patchwire.Model) -> patchwire.Value:
    with model.trace([1, 2, 3]):
        return model.middle.output.save()


def edited(model: patchwire.Model) -> patchwire.Value:
    with model.trace([1, 2, 3]):
        model.middle.output[:, 0] = 0
        return model.middle.output.save()


def weight(model: patchwire.Model) -> patchwire.Value:
    with model.trace([1, 2, 3]):
        return model.middle.weight.save()


def changed_weight(model: patchwire.Model) -> patchwire.Value:
    with model.trace([1, 2, 3]):
        model.middle.weight[0] = 0
        return model.middle.weight.save()


def gradient(model: patchwire.Model) -> patchwire.Value:
    with model.trace([1, 2, 3]):
        early = model.embed.output
        model.logits.sum().backward()
        return early.grad.save()


def everyone(model: patchwire.Model) -> patchwire.Value:
    with model.trace() as trace:
        for token in (1, 2):
            with trace.invoke([token]):
                pass
        with trace.invoke():
            return model.logits.save()


def in_a_session(model: patchwire.Model) -> patchwire.Value:
    with model.session(), model.trace([1, 2, 3]):
        return model.logits.save()


@pytest.mark.parametrize("saved", [site, edited, weight, changed_weight, gradient, everyone, in_a_session])
def test_a_saved_tensor_goes_when_the_program_lets_go_of_it(model, saved):
    value = saved(model)
    tensor = weakref.ref(value.value)
    del value

    assert tensor() is None
