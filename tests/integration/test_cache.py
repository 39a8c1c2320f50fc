"""Caches: the values of many modules at once, by address, as hooks see them."""

from __future__ import annotations

import pytest
import torch

import patchwire
import tiny
from conformance.hooks import assert_same, record
from integration.refusals import refused
from patchwire import BranchError, GraphError, ShapeError, SiteError

IDS = [1, 2, 3, 4, 5]


@pytest.fixture
def model(served) -> patchwire.Model:
    return served["gpt2"]


def first(places, path, side):
    """The first tensor that a hook sees on a side of a module."""
    return next(tensor for place, tensor in places.items() if place[:2] == (path, side))


class TestACache:
    @pytest.mark.parametrize("name", tiny.CORE)
    def test_holds_all_layers_as_hooks_see_them(self, served, references, name):
        model = served[name]
        with model.trace(IDS) as trace:
            cache = trace.cache(inputs=True)

        places = record(references[name], IDS)
        assert sorted(cache) == sorted(
            f"layers.{index}.{side}" for index in range(tiny.LAYERS) for side in ("output", "input")
        )
        for index, layer in enumerate(model.layers):
            assert_same(cache[f"layers.{index}.output"].value, first(places, layer.path, "output"))
            assert_same(cache[f"layers.{index}.input"].value, first(places, layer.path, "input"))

    def test_takes_modules_names_and_patterns(self, model, references):
        with model.trace(IDS) as trace:
            cache = trace.cache(
                [model.layers[0].mlp, "norm", "logits", "transformer.h.*.attn.c_proj", "layers.?.mixer"]
            )

        assert list(cache) == [
            "layers.0.mlp.output",
            "norm.output",
            "logits",
            *(f"transformer.h.{index}.attn.c_proj.output" for index in range(3)),
            *(f"layers.{index}.mixer.output" for index in range(3)),
        ]
        places = record(references["gpt2"], IDS)
        assert_same(cache["layers.0.mlp.output"].value, places["transformer.h.0.mlp", "output", ()])
        assert_same(
            cache["transformer.h.2.attn.c_proj.output"].value, places["transformer.h.2.attn.c_proj", "output", ()]
        )
        assert_same(cache["layers.1.mixer.output"].value, first(places, "transformer.h.1.attn", "output"))
        assert_same(cache["logits"].value, places["lm_head", "output", ()])

    def test_takes_every_tensor_of_a_tuple(self, model, references):
        with model.trace(IDS) as trace:
            cache = trace.cache("transformer.h.1.attn", inputs=True)

        places = record(references["gpt2"], IDS)
        expected = {
            f"transformer.h.1.attn.output{''.join(f'[{step}]' for step in place[2])}": tensor
            for place, tensor in places.items()
            if place[:2] == ("transformer.h.1.attn", "output")
        }
        assert set(cache) == {*expected, "transformer.h.1.attn.input"}
        for address, tensor in expected.items():
            assert_same(cache[address].value, tensor)

    def test_takes_everything_that_a_pattern_of_two_stars_means(self, model):
        with model.trace(IDS) as trace:
            cache = trace.cache("transformer.**", outputs=False, inputs=True)

        assert "transformer.h.2.mlp.c_fc.input" in cache
        assert "transformer.wte.input" in cache
        assert "lm_head.input" not in cache

    def test_holds_edits_whenever_they_were_written(self, model):
        with model.trace(IDS) as trace:
            model.layers[0].output[:, 0] = 7
            cache = trace.cache()
            model.layers[1].output[:, 0] = 8
            model.layers[2].output = model.layers[2].output * 0

        assert (cache["layers.0.output"][:, 0] == 7).all()
        assert (cache["layers.1.output"][:, 0] == 8).all()
        assert (cache["layers.2.output"].value == 0).all()

    def test_of_one_prompt_of_several_is_of_that_prompt(self, model):
        with model.trace() as trace:
            caches = []
            for ids in (IDS, [6, 7]):
                with trace.invoke(ids):
                    caches.append(trace.cache())
        with model.trace([6, 7]) as trace:
            alone = trace.cache()

        assert caches[0]["layers.1.output"].shape == (1, 5, 24)
        assert_same(caches[1]["layers.1.output"].value, alone["layers.1.output"].value)

    def test_can_be_sent_narrow(self, model):
        with model.trace(IDS) as trace:
            narrow, wide = trace.cache(dtype=torch.bfloat16), trace.cache()

        for address in wide:
            assert torch.equal(narrow[address].value, wide[address].value.bfloat16())

    def test_is_enough_for_a_block_and_saves_nothing_twice_for_its_reader(self, model):
        with model.trace(IDS) as trace:
            cache = trace.cache()

        assert trace.stats.passes == 1
        assert torch.stack(list(cache.values())).shape == (3, 1, 5, 24)
        assert {name: value.shape for name, value in cache.items()}["layers.0.output"] == (1, 5, 24)

    def test_is_printed_with_shapes_and_without_numbers(self, model):
        with model.trace(IDS) as trace:
            cache = trace.cache([model.embed, "lm_head"])

        assert repr(cache).splitlines() == [
            "embed.output: [1, 5, 24] float32",
            f"lm_head.output: [1, 5, {tiny.VOCABULARY}] float32",
        ]

    def test_of_a_scan_knows_shapes(self, model):
        with model.scan(IDS) as scan:
            cache = scan.cache("lm_head")

        assert cache["lm_head.output"].shape == (1, 5, tiny.VOCABULARY)


