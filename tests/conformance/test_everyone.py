"""The invoke without a prompt: all rows of a trace at once, those of one invoke after those of the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import patchwire
import tiny
from conformance import places
from conformance.hooks import Place, assert_same, changed_logits, forward, record
from conformance.test_several_prompts import PROMPTS, assert_rows, floats_with_rows
from integration.refusals import refused
from patchwire.errors import GraphError, ShapeError, SiteError
from patchwire.sites import Axis

GROUPS = [[tiny.prompt(7)], [tiny.prompt(3), tiny.prompt(9)], [tiny.prompt(7, seed=1), tiny.prompt(7, seed=2)]]
ROWS = [row for group in GROUPS for row in group]


@pytest.fixture(params=tiny.CORE)
def name(request: pytest.FixtureRequest) -> str:
    """An architecture."""
    return str(request.param)


def layer(name: str, index: int = 1) -> Place:
    return (places.PARTS[name]["layer"].format(index), "output", ())


def together(model: patchwire.Model) -> list[Place]:
    """The sites whose rows can be put together."""
    return [
        place
        for place in floats_with_rows(model)
        if Axis.BATCH in {dim.axis for dim in places.leaf_of(model, place).shape}
    ]


def test_every_site_is_read_for_all_rows_which_end_together(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    alone = [record(reference, row) for row in ROWS]

    with model.trace() as trace:
        for group in GROUPS:
            with trace.invoke(group):
                pass
        with trace.invoke():
            found = {place: places.read(model, place).save() for place in together(model)}

    assert len(found) > 20
    assert trace.stats.passes == 1
    for place, value in found.items():
        assert_rows(value.value, [each[place] for each in alone], place)


def test_it_is_what_a_list_of_the_same_prompts_is(name: str, served: Any) -> None:
    model = served[name]
    with model.trace() as trace:
        for prompt in PROMPTS:
            with trace.invoke(prompt):
                pass
        with trace.invoke():
            one = model.layers[1].output.save()
    with model.trace(PROMPTS):
        two = model.layers[1].output.save()
    assert torch.equal(one.value.nan_to_num(7.0), two.value.nan_to_num(7.0))


def test_edits_of_all_rows_are_edits_of_each(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    found = []

    with model.trace() as trace:
        for group in GROUPS:
            with trace.invoke(group):
                found.append(model.logits.save())
        with trace.invoke():
            hidden = model.layers[1].output
            hidden[:, -1] = 0.5
            hidden[:, -2] *= 2
            hidden += 0.25
            model.layers[0].mixer.output[:] *= -1
            logits = model.logits.save()

    def change(value: Tensor) -> Tensor:
        value[:, -1] = 0.5
        value[:, -2] *= 2
        return value + 0.25

    mixer = next(
        place
        for place in record(reference, PROMPTS[0])
        if place[:2] == (places.PARTS[name]["mixer"].format(0), "output")
    )
    changes = {layer(name): change, mixer: lambda value: -value}
    expected = [changed_logits(reference, row, changes) for row in ROWS]
    start = 0
    for group, value in zip(GROUPS, found, strict=True):
        assert_rows(value.value, expected[start : start + len(group)], "of an invoke")
        start += len(group)
    assert_rows(logits.value, expected, "of all")


def test_assigning_replaces_the_value_of_every_row(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    prompts = [tiny.prompt(5), tiny.prompt(8)]

    with model.trace() as trace:
        for prompt in prompts:
            with trace.invoke(prompt):
                pass
        with trace.invoke():
            model.layers[1].output = model.layers[1].output * 2 - 1
            logits = model.logits.save()

    changes = {layer(name): lambda value: value * 2 - 1}
    assert_rows(logits.value, [changed_logits(reference, prompt, changes) for prompt in prompts], "logits")


def test_edits_within_invokes_come_before_edits_of_all(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    found = []

    with model.trace() as trace:
        for index, prompt in enumerate(PROMPTS):
            with trace.invoke(prompt):
                model.layers[1].output[:, -1] += index
                found.append(model.logits.save())
        with trace.invoke():
            hidden = model.layers[1].output
            seen = hidden.clone().save()
            hidden *= 2

    def change(index: int, scale: float) -> Any:
        def apply(value: Tensor) -> Tensor:
            value[:, -1] += index
            return value * scale

        return apply

    for index, (prompt, logits) in enumerate(zip(PROMPTS, found, strict=True)):
        assert_same(logits.value, changed_logits(reference, prompt, {layer(name): change(index, 2)}), index)
    wanted = [
        record(reference, each, {layer(name): change(index, 1)})[layer(name)] for index, each in enumerate(PROMPTS)
    ]
    assert_rows(seen.value, wanted, "what the invokes made of it")


def test_rows_exchange_their_values(name: str, served: Any, references: Any) -> None:
    """Each row takes the last token of the one before it."""
    model, reference = served[name], references[name]

    with model.trace() as trace:
        for prompt in PROMPTS:
            with trace.invoke(prompt):
                pass
        with trace.invoke():
            hidden = model.layers[1].output
            hidden[:, -1] = hidden[:, -1].roll(1, 0)
            logits = model.logits.save()

    last = [record(reference, prompt)[layer(name)][:, -1] for prompt in PROMPTS]

    def change(given: Tensor) -> Any:
        def apply(value: Tensor) -> Tensor:
            value[:, -1] = given
            return value

        return apply

    expected = [
        changed_logits(reference, prompt, {layer(name): change(last[index - 1])})
        for index, prompt in enumerate(PROMPTS)
    ]
    assert_rows(logits.value, expected, "logits")


def test_a_later_read_of_the_same_site_sees_the_edit(name: str, served: Any) -> None:
    model = served[name]
    with model.trace() as trace:
        for prompt in PROMPTS[:2]:
            with trace.invoke(prompt):
                model.layers[0].output[:] = 3.0
        with trace.invoke():
            model.layers[0].output[:, -1] = 4.0
            first = model.layers[0].output
        with trace.invoke():
            model.layers[0].output[0] = 5.0
            second = model.layers[0].output.clone().save()
            first = first.clone().save()
    assert torch.equal(first.value, second.value)
    assert (second[0, -6:] == 5).all()
    assert (second[1, -1] == 4).all()
    assert (second[1, :-1] == 3).all()


def test_items_of_tuples_have_all_rows_too(served: Any, references: Any) -> None:
    model, reference = served["gpt2"], references["gpt2"]
    site = ("transformer.h.1.attn", "output", (0,))
    with model.trace() as trace:
        for prompt in PROMPTS:
            with trace.invoke(prompt):
                pass
        with trace.invoke():
            attention = model.transformer.h[1].attn.output[0]
            attention[..., ::2] *= 0.5
            model.transformer.h[2].attn.output[0] = model.transformer.h[2].attn.output[0] * 2
            value, logits = attention.save(), model.logits.save()

    def half(value: Tensor) -> Tensor:
        value[..., ::2] *= 0.5
        return value

    changes = {site: half, ("transformer.h.2.attn", "output", (0,)): lambda value: value * 2}
    assert_rows(value.value, [record(reference, prompt, changes)[site] for prompt in PROMPTS], "attention")
    assert_rows(logits.value, [changed_logits(reference, prompt, changes) for prompt in PROMPTS], "logits")


def test_values_of_all_rows_have_gradients(name: str, served: Any) -> None:
    """The same as those of a list of the prompts; where there is no token there is none."""
    model = served[name]
    with model.trace() as trace:
        for prompt in PROMPTS:
            with trace.invoke(prompt):
                pass
        with trace.invoke():
            hidden = model.layers[0].output
            one = patchwire.grad(model.logits[:, -1].pow(2).sum(), hidden).save()
            logits = model.logits.save()
    with model.trace(PROMPTS):
        hidden = model.layers[0].output
        two = patchwire.grad(model.logits[:, -1].pow(2).sum(), hidden).save()
        plain = model.logits.save()
    assert_same(one.value, two.value.nan_to_num(0.0))
    assert_same(logits.value, plain.value)


def test_steps_of_a_generation_are_read_for_all_rows(name: str, served: Any) -> None:
    model = served[name]
    with model.generate(max_new_tokens=3, min_new_tokens=3) as gen:
        parts = []
        for prompt in PROMPTS[:2]:
            with gen.invoke(prompt):
                parts.append([model.layers[1].output.save() for _ in gen.all()])
        with gen.invoke():
            found = [model.layers[1].output.clone().save() for _ in gen.all()]
    for step in (1, 2):
        assert_same(found[step].value, torch.cat([part[step].value for part in parts]))
    assert found[0].shape == (2, 11, tiny.WIDTH)


def test_with_one_prompt_it_is_that_prompts_own_scope(served: Any, references: Any) -> None:
    model = served["gpt2"]
    with model.trace(PROMPTS[0]) as trace, trace.invoke():
        logits = model.logits.save()
    assert_same(logits.value, forward(references["gpt2"], PROMPTS[0]).logits)
    with model.trace() as trace:
        with trace.invoke(PROMPTS[0]):
            pass
        with trace.invoke():
            again = model.logits.save()
    assert torch.equal(logits.value, again.value)


# --- what is refused ------------------------------------------------------------------------------------


@pytest.fixture
def model(served: Any) -> patchwire.Model:
    """One of the models."""
    return served["llama"]  # type: ignore[no-any-return]


def test_values_without_rows_are_refused(model: Any) -> None:
    with refused(SiteError, "no rows", hint="one of the invokes"), model.trace() as trace:
        for prompt in PROMPTS:
            with trace.invoke(prompt):
                pass
        with trace.invoke():
            model.layers[0].inputs[1]["position_embeddings"][0].save()  # this line


def test_an_invoke_cannot_follow(model: Any) -> None:
    with refused(GraphError, "no other can follow", hint="last"), model.trace() as trace:
        with trace.invoke(PROMPTS[0]):
            pass
        with trace.invoke():
            model.logits.save()
        with trace.invoke(PROMPTS[1]):  # this line
            pass


def test_it_cannot_be_the_first(model: Any) -> None:
    with refused(GraphError, "no rows yet", hint="invoke"), model.trace() as trace:
        empty = trace.invoke()
        empty.__enter__()  # this line


@pytest.mark.parametrize("value", [torch.zeros(1, 11, tiny.WIDTH), torch.zeros(4, 11, tiny.WIDTH, dtype=torch.double)])
def test_a_value_of_another_shape_or_type_is_refused_not_broadcast(value: Tensor, model: Any) -> None:
    with refused(ShapeError, r"\[4, 11, 24\] float32", hint="same shape"), model.trace() as trace:
        for prompt in PROMPTS:
            with trace.invoke(prompt):
                pass
        with trace.invoke():
            model.layers[0].output = value  # this line


def test_a_number_is_refused_as_a_value(model: Any) -> None:
    with refused(ShapeError, "int", hint=r"\[:\]"), model.trace() as trace:
        for prompt in PROMPTS:
            with trace.invoke(prompt):
                pass
        with trace.invoke():
            model.layers[0].output = 0  # this line
