"""Coefficients of neurons that are set in a block: what plain hooks on the output projection do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import patchwire
from patchwire import methods

PROMPT = [3, 14, 15, 9, 26, 5]
LAYER = 1
NEURONS = [4, 17, 30]


@pytest.fixture(params=["gpt2", "llama", "gpt_neox", "mamba", "mamba2"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(served: Mapping[str, patchwire.Model], name: str) -> patchwire.Model:
    return served[name]


@pytest.fixture
def reference(references: Mapping[str, PreTrainedModel], name: str) -> PreTrainedModel:
    return references[name]


def projection(model: PreTrainedModel) -> nn.Module:
    """The output projection of the layer."""
    base = model.base_model
    modules = dict((base.h if hasattr(base, "h") else base.layers)[LAYER].named_modules())
    names = ("mlp.c_proj", "mlp.down_proj", "mlp.dense_4h_to_h", "mixer.out_proj")
    [module] = [modules[each] for each in names if each in modules]
    return module


def hooked(model: PreTrainedModel, change: Callable[[Tensor], None], run: Callable[[], Tensor]) -> Tensor:
    """What a run gives with the coefficients changed."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        value = args[0].clone()
        change(value)
        return (value,)

    handle = projection(model).register_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            return run()
    finally:
        handle.remove()


def setter(to: Any, tokens: Any = slice(None)) -> Callable[[Tensor], None]:
    def change(value: Tensor) -> None:
        value[:, tokens, NEURONS] = to

    return change


def logits_of(model: PreTrainedModel) -> Callable[[], Tensor]:
    return lambda: model(torch.tensor([PROMPT]), use_cache=False).logits


@pytest.mark.parametrize("to", [0.0, -2.0, torch.tensor([3.0, 0.0, 1.5])], ids=["zero", "number", "each"])
@pytest.mark.parametrize("tokens", [slice(None), slice(2, 4), -1], ids=["all", "some", "last"])
def test_what_is_set_is_the_coefficient_after_the_activation(
    model: patchwire.Model, reference: PreTrainedModel, to: Any, tokens: Any
) -> None:
    with model.trace(PROMPT):
        methods.set_coefficients(model.layers[LAYER], NEURONS, to, tokens=tokens)
        logits = model.logits.save()

    expected = hooked(reference, setter(to, tokens), logits_of(reference))
    torch.testing.assert_close(logits.value, expected, rtol=1e-4, atol=1e-5)


def test_what_is_scaled_is_multiplied(model: patchwire.Model, reference: PreTrainedModel) -> None:
    factors = torch.tensor([2.0, -1.0, 0.5])
    with model.trace(PROMPT):
        methods.scale_coefficients(model.layers[LAYER], NEURONS, factors, tokens=slice(1, None))
        logits = model.logits.save()

    def change(value: Tensor) -> None:
        value[:, 1:, NEURONS] = value[:, 1:, NEURONS] * factors

    torch.testing.assert_close(logits.value, hooked(reference, change, logits_of(reference)), rtol=1e-4, atol=1e-5)


def test_a_generation_has_it_in_every_step(model: patchwire.Model, reference: PreTrainedModel) -> None:
    with model.generate(PROMPT, max_new_tokens=5) as gen:
        for _ in gen.all():
            methods.set_coefficients(model.layers[LAYER], NEURONS, 4.0)
        tokens = gen.output.save()
    with model.edit() as edited:
        methods.set_coefficients(edited.layers[LAYER], NEURONS, 4.0)
    with edited.generate(PROMPT, max_new_tokens=5) as gen:
        as_an_edit = gen.output.save()

    ids = list(PROMPT)
    for _ in range(len(tokens.value[0]) - len(PROMPT)):
        rows = torch.tensor([ids])
        said = hooked(reference, setter(4.0), lambda rows=rows: reference(rows, use_cache=False).logits)  # type: ignore[misc]
        ids.append(int(said[0, -1].argmax()))
    assert tokens.value[0].tolist() == ids == as_an_edit.value[0].tolist()


def test_all_of_them_at_zero_are_the_layer_knocked_out(model: patchwire.Model, name: str) -> None:
    layer = model.layers[LAYER]
    part = layer.ssm if "mamba" in name else layer.mlp
    bias = hasattr(part, "b_out")
    with model.trace() as trace:
        with trace.invoke(PROMPT):
            methods.set_coefficients(layer, range(part.W_out.shape[0]), 0.0)
            zeroed = model.logits.save()
        with trace.invoke(PROMPT):
            part.output[:] = part.b_out if bias else 0.0
            knocked_out = model.logits.save()

    torch.testing.assert_close(zeroed.value, knocked_out.value, rtol=1e-5, atol=1e-6)


def test_scaling_one_moves_the_logits_of_a_head_without_norm_by_its_projection(model: patchwire.Model) -> None:
    with model.trace() as trace:
        with trace.invoke(PROMPT):
            _, site = methods.neurons.neurons_of(model.layers[LAYER])
            coefficient = site.coefficients(model.layers[LAYER])[0, :, 17]
            before = model.layers[LAYER].output @ model.W_U
            moved = (1.5 * coefficient[:, None] * (site.values(model.layers[LAYER])[17] @ model.W_U)).save()
        with trace.invoke(PROMPT):
            methods.scale_coefficients(model.layers[LAYER], [17], 2.5)
            change = (model.layers[LAYER].output @ model.W_U - before)[0].save()

    assert float(moved.value.abs().max()) > 1e-3
    torch.testing.assert_close(change.value, moved.value, rtol=1e-3, atol=1e-5)


def test_only_neurons_that_are_there_can_be_set(model: patchwire.Model, name: str) -> None:
    with pytest.raises(patchwire.InputError, match="are no neurons of a layer"), model.trace(PROMPT):
        methods.set_coefficients(model.layers[LAYER], [1000], 0.0)
    with pytest.raises(patchwire.SiteError), model.trace(PROMPT):
        methods.set_coefficients(model.layers[LAYER], [0], 0.0, kind="mlp" if "mamba" in name else "ssm")
