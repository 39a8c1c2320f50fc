"""Rows of one input run once until their interventions differ, and nobody can tell from the numbers.

What each invoke gets is compared with plain hooks on the model in a run of its own (test_architectures.py does so for
a write at every site of every architecture, many of one prompt); how much was computed, with a hook that counts rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patchwire
import tiny
from conformance.hooks import assert_same, changed_logits, forward, record
from patchwire.sites import OUTPUT

A, B = tiny.prompt(7), tiny.prompt(7, seed=1)
DEFAULT = (*tiny.CORE, "gemma2", "qwen2_moe", "falcon_h1", "zamba2", "recurrent_gemma")
FAMILIES = [
    pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.slow])
    for name in tiny.CONFIGS
    if name not in ("odd", "bloom")
]
NOT_FORKED = {"bloom": "its alibi has a row for each head of each row"}


class Counted:
    """A model, its proxy, and how many rows each layer got."""

    def __init__(self, name: str) -> None:
        self.reference: Any = tiny.build(name).requires_grad_(False)
        self.served: Any = tiny.build(name).requires_grad_(False)
        self.model = patchwire.local(self.served, progress=False)
        self.rows: dict[int, list[int]] = {}
        for index in range(self.model.num_layers):
            layer = self.served.get_submodule(self.model.catalogue.layers[index])
            layer.register_forward_pre_hook(self._count(index), with_kwargs=True)

    def _count(self, index: int) -> Any:
        def count(module: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.rows.setdefault(index, []).append(hidden.shape[0])

        return count

    def counts(self) -> list[int]:
        """The rows of each layer since the last time."""
        found = [sum(self.rows.get(index, [])) for index in range(self.model.num_layers)]
        self.rows.clear()
        return found

    def place(self, index: int) -> Any:
        """Where a layer's output is, for plain hooks."""
        path = self.model.catalogue.layers[index]
        return path, OUTPUT, self.model.catalogue.modules[path].side(OUTPUT)[0].path


@pytest.fixture(scope="module", params=FAMILIES)
def counted(request: pytest.FixtureRequest) -> Counted:
    return Counted(request.param)


def test_a_sweep_over_layers_computes_each_layer_for_those_alone_that_differ(counted: Counted) -> None:
    model, layers = counted.model, counted.model.num_layers
    counted.counts()
    found = []
    with model.trace() as trace:
        with trace.invoke(A):
            clean = [layer.output for layer in model.layers]
        for layer, state in zip(model.layers, clean, strict=True):
            with trace.invoke(B):
                before = model.layers[0].input.save()
                layer.output[:, 2] = state[:, 2]
                found.append((before, model.logits.save()))
    assert trace.stats.passes == 1
    assert counted.counts() == [1 + layer + 1 for layer in range(layers)]

    seen = record(counted.reference, A)
    for index, (before, logits) in enumerate(found):

        def patched(value: torch.Tensor, index: int = index) -> torch.Tensor:
            value[:, 2] = seen[counted.place(index)][:, 2]
            return value

        assert_same(logits.value, changed_logits(counted.reference, B, {counted.place(index): patched}), index)
        assert_same(before.value, found[0][0].value)


def test_what_is_never_changed_is_computed_once(counted: Counted) -> None:
    model = counted.model
    counted.counts()
    with model.trace() as trace:
        found = []
        for prompt in (A, B, A, A, B):
            with trace.invoke(prompt):
                found.append(model.logits.save())
    assert counted.counts() == [2] * model.num_layers

    for prompt, logits in zip((A, B, A, A, B), found, strict=True):
        assert_same(logits.value, forward(counted.reference, prompt).logits)


