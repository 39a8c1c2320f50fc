"""A value arrives in the element type that it has in the model, bit by bit, unless another one is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import patchwire
import tiny
from conformance import places
from conformance.hooks import assert_same, changed_logits, record
from conformance.test_writes import edited, logits_with
from serving import Server

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
NAMES = ("gpt2", "llama", "mamba", "mamba2")
# What one more rounding of the element type may do.
ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-5}
IDS = tiny.prompt(9)


@pytest.fixture(scope="module")
def pairs(checkpoints: dict[str, str]) -> Iterator[dict[tuple[str, str], tuple[patchwire.Model, Any]]]:
    """The proxy, and the model here, of each architecture in each element type."""
    kinds = {f"{name}-{dtype}": (name, dtype) for name in NAMES for dtype in DTYPES}
    specs = {key: checkpoints[name] for key, (name, _) in kinds.items()}
    with (
        Server(specs, dtypes={key: dtype for key, (_, dtype) in kinds.items()}) as server,
        patchwire.connect(server.address, progress=False) as client,
    ):
        yield {
            (name, dtype): (
                client.model(key),
                AutoModelForCausalLM.from_pretrained(checkpoints[name], dtype=DTYPES[dtype]).eval(),
            )
            for key, (name, dtype) in kinds.items()
        }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_site_has_the_type_and_the_bits_of_its_hook(name: str, dtype: str, pairs: Any) -> None:
    model, reference = pairs[name, dtype]
    expected = record(reference, IDS)

    with model.trace(IDS):
        values = {place: places.read(model, place).save() for place in expected}

    for place, value in values.items():
        assert_same(value.value, expected[place], place, tolerance=ROUNDING[DTYPES[dtype]])
    same = [place for place, value in values.items() if torch.equal(value.value, expected[place])]
    assert len(same) > 0.9 * len(values)
    assert DTYPES[dtype] in {value.value.dtype for value in values.values()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_an_edit_computes_in_the_type_of_the_site(name: str, dtype: str, pairs: Any) -> None:
    model, reference = pairs[name, dtype]
    site = next(place for place in record(reference, IDS) if place[0].endswith(".1") and place[1] == "output")

    def scaled(value: Any) -> Any:
        value[:, 2] *= 1.1
        return edited(value)

    with model.trace(IDS):
        logits = logits_with(model, site, scaled)

    expected = changed_logits(reference, IDS, {site: scaled})
    assert_same(logits.value, expected, site, tolerance=ROUNDING[DTYPES[dtype]])


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16, torch.float64, torch.float32])
@pytest.mark.parametrize("name", tiny.CORE)
def test_saving_in_another_type_is_converting_the_value(name: str, wire: torch.dtype, served: Any) -> None:
    model = served[name]

    with model.trace(IDS):
        whole = model.layers[1].output.save()
        narrow = model.layers[1].output.save(dtype=wire)

    assert narrow.value.dtype == wire
    assert torch.equal(narrow.value, whole.value.to(wire))


def test_integers_and_booleans_arrive_as_they_are(served: Any) -> None:
    model = served["gpt2"]

    with model.trace(IDS):
        ids = model.embed.input.save()
        hidden = model.layers[0].output
        mask = (hidden > 0).save()
        best = model.logits.argmax(-1).to(torch.int32).save()
        count = mask.sum().save()

    assert ids.value.tolist() == [IDS]
    assert mask.value.dtype == torch.bool
    assert best.value.dtype == torch.int32
    assert count.value == mask.value.sum()
