"""Copies of what is there already: they are left out, and what only looks like one is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import patchwire
import tiny
from conformance.hooks import Place, assert_same, changed_logits, record

A = [3, 14, 15, 9, 26, 5]
B = [3, 14, 35, 8, 9, 7]
"""Begins with two of A's tokens."""
BEGIN = 2
NAMES = ["gpt2", "llama", "mamba", "mamba2"]
LAYER = 1


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(served: Mapping[str, patchwire.Model], name: str) -> patchwire.Model:
    return served[name]


@pytest.fixture
def reference(references: Mapping[str, PreTrainedModel], name: str) -> PreTrainedModel:
    return references[name]


def place(reference: PreTrainedModel, layer: int) -> Place:
    """The output of a layer, where plain hooks see it."""
    path = next(path for path, module in reference.named_modules() if path.endswith(f".{layer}"))
    steps = next(steps for where, side, steps in record(reference, A) if (where, side) == (path, "output"))
    return path, "output", steps


def copying(source: Tensor, index: Any) -> Callable[[Tensor], Tensor]:
    def change(value: Tensor) -> Tensor:
        value[index] = source[index]
        return value

    return change


def test_a_sweep_has_the_numbers_of_hooks_and_computes_no_row_for_what_changes_nothing(
    model: patchwire.Model, reference: PreTrainedModel
) -> None:
    found = {}
    with model.trace() as trace:
        with trace.invoke(A):
            states = [layer.output for layer in model.layers]
        for layer, state in enumerate(states):
            for position in range(len(B)):
                with trace.invoke(B):
                    model.layers[layer].output[:, position] = state[:, position]
                    found[layer, position] = model.logits[:, -1].save()
    assert trace.stats is not None
    changing = model.num_layers * (len(B) - BEGIN)
    # The clean row, one for each cell that changes something, and those that share one row in each pass.
    assert trace.stats.rows <= 1 + changing + trace.stats.passes
    for (layer, position), logits in found.items():
        where = place(reference, layer)
        change = copying(record(reference, A)[where], (slice(None), position))
        assert_same(logits.value, changed_logits(reference, B, {where: change})[:, -1], (layer, position))


def rows_of(trace: patchwire.Trace) -> int:
    assert trace.stats is not None
    return trace.stats.rows


def test_what_is_copied_is_read_as_it_was_written(model: patchwire.Model, reference: PreTrainedModel) -> None:
    with model.trace() as trace:
        with trace.invoke(A):
            state = model.layers[LAYER].output
        with trace.invoke(B):
            model.layers[LAYER].output[:, :BEGIN] = state[:, :BEGIN]
            after = model.layers[LAYER].output.save()
    assert_same(after.value, record(reference, B)[place(reference, LAYER)])


def changed_before(model: patchwire.Model, trace: patchwire.Trace) -> Any:
    """The source has an edit of its own."""
    with trace.invoke(A):
        model.layers[0].output[:] *= 2
        state = model.layers[LAYER].output
    with trace.invoke(B):
        model.layers[LAYER].output[:, 0] = state[:, 0]
        return model.logits[:, -1].save()


def changed_there(model: patchwire.Model, trace: patchwire.Trace) -> Any:
    """The target has an edit before the copy, which undoes it."""
    with trace.invoke(A):
        state = model.layers[LAYER].output
    with trace.invoke(B):
        model.layers[0].output[:, 0, :3] = 1.0
        model.layers[LAYER].output[:, 0] = state[:, 0]
        return model.logits[:, -1].save()


def another_layer(model: patchwire.Model, trace: patchwire.Trace) -> Any:
    """The source is another layer."""
    with trace.invoke(A):
        state = model.layers[0].output
    with trace.invoke(B):
        model.layers[LAYER].output[:, 0] = state[:, 0]
        return model.logits[:, -1].save()


def another_position(model: patchwire.Model, trace: patchwire.Trace) -> Any:
    """The source is another position."""
    with trace.invoke(A):
        state = model.layers[LAYER].output
    with trace.invoke(B):
        model.layers[LAYER].output[:, 0] = state[:, 1]
        return model.logits[:, -1].save()