def test_invokes_of_several_rows_fork_as_a_whole(counted: Counted) -> None:
    model, last = counted.model, counted.model.num_layers - 1
    counted.counts()
    with model.trace() as trace:
        with trace.invoke([A, B]):
            plain = model.logits.save()
        with trace.invoke([A, B]):
            model.layers[last].output[0] = 0
            first = model.logits.save()
    assert counted.counts() == [2] * (last + 1), "only what comes after the last layer is computed for four rows"

    assert_same(first.value[1], plain.value[1])
    assert_same(plain.value[:1], forward(counted.reference, A).logits)

    def erased(value: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(value)

    assert_same(first.value[:1], changed_logits(counted.reference, A, {counted.place(last): erased}))


def test_cuts_of_attention_fork_too(counted: Counted) -> None:
    model = counted.model
    layers = [index for index in range(model.num_layers) if model.catalogue.named(f"layers.{index}.attn.scores")]
    if not layers:
        pytest.skip("there are no scores")
    found: dict[bool, list[Any]] = {}
    for exact in (False, True):
        with model.trace(exact=exact) as trace:
            for index in layers:
                with trace.invoke(B):
                    model.layers[index].attn.scores[:, :, 4:, :2] = torch.finfo(torch.float32).min
                    found.setdefault(exact, []).append(model.logits.save())
        assert trace.stats.passes == (len(layers) if exact else 1)

    for shared, alone in zip(found[False], found[True], strict=True):
        assert_same(shared.value, alone.value)
        assert not torch.equal(alone.value, forward(counted.reference, B).logits)


def test_prompts_of_other_lengths_come_along() -> None:
    counted = Counted("llama")
    model, short = counted.model, A[:4]
    with model.trace() as trace:
        found = []
        for prompt in (short, B, short, B):
            with trace.invoke(prompt):
                model.layers[len(found) // 2].output[:, -1] = 0
                found.append(model.logits.save())

    def erased(value: torch.Tensor) -> torch.Tensor:
        value[:, -1] = 0
        return value

    for index, (prompt, logits) in enumerate(zip((short, B, short, B), found, strict=True)):
        assert_same(logits.value, changed_logits(counted.reference, prompt, {counted.place(index // 2): erased}), index)


def test_a_change_before_the_layers_has_rows_of_its_own_from_the_beginning() -> None:
    counted = Counted("gpt2")
    model = counted.model
    counted.counts()
    with model.trace() as trace:
        with trace.invoke(A):
            model.embed.output[:, 1] = 0
            changed = model.logits.save()
        with trace.invoke(A):
            plain = model.logits.save()
    assert counted.counts() == [2] * model.num_layers

    assert_same(plain.value, forward(counted.reference, A).logits)
    assert not torch.equal(changed.value, plain.value)


def test_gradients_have_rows_of_their_own() -> None:
    counted = Counted("gpt2")
    model = counted.model
    found = []
    with model.trace() as trace:
        for layer in (1, 2):
            with trace.invoke(A):
                state = model.layers[layer].output
                found.append(patchwire.grad(model.logits[0, -1, 3], state).save())

    for layer, gradient in zip((1, 2), found, strict=True):
        with model.trace(A):
            state = model.layers[layer].output
            alone = patchwire.grad(model.logits[0, -1, 3], state).save()
        assert_same(gradient.value, alone.value)


def test_exact_invokes_and_traces_run_in_passes_of_their_own() -> None:
    counted = Counted("gpt2")
    model = counted.model
    counted.counts()
    found = []
    with model.trace(exact=True) as trace:
        for _ in range(3):
            with trace.invoke(A):
                found.append(model.logits.save())
    with model.session(exact=True) as session:
        for _ in range(2):
            with model.trace(A):
                found.append(model.logits.save())
    assert (trace.stats.passes, session.stats.passes) == (3, 2)
    assert counted.counts() == [5] * model.num_layers

    for logits in found:
        assert torch.equal(logits.value, forward(counted.reference, A).logits)


@pytest.fixture(scope="module")
def llama() -> Counted:
    return Counted("llama")


class TestASession:
    def test_has_its_independent_traces_in_one_pass(self, llama: Counted) -> None:
        model = llama.model
        llama.counts()
        found = []
        with model.session() as session:
            for prompt in (A, B, A):
                with model.trace(prompt):
                    found.append(model.logits.save())
        assert (session.stats.passes, session.stats.rows) == (1, 2)
        assert llama.counts() == [2] * model.num_layers

        for prompt, logits in zip((A, B, A), found, strict=True):
            assert_same(logits.value, forward(llama.reference, prompt).logits)

    def test_has_passes_of_their_own_for_what_comes_too_late(self, llama: Counted) -> None:
        model = llama.model
        with model.session() as session:
            with model.trace(A):
                late = model.layers[2].output[:, -1]
            with model.trace(B):
                model.layers[0].output[:, -1] = late
                logits = model.logits.save()
        assert session.stats.passes == 2

        seen = record(llama.reference, A)[llama.place(2)]

        def patched(value: torch.Tensor) -> torch.Tensor:
            value[:, -1] = seen[:, -1]
            return value

        assert_same(logits.value, changed_logits(llama.reference, B, {llama.place(0): patched}))

    @pytest.mark.parametrize(
        ("prompts", "passes"),
        [((tiny.prompt(60), A[:1]), 2), ((A, A[:1]), 1)],
        ids=["much padding", "little padding"],
    )
    def test_is_not_padded_much(self, llama: Counted, prompts: tuple[list[int], ...], passes: int) -> None:
        model = llama.model
        found = []
        with model.session() as session:
            for prompt in prompts:
                with model.trace(prompt):
                    found.append(model.logits.save())
        assert session.stats.passes == passes

        for prompt, logits in zip(prompts, found, strict=True):
            assert_same(logits.value, forward(llama.reference, prompt).logits)

    def test_does_not_compute_what_one_trace_needs_for_another_that_has_ended(self, llama: Counted) -> None:
        model = llama.model
        llama.counts()
        with model.session() as session:
            for _ in range(3):
                with model.trace(A):
                    model.embed.output.save()
            with model.trace(B):
                model.logits.save()
        assert session.stats.passes == 2
        assert llama.counts() == [1] * model.num_layers

    def test_keeps_weights_and_gradients_apart(self, llama: Counted) -> None:
        model = llama.model
        with model.session() as session:
            with model.trace(A):
                plain = model.logits.save()
            with model.trace(A):
                model.layers[0].mlp.down_proj.weight[:] = 0
                changed = model.logits.save()
            with model.trace(A):
                again = model.logits.save()
        assert session.stats.passes == 3
        assert torch.equal(plain.value, again.value)
        assert not torch.equal(plain.value, changed.value)


@pytest.mark.parametrize("name", NOT_FORKED)
def test_where_rows_cannot_fork_each_has_its_own(name: str) -> None:
    counted = Counted(name)
    model = counted.model
    counted.counts()
    with model.trace() as trace:
        with trace.invoke(A):
            plain = model.logits.save()
        with trace.invoke(A):
            model.layers[1].output[:] = 0
            model.logits.save()
    assert counted.counts() == [2] * model.num_layers
    assert_same(plain.value, forward(counted.reference, A).logits)
