"""Prompts that share a batch do not share anything else: each gets the numbers of its own run, whatever its length.

As a list in one trace, rows end together: the last `n` positions of a row are those of its `n` tokens, and what comes
before is NaN. As invokes of one trace, each has its own shape. Either way the reference is one run for each prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import patchwire
import tiny
from conformance import places
from conformance.hooks import Place, assert_same, changed_logits, forward, record
from conformance.test_writes import edited, logits_with, replaced
from patchwire.sites import Axis, Leaf

PROMPTS = [tiny.prompt(6), tiny.prompt(11), tiny.prompt(1), tiny.prompt(8)]
LONGEST = 1
TOLERANCE = 1e-5


@pytest.fixture(params=tiny.SERVED)
def name(request: pytest.FixtureRequest) -> str:
    """An architecture."""
    return str(request.param)


def has_rows(leaf: Leaf) -> bool:
    """Whether each row has a part of its own in it; position ids, for example, are one for all rows."""
    return any(dim.axis in (Axis.BATCH, Axis.BATCH_SEQ) for dim in leaf.shape)


def packed(model: patchwire.Model) -> list[Place]:
    """The sites at which rows of different lengths can be told apart."""
    return [place for place in places.every_place(model) if places.leaf_of(model, place).packs]


def unpacked(model: patchwire.Model) -> list[Place]:
    """The others."""
    return [place for place in places.every_place(model) if not places.leaf_of(model, place).packs]


def ragged(model: patchwire.Model) -> list[Place]:
    """The sites that can be shown for a list of different lengths: not position ids, say, which all rows share."""
    leaves = {place: places.leaf_of(model, place) for place in packed(model)}
    return [
        place
        for place, leaf in leaves.items()
        if has_rows(leaf) or all(dim.axis is Axis.CONSTANT for dim in leaf.shape)
    ]


def floats_with_rows(model: patchwire.Model) -> list[Place]:
    """The sites at which a row can be given other numbers without changing those of its neighbours."""
    leaves = {place: places.leaf_of(model, place) for place in packed(model)}
    return [place for place, leaf in leaves.items() if has_rows(leaf) and leaf.dtype.is_floating_point]


def own_part(value: torch.Tensor, row: int, alone: torch.Tensor) -> torch.Tensor:
    """What belongs to one row, in the shape that it has alone: aligned at the end."""
    return value[row : row + 1][(slice(None), *(slice(-length, None) for length in alone.shape[1:]))]


def assert_rows(value: torch.Tensor, alone: list[torch.Tensor], what: Any) -> None:
    """Every row equals its own run, and everything else is NaN."""
    longest = max(each.shape[0] for each in alone)
    if longest > 1 or value.shape[0] != len(alone):  # rows and tokens in one dimension
        value = value.unflatten(0, (len(alone), longest))
        alone = [each[None] for each in alone]
    rest = value.clone()
    for row, expected in enumerate(alone):
        assert_same(own_part(value, row, expected), expected, (what, row), tolerance=TOLERANCE)
        own_part(rest, row, expected).fill_(torch.nan if rest.is_floating_point() else 0)
    assert rest.isnan().all() if rest.is_floating_point() else not rest.any(), f"{what}: padding can be seen"


# --- as a list ----------------------------------------------------------


def test_every_row_of_a_list_equals_its_own_run_and_padding_is_nan(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    alone = [record(reference, prompt) for prompt in PROMPTS]

    with model.trace(PROMPTS):
        values = {place: places.read(model, place).save() for place in ragged(model)}

    for place, value in values.items():
        if has_rows(places.leaf_of(model, place)):
            assert_rows(value.value, [each[place] for each in alone], place)
        else:
            assert_same(value.value, alone[LONGEST][place], place)


def test_a_site_whose_rows_cannot_be_told_apart_is_refused_for_a_list(name: str, served: Any) -> None:
    model = served[name]
    refused = [place for place in places.every_place(model) if place not in ragged(model)]

    for place in refused:
        with pytest.raises(patchwire.SiteError, match="different lengths"), model.trace(PROMPTS):
            places.read(model, place)


def test_a_list_of_one_length_reads_every_site_as_its_batch_does(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    prompts = [tiny.prompt(7, seed=seed) for seed in range(3)]
    alone = [record(reference, prompt) for prompt in prompts]

    with model.trace(prompts):
        values = {place: places.read(model, place).save() for place in places.every_place(model)}

    for place, value in values.items():
        expected = [each[place] for each in alone]
        if has_rows(places.leaf_of(model, place)):
            assert_rows(value.value, expected, place)
        else:
            assert_same(value.value, expected[0], place)


def test_the_mask_says_where_the_tokens_are(name: str, served: Any) -> None:
    with served[name].trace(PROMPTS) as trace:
        logits = served[name].logits.save()

    assert torch.equal(trace.mask(), ~logits.value.isnan().any(-1))
    assert trace.mask().sum(1).tolist() == [len(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("change", [replaced, edited])
def test_a_write_to_a_list_affects_each_row_as_in_its_own_run(
    name: str, change: Any, served: Any, references: Any
) -> None:
    model, reference = served[name], references[name]

    for place in floats_with_rows(model):
        expected = [changed_logits(reference, prompt, {place: change}) for prompt in PROMPTS]
        with model.trace(PROMPTS):
            logits = logits_with(model, place, change)
        assert_rows(logits.value, expected, place)


def test_a_write_of_one_row_of_a_list_leaves_the_others_alone(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    untouched = [forward(reference, prompt).logits for prompt in PROMPTS]

    for row, prompt in enumerate(PROMPTS):
        site = next(place for place in floats_with_rows(model) if place[0].endswith(".1") and place[1] == "output")
        expected = list(untouched)
        expected[row] = changed_logits(reference, prompt, {site: edited})
        with model.trace(PROMPTS):
            places.read(model, site)[row, -1] = 0
            logits = model.logits.save()
        assert_rows(logits.value, expected, row)


# --- as invokes ----------------------------------------------------------


@pytest.mark.parametrize("sites", [packed, unpacked])
def test_every_site_of_every_invoke_equals_its_own_run(name: str, sites: Any, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    values: list[dict[Place, Any]] = []

    with model.trace() as trace:
        for prompt in PROMPTS:
            with trace.invoke(prompt):
                values.append({place: places.read(model, place).save() for place in sites(model)})
                model.logits.save()

    for prompt, found in zip(PROMPTS, values, strict=True):
        expected = record(reference, prompt)
        for place, value in found.items():
            assert_same(value.value, expected[place], (place, len(prompt)), tolerance=TOLERANCE)
    assert trace.stats.passes == (1 if sites is packed or not sites(model) else len(PROMPTS))


def test_an_invoke_may_be_a_list_of_different_lengths(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    groups = [[tiny.prompt(4), tiny.prompt(9)], [tiny.prompt(12)], [tiny.prompt(7), tiny.prompt(2), tiny.prompt(3)]]
    values = []

    with model.trace() as trace:
        for group in groups:
            with trace.invoke(group):
                values.append({place: places.read(model, place).save() for place in floats_with_rows(model)})

    for group, found in zip(groups, values, strict=True):
        alone = [record(reference, prompt) for prompt in group]
        for place, value in found.items():
            assert_rows(value.value, [each[place] for each in alone], place)


def batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    """The items, `size` at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