def one_too_many(model: patchwire.Model, trace: patchwire.Trace) -> Any:
    """One of the positions is one at which the prompts differ."""
    with trace.invoke(A):
        state = model.layers[LAYER].output
    with trace.invoke(B):
        model.layers[LAYER].output[:, : BEGIN + 1] = state[:, : BEGIN + 1]
        return model.logits[:, -1].save()


def from_the_end(model: patchwire.Model, trace: patchwire.Trace) -> Any:
    """A position from the end, of prompts of different lengths."""
    with trace.invoke(A[:BEGIN]):
        state = model.layers[LAYER].output
    with trace.invoke(B):
        model.layers[LAYER].output[:, -1] = state[:, -1]
        return model.logits[:, -1].save()


def not_as_it_is(model: patchwire.Model, trace: patchwire.Trace) -> Any:
    """What is copied is changed on the way."""
    with trace.invoke(A):
        state = model.layers[0].output.flip(-1)
    with trace.invoke(B):
        model.layers[0].output[:, 0] = state[:, 0]
        return model.logits[:, -1].save()


def added(model: patchwire.Model, trace: patchwire.Trace) -> Any:
    """It is added, not copied."""
    with trace.invoke(A):
        state = model.layers[0].output.flip(-1)
    with trace.invoke(B):
        model.layers[0].output[:, 0] += state[:, 0]
        return model.logits[:, -1].save()


def and_then_changed(model: patchwire.Model, trace: patchwire.Trace) -> Any:
    """It is copied, and changed afterwards."""
    with trace.invoke(A):
        state = model.layers[0].output
    with trace.invoke(B):
        model.layers[0].output[:, 0] = state[:, 0]
        model.layers[0].output[:, 0] *= 3
        model.layers[LAYER].output[:, 1] *= 2
        return model.logits[:, -1].save()


@pytest.mark.parametrize(
    "record_it",
    [
        changed_before,
        changed_there,
        another_layer,
        another_position,
        one_too_many,
        from_the_end,
        not_as_it_is,
        added,
        and_then_changed,
    ],
)
def test_what_only_looks_like_it_counts(model: patchwire.Model, record_it: Callable[..., Any]) -> None:
    with model.trace() as trace:
        found = record_it(model, trace)
    with model.trace(exact=True) as trace:
        exact = record_it(model, trace)
    with model.trace(B):
        plain = model.logits[:, -1].save()

    assert_same(found.value, exact.value)
    assert not torch.allclose(found.value, plain.value, rtol=1e-3, atol=1e-4)


def test_other_weights_make_other_states(model: patchwire.Model) -> None:
    with model.session():
        with model.trace(A):
            model.norm.weight = model.norm.weight * 2
            state = model.norm.output
        with model.trace(B):
            model.norm.output[:, :BEGIN] = state[:, :BEGIN]
            changed = model.logits[:, 0].save()
        with model.trace(B):
            plain = model.logits[:, 0].save()
    assert not torch.allclose(changed.value, plain.value, rtol=1e-3, atol=1e-4)


def test_a_gradient_flows_through_a_copy_that_changes_nothing(model: patchwire.Model) -> None:
    with model.trace() as trace:
        with trace.invoke(A):
            state = model.layers[0].output
        with trace.invoke(B):
            model.layers[0].output[:, 0] = state[:, 0]
            gradient = patchwire.grad(model.logits[0, -1, 7], state).save()
    assert gradient.value[:, 0].abs().max() > 0


def test_a_model_that_looks_ahead_has_other_states_from_the_first_token_on() -> None:
    config = tiny.CONFIGS["gemma3_text"]()
    config.use_bidirectional_attention, config.sliding_window = True, 64
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config).eval()
    for layer in range(config.num_hidden_layers):
        model, found = patchwire.local(module), {}
        for exact in (False, True):
            with model.trace(exact=exact) as trace:
                with trace.invoke(A):
                    state = model.layers[layer].output
                with trace.invoke(B):
                    model.layers[layer].output[:, :BEGIN] = state[:, :BEGIN]
                    found[exact] = model.logits.save()
        assert_same(found[False].value, found[True].value, layer)
