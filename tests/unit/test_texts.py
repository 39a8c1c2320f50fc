"""Texts: an operation is found by what it does, among those that a module's own attributes let run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patchwire_worker.models import texts


class Branching(nn.Module):
    """Has branches of every kind that forwards of transformers have."""

    def __init__(self, *, parallel: bool = False, attention: str = "sdpa", upcast: bool = False) -> None:
        super().__init__()
        self.parallel = parallel
        self.upcast = upcast
        self.norm = nn.Identity()
        self.config = SimpleNamespace(_attn_implementation=attention)

    def forward(self, hidden: Tensor, output_attentions: bool = False, bias: Any = None) -> Tensor:
        eagerly = self.config._attn_implementation == "eager"
        if self.config._attn_implementation == "sdpa" and not output_attentions:
            mixed = torch.sigmoid(hidden)
        else:
            mixed = torch.softmax(hidden, -1)
        if eagerly and self.upcast:
            mixed = torch.exp(mixed)
        if bias is None:
            mixed = torch.tanh(mixed)
        if self.parallel:
            return hidden + mixed + self.norm(hidden)
        middle = hidden + mixed
        return middle + self.norm(middle)


def found(module: nn.Module, token: str, *, eager: bool = False) -> str:
    return texts.find(type(module).forward, token, module, eager=eager)


def test_what_a_norm_is_given_is_found_where_the_model_comes_by() -> None:
    assert found(Branching(), "@norm") == "middle_0"
    with pytest.raises(LookupError, match="not assigned before"):
        found(Branching(parallel=True), "@norm")


def test_what_only_the_caller_decides_is_not_ruled_out() -> None:
    assert found(Branching(), "softmax()") == "torch_softmax_0"
    assert found(Branching(), "tanh()") == "torch_tanh_0"


def test_an_operation_that_runs_only_step_by_step_needs_steps() -> None:
    module = Branching(upcast=True)

    assert texts.only_eager(module) == {"torch_softmax_0", "mixed_1", "torch_exp_0", "mixed_2"}
    assert texts.needs_steps(module, ["torch_softmax_0"])
    assert not texts.needs_steps(module, ["torch_sigmoid_0"])
    assert not texts.needs_steps(module, ["torch_tanh_0"])
    assert not texts.needs_steps(module, [])


def test_a_variable_that_is_assigned_once_is_followed() -> None:
    module = Branching(upcast=True)

    with pytest.raises(LookupError):
        found(module, "exp()")
    assert found(module, "exp()", eager=True) == "torch_exp_0"
    with pytest.raises(LookupError):
        found(Branching(), "exp()", eager=True)


def test_a_model_that_goes_step_by_step_anyway_needs_nothing() -> None:
    module = Branching(attention="eager", upcast=True)

    assert texts.only_eager(module) == frozenset()
    assert not texts.needs_steps(module, ["torch_softmax_0"])
    assert texts.choosing_attention(module) == []
    assert texts.choosing_attention(Branching()) == [""]


def test_inside_the_interface_needs_steps_but_its_arguments_do_not() -> None:
    assert texts.needs_steps(nn.Identity(), ["attention_interface_1", "softmax_0"])
    assert not texts.needs_steps(nn.Identity(), ["attention_interface_1"])