@pytest.mark.parametrize("change", [replaced, edited])
def test_a_write_in_an_invoke_equals_a_hook_in_its_own_run(
    name: str, change: Any, served: Any, references: Any
) -> None:
    """Every invoke writes at a site of its own, and all of them share one pass."""
    model, reference = served[name], references[name]

    for batch in batches(floats_with_rows(model), 24):
        found = []
        with model.trace() as trace:
            for index, place in enumerate(batch):
                with trace.invoke(PROMPTS[index % len(PROMPTS)]):
                    found.append(logits_with(model, place, change))
        assert trace.stats.passes == 1 or name not in tiny.CORE
        for index, (place, logits) in enumerate(zip(batch, found, strict=True)):
            expected = changed_logits(reference, PROMPTS[index % len(PROMPTS)], {place: change})
            assert_same(logits.value, expected, place, tolerance=TOLERANCE)


@pytest.mark.parametrize("change", [replaced, edited])
def test_a_write_that_cannot_share_a_pass_still_concerns_its_own_invoke_only(
    name: str, change: Any, served: Any, references: Any
) -> None:
    model, reference = served[name], references[name]
    awkward = [place for place in places.every_place(model) if place not in floats_with_rows(model)]

    for place in awkward:
        first, second, third = PROMPTS[:3]
        with model.trace() as trace:
            with trace.invoke(first):
                before = model.logits.save()
            with trace.invoke(second):
                logits = logits_with(model, place, change)
            with trace.invoke(third):
                after = model.logits.save()
        assert_same(before.value, forward(reference, first).logits, place, tolerance=TOLERANCE)
        assert_same(logits.value, changed_logits(reference, second, {place: change}), place, tolerance=TOLERANCE)
        assert_same(after.value, forward(reference, third).logits, place, tolerance=TOLERANCE)


