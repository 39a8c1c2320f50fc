"""What is written is what the model goes on with: the logits equal those of hooks that return the same value.

An in-place edit of a site is a write to that site and to no other, so the hook clones, edits and returns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from conformance import places
from conformance.hooks import Place, assert_same, changed_logits, forward, record

IDS = tiny.prompt(9)


def replaced(value: Any) -> Any:
    """Another value of the same kind, as a new tensor: works on tensors and on values that do not exist yet."""
    return value * 1.5 + 0.1 if value.dtype.is_floating_point else value.flip(-1)


def edited(value: Any) -> Any:
    """The same value with a slice of it changed in place: the last token if there is one."""
    if value.ndim > 2:
        value[:, -1] = 0
    else:
        value[..., -1] = 0
    return value


@pytest.fixture(params=tiny.SERVED)
def name(request: pytest.FixtureRequest) -> str:
    """An architecture."""
    return str(request.param)


def logits_with(model: Any, place: Place, change: Any) -> Any:
    """Inside a block: change a site, and read the logits."""
    value = places.read(model, place)
    new = change(value)
    if new is not value:
        places.write(model, place, new)
    return model.logits.save()


@pytest.mark.parametrize("change", [replaced, edited])
def test_a_write_at_any_site_equals_a_hook_that_returns_the_same(
    name: str, change: Any, served: Any, references: Any
) -> None:
    model, reference = served[name], references[name]
    untouched = forward(reference, IDS).logits
    matter = 0

    for place in record(reference, IDS):
        expected = changed_logits(reference, IDS, {place: change})
        with model.trace(IDS):
            logits = logits_with(model, place, change)
        assert_same(logits.value, expected, place)
        matter += not torch.equal(expected, untouched)

    assert matter > 0.6 * len(places.every_place(model)), "the test says little if hardly any write matters"


@pytest.mark.parametrize("change", [replaced, edited])
def test_writes_at_every_site_at_once_equal_hooks_at_every_site(
    name: str, change: Any, served: Any, references: Any
) -> None:
    model, reference = served[name], references[name]
    floats = [place for place, value in record(reference, IDS).items() if value.is_floating_point()]
    expected = changed_logits(reference, IDS, dict.fromkeys(floats, change))

    with model.trace(IDS):
        for place in floats:
            value = places.read(model, place)
            new = change(value)
            if new is not value:
                places.write(model, place, new)
        logits = model.logits.save()

    assert_same(logits.value, expected)


def test_a_constant_can_be_written_without_reading(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]

    for place, value in list(record(reference, IDS).items())[::3]:
        if not value.is_floating_point():
            continue
        new = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        expected = changed_logits(reference, IDS, {place: lambda _, new=new: new.clone()})
        with model.trace(IDS):
            places.write(model, place, new)
            logits = model.logits.save()
        assert_same(logits.value, expected, place)


def test_a_write_is_seen_at_every_later_site_and_at_no_earlier_one(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    target: Place = next(place for place in record(reference, IDS) if place[0].endswith(".1") and place[1] == "output")
    seen = record(reference, IDS, {target: replaced})

    with model.trace(IDS):
        value = places.read(model, target)
        places.write(model, target, replaced(value))
        values = {place: places.read(model, place).save() for place in seen}

    for place, found in values.items():
        assert_same(found.value, seen[place], place)


def test_writes_leave_the_model_as_it_was_for_the_next_trace(name: str, served: Any, references: Any) -> None:
    model = served[name]

    with model.trace(IDS):
        for layer in model.layers:
            layer.output[:] = 0
        model.logits.save()
    with model.trace(IDS):
        logits = model.logits.save()

    assert_same(logits.value, forward(references[name], IDS).logits)
