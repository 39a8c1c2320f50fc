"""An architecture that no table describes: what is found by its structure is what it is everywhere, or else missing.

Families that the tables know are taken out of them, and looked at as if nobody had seen them before. What is then found
has to be what the table says; what is not found has to be reported.
"""

from __future__ import annotations

import logging

import pytest
from transformers import PreTrainedModel

import patchwire
import tiny
from patchwire.sites import Name
from patchwire_worker.models import detecting
from patchwire_worker.models.families import FAMILIES
from patchwire_worker.models.hosted import HostedModel
from patchwire_worker.models.loading import Loaded

EVERYTHING = ("llama", "qwen3", "gemma2", "olmo2", "stablelm_parallel", "cohere", "starcoder2", "qwen3_moe")
IN_PART = ("gpt2", "gptj", "phi3", "granite", "bloom", "falcon_grouped", "opt", "gpt_neox")
LACK = {
    "gpt2": {"attn.q", "attn.k", "attn.v", "attn.W_Q", "attn.W_K", "attn.W_V"},
    "gptj": {"attn.q_rot", "attn.k_rot", "attn.scores", "attn.pattern"},
    "granite": {"resid_mid", "mixer.update", "mlp.update"},
}


def hosted(name: str) -> HostedModel:
    return HostedModel(Loaded(name, tiny.uneven(name), None))


def meaning(names: dict[str, Name]) -> dict[str, object]:
    """What each name of a value or parameter stands for."""
    return {name: (each.part, each.formula, each.dims) for name, each in names.items() if not each.is_module}


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch, name: str) -> HostedModel:
    """A model of a family that the table does not have."""
    kind = tiny.UNEVEN[name]().model_type
    monkeypatch.setattr(detecting, "FAMILIES", {key: row for key, row in FAMILIES.items() if key != kind})
    return hosted(name)


@pytest.mark.parametrize("name", EVERYTHING)
def test_with_the_usual_names_all_is_found(name: str, unknown: HostedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    assert unknown.catalogue.names == hosted(name).catalogue.names


@pytest.mark.parametrize("name", IN_PART)
def test_what_is_found_is_what_the_table_says(name: str, unknown: HostedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found, known = meaning(unknown.catalogue.names), meaning(hosted(name).catalogue.names)

    assert found
    assert {each: known[each] for each in found} == found


@pytest.mark.parametrize("name", LACK)
def test_what_is_not_found_is_reported(name: str, unknown: HostedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {f"layers.1.{each}" for each in LACK[name]} <= unknown.missing.keys()
    assert all(unknown.missing.values())


@pytest.mark.parametrize("name", ["granite"])
def test_the_log_tells_it_once_for_all_layers(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(detecting, "FAMILIES", {})

    with caplog.at_level(logging.INFO, "patchwire_worker"):
        hosted(name)

    lines = [each.getMessage() for each in caplog.records if "no resid_mid" in each.getMessage()]
    assert lines == ["granite has no resid_mid in 2 layers: its structure does not tell where it is"]


def test_what_is_detected_works_in_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detecting, "FAMILIES", {})
    module: PreTrainedModel = tiny.uneven("gemma2")
    model = patchwire.local(module)

    with model.trace(tiny.prompt(5)):
        layer = model.layers[1]
        before, update, after = layer.input.save(), layer.mixer.update.save(), layer.resid_mid.save()
        last, leaves = layer.mlp.update.save(), layer.output.save()

    assert (before + update - after).abs().max() < 1e-5
    assert (after + last - leaves).abs().max() < 1e-5