def test_edits_everywhere_in_one_invoke_leave_every_site_of_the_others_alone(
    name: str, served: Any, references: Any
) -> None:
    model, reference = served[name], references[name]
    first, second, third = PROMPTS[:3]

    with model.trace() as trace:
        with trace.invoke(first):
            before = {place: places.read(model, place).save() for place in packed(model)}
        with trace.invoke(second):
            for place in floats_with_rows(model):
                places.read(model, place)[:] = 3.0
            model.logits.save()
        with trace.invoke(third):
            after = {place: places.read(model, place).save() for place in packed(model)}

    for prompt, values in ((first, before), (third, after)):
        expected = record(reference, prompt)
        for place, value in values.items():
            assert_same(value.value, expected[place], place, tolerance=TOLERANCE)


def test_a_prompt_repeated_in_several_invokes_is_edited_in_one_of_them_only(
    name: str, served: Any, references: Any
) -> None:
    model, reference, prompt = served[name], references[name], tiny.prompt(7)
    found = []

    with model.trace() as trace:
        for scale in (1.0, 0.0, -1.0):
            with trace.invoke(prompt):
                model.layers[1].output[:] *= scale
                found.append(model.logits.save())

    layer = places.PARTS[name]["layer"].format(1)
    site = next(place for place in record(reference, prompt) if place[:2] == (layer, "output"))
    for scale, logits in zip((1.0, 0.0, -1.0), found, strict=True):
        expected = changed_logits(reference, prompt, {site: lambda value, scale=scale: value * scale})
        assert_same(logits.value, expected, scale, tolerance=TOLERANCE)


# --- from one invoke to another ----------------------------------------------------------


def last(value: Any) -> Any:
    """The part that prompts of any length have in common: their last token."""
    return value[:, -1] if value.ndim > 2 else value[..., -1]


