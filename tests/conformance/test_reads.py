"""What is read is what Hugging Face computes: every value equals the one that a plain hook sees."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import patchwire
import tiny
from conformance import places
from conformance.hooks import assert_same, forward, record, visits

pytestmark = pytest.mark.parametrize("name", tiny.SERVED)
LENGTHS = (1, 2, 9, 21)


def test_the_catalogue_has_every_tensor_that_hooks_see_and_no_other(name: str, served: Any, references: Any) -> None:
    seen = record(references[name], tiny.prompt(9))

    assert set(places.every_place(served[name])) == set(seen)


def test_the_catalogue_is_in_the_order_of_the_forward_pass(name: str, served: Any, references: Any) -> None:
    seen = record(references[name], tiny.prompt(9))

    known = [place[:2] for place in places.every_place(served[name])]

    assert list(dict.fromkeys(known)) == list(dict.fromkeys(place[:2] for place in seen))


@pytest.mark.parametrize("length", LENGTHS)
def test_all_sites_read_in_one_trace_equal_hooks(name: str, length: int, served: Any, references: Any) -> None:
    model, ids = served[name], tiny.prompt(length)
    expected = record(references[name], ids)

    with model.trace(ids) as trace:
        values = {place: places.read(model, place).save() for place in expected}

    for place, value in values.items():
        assert_same(value.value, expected[place], place)
    assert trace.stats.passes == 1


def test_each_site_read_alone_equals_its_hook(name: str, served: Any, references: Any) -> None:
    model, ids = served[name], tiny.prompt(7)

    for place, expected in record(references[name], ids).items():
        with model.trace(ids):
            value = places.read(model, place).save()
        assert_same(value.value, expected, place)


def test_symbolic_shapes_are_the_shapes(name: str, served: Any, references: Any) -> None:
    model = served[name]
    seen = record(references[name], tiny.prompt(13))

    for place in places.every_place(model):
        lengths = places.leaf_of(model, place).lengths(1, 13)
        assert lengths is None or lengths == tuple(seen[place].shape), place


def test_input_is_the_first_argument(name: str, served: Any, references: Any) -> None:
    model, ids = served[name], tiny.prompt(6)
    firsts = {place: value for place, value in record(references[name], ids).items() if place[2] == ("args", 0)}

    with model.trace(ids):
        values = {place: model.module(place[0]).input.save() for place in firsts}

    assert len(values) > 10
    for place, value in values.items():
        assert_same(value.value, firsts[place], place)


def test_canonical_names_are_the_modules_that_the_architecture_calls_so(
    name: str, served: Any, references: Any
) -> None:
    model, ids, parts = served[name], tiny.prompt(8), places.PARTS[name]
    seen = record(references[name], ids)

    def hook(part: str, side: str, layer: int = 0) -> torch.Tensor:
        path = parts[part].format(layer)
        wanted = {"output": [(), (0,)], "input": [("args", 0), ("kwargs", "hidden_states")]}[side]
        return next(seen[path, side, steps] for steps in wanted if (path, side, steps) in seen)

    found: list[tuple[str, Any, torch.Tensor]] = []
    with model.trace(ids):
        for part in ("embed", "norm", "lm_head"):
            module = getattr(model, part)
            found += [(part, module.output.save(), hook(part, "output"))]
            found += [(part, module.input.save(), hook(part, "input"))]
        for index, layer in enumerate(model.layers):
            found += [(f"layer {index}", layer.output.save(), hook("layer", "output", index))]
            found += [(f"layer {index} in", layer.input.save(), hook("layer", "input", index))]
            if "mixer" in parts:
                found += [(f"mixer {index}", layer.mixer.output.save(), hook("mixer", "output", index))]
                found += [(f"mixer {index} in", layer.mixer.input.save(), hook("mixer", "input", index))]
            if "mlp" in parts:
                found += [(f"mlp {index}", layer.mlp.output.save(), hook("mlp", "output", index))]
        logits = model.logits.save()

    assert model.num_layers == references[name].config.num_hidden_layers
    for what, value, expected in found:
        assert_same(value.value, expected, what)
    assert_same(logits.value, forward(references[name], ids).logits, "logits")


def test_only_what_has_an_mlp_names_one(name: str, served: Any, references: Any) -> None:
    has_mlp = "mlp" in places.PARTS[name]

    assert hasattr(served[name].layers[0], "mlp") == has_mlp


def test_applying_a_module_to_a_value_equals_calling_it(name: str, served: Any, references: Any) -> None:
    model, reference, ids, parts = served[name], references[name], tiny.prompt(8), places.PARTS[name]
    hidden = record(reference, ids)
    layer = parts["layer"].format(1)
    at = next(place for place in hidden if place[:2] == (layer, "output"))

    with model.trace(ids):
        lens = model.lm_head(model.norm(model.layers[1].output)).save()

    norm, head = reference.get_submodule(parts["norm"]), reference.get_submodule(parts["lm_head"])
    assert_same(lens.value, head(norm(hidden[at])), "the logit lens")


def test_parameters_are_the_weights(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    shared = dict(reference.named_parameters())

    with model.trace(tiny.prompt(3)):
        values = {
            path: getattr(model.module(path.rpartition(".")[0]), path.rpartition(".")[2]).clone().save()
            for path in shared
        }

    for path, value in values.items():
        assert torch.equal(value.value, shared[path]), path


def test_a_module_that_is_called_several_times_is_refused_rather_than_read_once(
    name: str, served: Any, references: Any
) -> None:
    model, ids = served[name], tiny.prompt(5)
    calls = Counter(path for path, side, _ in visits(references[name], ids) if side == "output")
    several = [path for path, count in calls.items() if count > 1]

    assert several == (["shared"] if name == "odd" else [])
    for path in several:
        with pytest.raises(patchwire.SiteError, match=f"exists {calls[path]} times"), model.trace(ids):
            model.module(path).output.save()
