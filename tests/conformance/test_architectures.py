"""Architectures beside the core ones: every site reads as a hook does, alone and among prompts of other lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import patchwire
import tiny
from conformance import places
from conformance.hooks import assert_same, changed_logits, record
from conformance.test_several_prompts import floats_with_rows, packed
from conformance.test_writes import logits_with, replaced
from serving import Server

SLOW = ("gptj", "gpt_neo", "qwen2", "qwen3", "gemma2", "olmo2", "phi3", "falcon_mamba", "mixtral", "mamba_untied",
        "falcon_h1_norm", "falcon_h1_norm_after", "granitemoehybrid", "nemotron_h", "zamba2", "zamba2_adapted", "bamba",
        "recurrent_gemma_wide", "mamba_odd", "mamba2_odd", "falcon_mamba_odd")  # fmt: skip
OTHERS = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in tiny.CONFIGS
    if name not in tiny.SERVED
]
TOLERANCE = 5e-5  # of two batches of different size, in Hugging Face's own code too
PROMPTS = [tiny.prompt(6), tiny.prompt(11), tiny.prompt(1)]


@pytest.fixture(scope="module")
def pairs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[patchwire.Model, Any]]]:
    """Each architecture: its proxy, and the model here."""
    root = tmp_path_factory.mktemp("others")
    wanted = {item.callspec.params["name"] for item in request.session.items if item.path == request.path}
    directories = {name: tiny.save(name, root / name) for name in sorted(wanted)}
    with Server(directories) as server, patchwire.connect(server.address, progress=False) as client:
        yield {
            name: (client.model(name), AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(False))
            for name, path in directories.items()
        }


pytestmark = pytest.mark.parametrize("name", OTHERS)


def test_its_parts_have_canonical_names(name: str, pairs: Any) -> None:
    model, reference = pairs[name]

    assert model.num_layers == reference.config.num_hidden_layers
    assert {"embed", "norm", "lm_head", "logits"} <= set(dir(model))
    for layer in model.layers:
        assert hasattr(layer, "mixer")


def test_the_catalogue_has_every_tensor_that_hooks_see_and_no_other(name: str, pairs: Any) -> None:
    model, reference = pairs[name]

    assert set(places.every_place(model)) == set(record(reference, tiny.prompt(9)))


def test_every_site_equals_its_hook(name: str, pairs: Any) -> None:
    model, reference = pairs[name]

    for prompt in PROMPTS:
        expected = record(reference, prompt)
        with model.trace(prompt):
            # An attention mask is made only for prompts longer than a sliding window.
            values = {
                place: places.read(model, place).save() for place in places.every_place(model) if place in expected
            }
        for place, value in values.items():
            assert_same(value.value, expected[place], (place, len(prompt)))


def test_every_site_equals_its_hook_when_prompts_share_a_pass(name: str, pairs: Any) -> None:
    model, reference = pairs[name]
    values = []

    with model.trace() as trace:
        for prompt in PROMPTS:
            with trace.invoke(prompt):
                values.append({place: places.read(model, place).save() for place in packed(model)})

    assert trace.stats.passes == 1
    for prompt, found in zip(PROMPTS, values, strict=True):
        expected = record(reference, prompt)
        for place, value in found.items():
            if place in expected:
                assert_same(value.value, expected[place], (place, len(prompt)), tolerance=TOLERANCE)


def test_a_write_in_an_invoke_equals_a_hook(name: str, pairs: Any) -> None:
    model, reference = pairs[name]
    sites = floats_with_rows(model)
    found = []

    with model.trace() as trace:
        for index, place in enumerate(sites):
            with trace.invoke(PROMPTS[index % 2]):
                found.append(logits_with(model, place, replaced))

    for index, (place, logits) in enumerate(zip(sites, found, strict=True)):
        assert_same(
            logits.value, changed_logits(reference, PROMPTS[index % 2], {place: replaced}), place, tolerance=TOLERANCE
        )


def test_a_site_that_only_longer_prompts_have_is_refused(name: str, pairs: Any) -> None:
    model, reference = pairs[name]
    absent = [place for place in places.every_place(model) if place not in record(reference, [3])]

    for place in absent:
        with pytest.raises(patchwire.SiteError, match="not a tensor in this run"), model.trace([3]):
            places.read(model, place).save()