def test_a_value_flows_to_the_same_site_of_another_invoke(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    clean, corrupt = PROMPTS[0], PROMPTS[1]
    source = record(reference, clean)
    target = record(reference, corrupt)

    def patched(at: Place) -> Any:
        def change(value: torch.Tensor) -> torch.Tensor:
            last(value)[:] = last(source[at])
            return value

        return change

    fitting = [
        place
        for place in packed(model)
        if places.leaf_of(model, place).dtype.is_floating_point
        and source[place].ndim > 1
        and last(source[place]).shape == last(target[place]).shape
    ]
    assert len(fitting) > 40
    for place in fitting:
        with model.trace() as trace:
            with trace.invoke(clean):
                value = last(places.read(model, place))
            with trace.invoke(corrupt):
                last(places.read(model, place))[:] = value
                logits = model.logits.save()
        expected = changed_logits(reference, corrupt, {place: patched(place)})
        assert_same(logits.value, expected, place, tolerance=TOLERANCE)


def test_a_value_flows_to_every_later_layer_of_another_invoke(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    clean, corrupt = PROMPTS[1], PROMPTS[0]
    source = record(reference, clean)
    sites = [
        next(
            place
            for place in source
            if place[:2] == (places.PARTS[name]["layer"].format(layer), "output") and source[place].ndim == 3
        )
        for layer in range(model.num_layers)
    ]

    for earlier in range(model.num_layers):
        for later in range(earlier, model.num_layers):
            with model.trace() as trace:
                with trace.invoke(clean):
                    value = model.layers[earlier].output[:, 3]
                with trace.invoke(corrupt):
                    model.layers[later].output[:, 2] = value * 2
                    logits = model.logits.save()

            def change(hidden: torch.Tensor, given: torch.Tensor = source[sites[earlier]]) -> torch.Tensor:
                hidden[:, 2] = given[:, 3] * 2
                return hidden

            expected = changed_logits(reference, corrupt, {sites[later]: change})
            assert_same(logits.value, expected, (earlier, later), tolerance=TOLERANCE)


def test_an_edited_value_flows_on_through_a_chain_of_invokes(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    first, second, third = PROMPTS[:3]
    site = next(
        place
        for place, value in record(reference, first).items()
        if place[:2] == (places.PARTS[name]["layer"].format(1), "output") and value.ndim == 3
    )

    with model.trace() as trace:
        with trace.invoke(first):
            one = model.layers[1].output[:, -1]
        with trace.invoke(second):
            hidden = model.layers[1].output
            hidden[:, -1] += one
            two = hidden[:, -1] * 0.5
            second_logits = model.logits.save()
        with trace.invoke(third):
            model.layers[1].output[:, -1] = two - one
            third_logits = model.logits.save()

    one_, two_ = (record(reference, prompt)[site][:, -1] for prompt in (first, second))

    def set_last(new: torch.Tensor) -> Any:
        def change(value: torch.Tensor) -> torch.Tensor:
            value[:, -1] = new
            return value

        return change

    expected = changed_logits(reference, second, {site: set_last(two_ + one_)})
    assert_same(second_logits.value, expected, "second", tolerance=TOLERANCE)
    expected = changed_logits(reference, third, {site: set_last((two_ + one_) * 0.5 - one_)})
    assert_same(third_logits.value, expected, "third", tolerance=TOLERANCE)


def test_a_value_flows_between_invokes_that_cannot_share_a_pass(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    clean, corrupt = tiny.prompt(7, seed=1), tiny.prompt(7, seed=2)
    source = record(reference, clean)

    for place in unpacked(model):
        with model.trace() as trace:
            with trace.invoke(corrupt):
                untouched = model.logits.save()
            with trace.invoke(clean):
                value = places.read(model, place)
            with trace.invoke(corrupt):
                places.write(model, place, value)
                logits = model.logits.save()
        expected = changed_logits(reference, corrupt, {place: lambda _, place=place: source[place].clone()})
        assert_same(logits.value, expected, place, tolerance=TOLERANCE)
        assert_same(untouched.value, forward(reference, corrupt).logits, place, tolerance=TOLERANCE)


# --- from several programs at once -------------------------------------------------------------


def test_requests_that_come_at_the_same_time_do_not_mix(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    site = next(place for place in floats_with_rows(model) if place[0].endswith(".1") and place[1] == "output")
    scales = [0.25 * index for index in range(12)]

    def request(scale: float) -> torch.Tensor:
        with model.trace(PROMPTS[int(scale * 4) % len(PROMPTS)]):
            places.write(model, site, places.read(model, site) * scale)
            logits = model.logits.save()
        return logits.value

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(request, scales))

    for scale, logits in zip(scales, found, strict=True):
        prompt = PROMPTS[int(scale * 4) % len(PROMPTS)]
        expected = changed_logits(reference, prompt, {site: lambda value, scale=scale: value * scale})
        assert_same(logits, expected, scale)