class TestRefusals:
    def test_of_a_module_that_is_not_there(self, model):
        with refused(SiteError, "mixr", hint="mixer"), model.trace(IDS) as trace:
            trace.cache("layers.0.mixr")  # this line

    def test_of_a_pattern_that_nothing_matches(self, model):
        with refused(SiteError, r"matches `layers\.\*\.ssm`", hint="wildcards"), model.trace(IDS) as trace:
            trace.cache("layers.*.ssm")  # this line

    def test_of_an_address_that_is_not_in_it(self, model):
        with model.trace(IDS) as trace:
            cache = trace.cache()
        with refused(SiteError, "not in this cache", hint=r"`layers\.2\.output`"):
            cache["layers.2.outptu"]  # this line
        assert "layers.9.output" not in cache
        assert cache.get("layers.9.output") is None

    def test_of_its_values_before_the_block_has_ended(self, model):
        with refused(BranchError, "filled when the block has ended"), model.trace(IDS) as trace:
            cache = trace.cache()
            cache["layers.0.output"]  # this line

    def test_outside_of_the_invokes(self, model):
        with refused(GraphError, "outside of the trace's invokes"), model.trace() as trace:
            trace.cache()  # this line

    def test_after_the_block(self, model):
        with model.trace(IDS) as trace:
            trace.cache()
        with refused(GraphError, "only while the model runs"):
            trace.cache()  # this line

    def test_of_a_write_that_does_not_fit_is_that_of_the_write(self, model):
        with refused(ShapeError, "cannot become"), model.trace(IDS) as trace:
            trace.cache()
            model.layers[1].output = torch.zeros(3)  # this line


def test_values_inside_modules_by_their_canonical_names(served):
    model = served["gpt2"]
    with model.trace([1, 2, 3, 4]) as trace:
        cache = trace.cache(["layers.*.mlp.neurons", "layers.1.mixer.pattern", "layers.*.attn.z"])
        neurons = [layer.mlp.c_proj.input.save() for layer in model.layers]
        pattern = model.layers[1].attn.pattern.save()
    assert [each for each in cache if each.endswith("neurons")] == [f"layers.{n}.mlp.neurons" for n in range(3)]
    assert all(torch.equal(cache[f"layers.{n}.mlp.neurons"].value, neurons[n].value) for n in range(3))
    assert torch.equal(cache["layers.1.mixer.pattern"].value, pattern.value)
    assert cache["layers.2.attn.z"].shape == (1, 4, 4, 6)


def test_a_pattern_over_modules_leaves_values_inside_them_out(served):
    with served["gpt2"].trace([1, 2, 3]) as trace:
        cache = trace.cache("layers.*.*")
    assert all(each.rpartition(".")[2].startswith("output") for each in cache)
