"""Leaving a module out, ending a block early, and embeddings or masks in the place of tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchwire
import tiny
from conformance import places
from conformance.hooks import assert_same, forward, record
from conformance.test_several_prompts import PROMPTS, assert_rows
from integration.refusals import refused
from patchwire.errors import GraphError, InputError, OrderError, ShapeError, SiteError

IDS = tiny.prompt(8)


@pytest.fixture(params=tiny.CORE)
def name(request: pytest.FixtureRequest) -> str:
    """An architecture."""
    return str(request.param)


@pytest.fixture
def model(served: Any) -> patchwire.Model:
    """One of the models."""
    return served["gpt2"]  # type: ignore[no-any-return]


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A module that does something else for a while."""
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


# --- skip --------------------------------------------------------------------------------------------


def test_skipping_layers_is_replacing_their_forward(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    path = places.PARTS[name]["layer"]

    with model.trace(IDS):
        model.layers[0].skip(model.layers[0].input)
        model.layers[1].skip(model.layers[1].input * 2)
        logits = model.logits.save()

    first, second = (reference.get_submodule(path.format(index)) for index in (0, 1))
    with (
        replaced_forward(first, lambda hidden, *args, **kwargs: hidden),
        replaced_forward(second, lambda hidden, *args, **kwargs: hidden * 2),
    ):
        expected = forward(reference, IDS).logits
    assert_same(logits.value, expected)


def test_skipping_a_module_that_returns_a_tuple_takes_one(name: str, served: Any, references: Any) -> None:
    """None stands for an item that stays as it is."""
    model, reference = served[name], references[name]
    path = places.PARTS[name]["mixer"].format(1)
    module = reference.get_submodule(path)
    a_tuple = isinstance(record_output(reference, path), tuple)
    zeros = torch.zeros(1, len(IDS), tiny.WIDTH)

    with model.trace(IDS):
        model.module(path).skip((zeros, None) if a_tuple else zeros)
        logits = model.logits.save()
    with model.trace(IDS):
        model.layers[1].mixer.skip(zeros)
        named = model.logits.save()

    def nothing(hidden: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        return (zeros, None) if a_tuple else zeros

    with replaced_forward(module, nothing):
        expected = forward(reference, IDS).logits
    assert_same(logits.value, expected)
    assert torch.equal(logits.value, named.value)


def record_output(reference: Any, path: str) -> Any:
    found = []
    handle = reference.get_submodule(path).register_forward_hook(lambda module, args, output: found.append(output))
    forward(reference, IDS)
    handle.remove()
    return found[0]


def test_one_invoke_skips_and_the_others_do_not(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    with model.trace() as trace:
        with trace.invoke(PROMPTS[0]):
            model.layers[1].skip(model.layers[1].input)
            skipped = model.logits.save()
        with trace.invoke(PROMPTS[1]):
            inside = model.layers[1].mixer.output.save()
            plain = model.logits.save()
    assert trace.stats.passes == 1
    assert_same(plain.value, forward(reference, PROMPTS[1]).logits)
    assert inside.value.isfinite().all()
    layer = reference.get_submodule(places.PARTS[name]["layer"].format(1))
    with replaced_forward(layer, lambda hidden, *args, **kwargs: hidden):
        assert_same(skipped.value, forward(reference, PROMPTS[0]).logits)


def test_all_invokes_skip_in_the_invoke_for_all(served: Any, references: Any) -> None:
    model, reference = served["gpt2"], references["gpt2"]
    with model.trace() as trace:
        for prompt in PROMPTS:
            with trace.invoke(prompt):
                pass
        with trace.invoke():
            model.layers[1].skip(model.layers[1].input)
            logits = model.logits.save()
    with replaced_forward(reference.transformer.h[1], lambda hidden, *args, **kwargs: hidden):
        assert_rows(logits.value, [forward(reference, prompt).logits for prompt in PROMPTS], "logits")


def test_one_step_of_a_generation_skips(served: Any) -> None:
    model = served["gpt2"]
    with model.generate(IDS, max_new_tokens=3, min_new_tokens=3) as gen:
        for _ in gen.iter[1]:
            model.layers[1].skip(model.layers[1].input)
            after = model.layers[1].output.save()
            before = model.layers[1].input.save()
        for _ in gen.iter[2]:
            inside = model.layers[1].mlp.output.save()
    assert torch.equal(after.value, before.value)
    assert inside.value.isfinite().all()


def test_what_is_inside_cannot_be_read_after_it_was_skipped(model: Any) -> None:
    with refused(SiteError, r"mlp.*does not run.*is skipped", hint="trace of its own"), model.trace(IDS):
        model.layers[1].skip(model.layers[1].input)
        model.layers[1].mlp.output.save()  # this line


def test_what_was_read_inside_cannot_be_skipped(model: Any, references: Any) -> None:
    with refused(SiteError, r"mlp.*does not run.*is skipped", hint="trace of its own"), model.trace(IDS):
        model.layers[1].mlp.output.save()  # and this line
        model.layers[1].skip(model.layers[1].input)  # this line
    with model.trace(IDS):
        model.layers[1].mlp.output.save()
        with pytest.raises(SiteError):
            model.layers[1].skip(model.layers[1].input)
        logits = model.logits.save()
    assert_same(logits.value, forward(references["gpt2"], IDS).logits)  # nothing of it remains


def test_what_is_inside_cannot_be_read_whichever_invoke_skipped_it(model: Any) -> None:
    for first, second in ((True, False), (False, True)):
        with refused(SiteError, "skipped", line=False), model.trace() as trace:
            for prompt in PROMPTS:
                with trace.invoke(prompt):
                    if first:
                        model.layers[1].mlp.output.save()
                    model.logits.save()
            with trace.invoke():
                model.layers[1].skip(model.layers[1].input)
                if second:
                    model.layers[1].mlp.output.save()


def test_modules_beside_it_are_not_inside(model: Any) -> None:
    """`h.1` is not the beginning of `h.11` or of `h.1x`; the module's own sides are no part of it."""
    with model.trace(IDS):
        model.layers[1].skip(model.layers[1].input)
        values = [model.layers[1].input.save(), model.layers[1].output.save(), model.layers[2].mlp.output.save()]
    assert torch.equal(values[0].value, values[1].value)


def test_a_module_is_skipped_with_a_value_that_fits_and_exists(model: Any) -> None:
    with refused(ShapeError, r"\[1, 8, 24\]"), model.trace(IDS):
        model.layers[1].skip(torch.zeros(1, 8, 23))  # this line
    with refused(OrderError, r"layers\[2\]"), model.trace(IDS):
        late = model.layers[2].output  # and this line
        model.layers[1].skip(late)  # this line
    with refused(SiteError, "tuple", hint="items"), model.trace(IDS):
        model.transformer.h[1].attn.skip(torch.zeros(1, 8, 24))  # this line


# --- stop ----------------------------------------------------------------------------------------------


def test_nothing_below_stop_is_recorded_and_the_pass_ends(name: str, served: Any, references: Any) -> None:
    model = served[name]
    reached = []
    with model.trace(IDS) as trace:
        hidden = model.layers[0].output.save()
        trace.stop()
        reached.append(model.logits.save())
    assert not reached
    site = (places.PARTS[name]["layer"].format(0), "output", ())
    assert_same(hidden.value, record(references[name], IDS)[site])
    assert trace.stats.modules_skipped > 0


def test_stop_in_an_invoke_or_a_loop_over_steps_ends_the_trace(model: Any) -> None:
    with model.trace() as trace:
        with trace.invoke(PROMPTS[0]):
            first = model.layers[0].output.save()
            trace.stop()
        with trace.invoke(PROMPTS[1]):
            raise AssertionError
    assert first.shape[1] == len(PROMPTS[0])
    with model.generate(IDS, max_new_tokens=5) as gen:
        found = []
        for step in gen.all():
            found.append(model.logits.save())
            if step == 1:
                gen.stop()
    assert gen.stats.passes == 2
    assert len(found) == 2


def test_stop_in_a_session_ends_its_trace_only(model: Any) -> None:
    with model.session() as session:
        with model.trace(IDS) as trace:
            first = model.layers[0].output.save()
            trace.stop()
        with model.trace(IDS):
            second = model.layers[0].output.save()
    assert torch.equal(first.value, second.value)
    assert session.stats.passes == 1


def test_stop_outside_of_its_block_is_refused(model: Any) -> None:
    with model.trace(IDS) as trace:
        model.logits.save()
    with refused(GraphError, "only while the model runs"):
        trace.stop()  # this line


# --- embeddings and masks ------------------------------------------------------------------------------------


def with_embeddings(reference: Any, embeddings: Tensor) -> Tensor:
    with torch.no_grad():
        return reference(inputs_embeds=embeddings).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", [(6,), (1, 6), (3, 6)])
def test_embeddings_as_prompts_are_hugging_faces(
    name: str, shape: tuple[int, ...], served: Any, references: Any
) -> None:
    model, reference = served[name], references[name]
    embeddings = torch.randn(*shape, tiny.WIDTH, generator=torch.Generator().manual_seed(1))

    with model.trace({"inputs_embeds": embeddings}):
        logits = model.logits.save()
        seen = model.embed.output.save()

    batch = embeddings if len(shape) == 2 else embeddings[None]
    assert_same(logits.value, with_embeddings(reference, batch))
    assert torch.equal(seen.value, batch)


def test_embeddings_may_be_values_of_this_trace_or_an_earlier_one(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    known = reference.get_input_embeddings()(torch.tensor([IDS]))

    with model.session():
        with model.trace(IDS):
            embeddings = model.embed.output
        with model.trace({"inputs_embeds": embeddings.flip(1) * 0.5}):
            later = model.logits.save()
    with model.trace() as trace:
        with trace.invoke(IDS):
            here = model.embed.output
        with trace.invoke({"inputs_embeds": torch.cat([here, here[:, :2]], 1)}):
            longer = model.logits.save()
        with trace.invoke(IDS):
            plain = model.logits.save()

    assert_same(later.value, with_embeddings(reference, known.flip(1) * 0.5))
    assert_same(longer.value, with_embeddings(reference, torch.cat([known, known[:, :2]], 1)))
    assert_same(plain.value, forward(reference, IDS).logits)


def test_embeddings_go_on_in_a_generation(name: str, served: Any, references: Any) -> None:
    """The tokens that stand for them are 0; those that are made are Hugging Face's."""
    model, reference = served[name], references[name]
    embeddings = torch.randn(1, 6, tiny.WIDTH, generator=torch.Generator().manual_seed(2))

    with model.generate({"inputs_embeds": embeddings}, max_new_tokens=5, min_new_tokens=5) as gen:
        tokens = gen.output.save()

    expected = reference.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(1, 6, dtype=torch.long),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(tokens.value[:, 6:], expected)
    assert not tokens.value[:, :6].any()


def test_a_repetition_penalty_needs_tokens(model: Any) -> None:
    """Those that stand for embeddings would be punished."""
    with refused(InputError, "repetition_penalty", hint="token ids"):  # noqa: SIM117
        with model.generate({"inputs_embeds": torch.zeros(1, 6, 24)}, repetition_penalty=2.0):  # this line
            pass


@pytest.mark.parametrize(
    "given",
    [
        {"inputs_embeds": [[1.0]]},
        {"inputs_embeds": torch.zeros(24)},
        {"inputs_embeds": torch.zeros(1, 6, 24), "attention_mask": torch.ones(1, 6)},
        {"inputs_embeds": torch.zeros(1, 0, 24)},
    ],
)
def test_embeddings_of_another_form_are_refused(given: Any, model: Any) -> None:
    with refused(InputError), model.trace(given):  # this line
        pass


@pytest.mark.parametrize("embeddings", [torch.zeros(1, 6, 23), torch.zeros(1, 6, 24, dtype=torch.double)])
def test_embeddings_of_another_width_or_type_are_refused(embeddings: Tensor, model: Any) -> None:
    with refused(ShapeError, r"embed\.output"), model.trace({"inputs_embeds": embeddings}):  # this line
        pass


def test_an_invoke_that_was_refused_leaves_no_rows(model: Any) -> None:
    with model.trace() as trace:
        with trace.invoke(IDS):
            pass
        with pytest.raises(ShapeError), trace.invoke({"inputs_embeds": torch.zeros(1, 6, 23)}):
            pass
        with trace.invoke():
            logits = model.logits.save()
    assert logits.shape[0] == 1


def test_an_attention_mask_says_which_tokens_are_there(name: str, served: Any, references: Any) -> None:
    """On whichever side the padding is."""
    model, reference = served[name], references[name]
    short, long = tiny.prompt(5), tiny.prompt(8)
    left = {
        "input_ids": torch.tensor([[9, 9, 9, *short], long]),
        "attention_mask": torch.tensor([[0] * 3 + [1] * 5, [1] * 8]),
    }
    right = {"input_ids": [[*short, 9, 9, 9], long], "attention_mask": [[1] * 5 + [0] * 3, [1] * 8]}
    alone = [forward(reference, prompt).logits for prompt in (short, long)]

    for given in (left, right):
        with model.trace(given) as trace:
            logits = model.logits.save()
        assert_rows(logits.value, alone, "logits")
        assert trace.mask().tolist() == [[False] * 3 + [True] * 5, [True] * 8]
