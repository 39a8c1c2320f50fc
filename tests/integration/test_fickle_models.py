"""A model that behaves otherwise in a run than where it was learnt: the line that relied on it is named."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import patchwire
from integration.refusals import refused
from patchwire_worker.models import operations

SHORT = 7
"""Up to so many tokens, which is what some of the prompts have with which it is learnt, it leaves something out."""
LONG = 40
"""From so many tokens on the model is another one."""
LONGEST = 60
"""So many tokens it does not survive."""


class Longer(nn.Module):
    """Returns one token more than it is given, of long prompts."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([hidden, hidden[:, :1]], 1) if hidden.shape[1] >= LONG else hidden


def doubled(hidden: Tensor) -> Tensor:
    return hidden * 2


class Fickle(nn.Module):
    """Not causal, without a list of layers, and with a module that long prompts do not come by."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.longer = Longer()
        self.sometimes = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor) -> SimpleNamespace | dict[str, Tensor]:
        hidden = self.embed(input_ids)
        if hidden.shape[1] == LONGEST:
            sys.exit("whoever wrote this model did not think of servers")
        if hidden.shape[1] > SHORT:
            hidden = doubled(hidden)
        hidden = self.longer(hidden)[:, : hidden.shape[1]]
        if hidden.shape[1] < LONG:
            hidden = self.sometimes(hidden)
        return {"logits": self.head(hidden + hidden.mean(1, keepdim=True))}


@pytest.fixture(scope="module")
def model() -> patchwire.Model:
    return patchwire.local(Fickle(), name="fickle", progress=False)


def test_a_tensor_of_another_shape_than_was_learnt(model):
    with refused(patchwire.ExecutionError, r"in this run, where \[1, 40, 6\] was expected"), model.trace([1] * LONG):
        model.longer.output.save()  # this line


def test_a_module_that_the_run_does_not_come_by(model):
    with refused(patchwire.SiteError, "`model.sometimes.output` was never reached"), model.trace([1] * LONG):
        model.sometimes.output.save()  # this line


def test_prompts_of_different_lengths_where_padding_would_be_seen(model):
    with refused(patchwire.InputError, "is not causal", hint="one length", line=False), model.trace([[1, 2], [3]]):
        model.embed.output.save()


def test_embeddings_as_a_prompt_where_nobody_knows_what_embeds(model):
    with refused(patchwire.InputError, "embeds its tokens is not known", hint="token ids"):
        model.trace({"inputs_embeds": torch.zeros(3, 6)}).__enter__()  # this line


def test_a_function_that_is_too_long_to_look_into(model, monkeypatch):
    monkeypatch.setattr(operations, "_MAX_OPERATIONS", 1)
    with refused(patchwire.LimitError, "too long to look into", hint="a module in it", line=False):
        print(model.source)


def test_what_is_inside_a_function_that_not_every_run_calls(model):
    with (
        refused(patchwire.SiteError, "`doubled_0` was not called", hint="given and what it returns"),
        model.trace([1] * 9),
    ):
        model.source.doubled_0.source.save()  # this line


def test_a_run_that_ends_as_no_run_should_is_a_job_that_failed_and_the_next_one_runs(model, caplog):
    with model.trace([1] * LONGEST, blocking=False) as trace:
        model.logits.save()

    assert trace.job.wait() == "failed"
    with refused(patchwire.ExecutionError, r"internal error \(SystemExit\)", hint="Whoever runs", line=False):
        trace.job.fetch()
    assert "whoever wrote this model" in caplog.text
    with model.trace([1] * 3):
        hidden = model.embed.output.save()
    assert hidden.shape == (1, 3, 6)
