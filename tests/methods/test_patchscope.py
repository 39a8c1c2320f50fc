"""Patchscopes: what plain hooks give, in one model and between two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import patchwire
from patchwire import methods
from patchwire.errors import InputError, ShapeError

SOURCE, TARGET = [3, 14, 15, 9], [26, 5, 35, 8, 9]
NAMES = ["gpt2", "llama", "mamba"]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def layers(model: Any) -> list[Any]:
    base = model.base_model
    return list(base.h if hasattr(base, "h") else base.layers)


def hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def state(model: Any, layer: int, token: int) -> Tensor:
    found: list[Tensor] = []
    handle = layers(model)[layer].register_forward_hook(lambda m, a, output: found.append(hidden(output).clone()))
    with torch.no_grad():
        model(torch.tensor([SOURCE]), use_cache=False)
    handle.remove()
    return found[0][0, token]


def replacing(model: Any, layer: int, position: int, value: Tensor) -> Any:
    """Puts a state into the first pass that comes."""
    calls = []

    def hook(module: Any, args: Any, output: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            hidden(output)[0, position] = value

    return layers(model)[layer].register_forward_hook(hook)


def read(model: Any, layer: int, position: int, value: Tensor) -> Tensor:
    handle = replacing(model, layer, position, value)
    with torch.no_grad():
        logits = model(torch.tensor([TARGET]), use_cache=False).logits[0, -1]
    handle.remove()
    return logits.softmax(-1)


@pytest.mark.parametrize("into_layer", [None, 1])
def test_each_state_is_read_as_plain_hooks_read_it(
    served: Mapping[str, patchwire.Model], references: Mapping[str, PreTrainedModel], name: str, into_layer: int | None
) -> None:
    model, reference = served[name], references[name]
    found = methods.patchscope(model, SOURCE, TARGET, answer=7, position=-2, into_layer=into_layer, top=3)
    assert found.answer is not None
    assert [axis.name for axis in found.answer.axes] == ["layer", "token"]
    for layer in range(model.num_layers):
        for token in range(len(SOURCE)):
            after = layer if into_layer is None else into_layer
            expected = read(reference, after, 3, state(reference, layer, token))
            probabilities, ids = expected.topk(3)
            torch.testing.assert_close(found.tokens.scores.values[layer, token], probabilities, rtol=1e-4, atol=1e-6)
            assert found.tokens.ids[layer, token].tolist() == ids.tolist()
            assert float(found.answer.values[layer, token]) == pytest.approx(float(expected[7]), rel=1e-4)
    with torch.no_grad():
        plain = reference(torch.tensor([TARGET]), use_cache=False).logits[0, -1].softmax(-1)
    assert found.answer.numbers["base"] == pytest.approx(float(plain[7]), rel=1e-4)


def test_a_state_goes_into_another_model(
    served: Mapping[str, patchwire.Model], references: Mapping[str, PreTrainedModel]
) -> None:
    """From a Mamba to a GPT-2, with a map between both."""
    one, other = references["mamba"], references["gpt2"]
    width = one.get_input_embeddings().weight.shape[1], other.get_input_embeddings().weight.shape[1]
    torch.manual_seed(0)
    weight, bias = torch.randn(width) / 8, torch.randn(width[1])
    found = methods.patchscope(
        served["mamba"], SOURCE, TARGET, layers=[0, 1], tokens=[-1], answer=7, into=served["gpt2"], into_layer=0,
        mapping=lambda states: states @ weight + bias,
    )  # fmt: skip
    assert found.answer is not None
    for index, layer in enumerate([0, 1]):
        expected = read(other, 0, -1, state(one, layer, -1) @ weight + bias)
        assert float(found.answer.values[index, 0]) == pytest.approx(float(expected[7]), rel=1e-4)
    assert found.answer.axes[1].labels == ("#9",)


def test_a_generation_goes_on_from_the_state(
    served: Mapping[str, patchwire.Model], references: Mapping[str, PreTrainedModel], name: str
) -> None:
    reference = references[name]
    found = methods.patchscope_text(served[name], SOURCE, 1, 2, TARGET, position=2, into_layer=0, max_new_tokens=4)
    handle = replacing(reference, 0, 2, state(reference, 1, 2))
    with torch.no_grad():
        ids = reference.generate(torch.tensor([TARGET]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    handle.remove()
    assert found == " ".join(f"#{each}" for each in ids[0, len(TARGET) :].tolist())


def test_what_is_not_there_is_said(served: Mapping[str, patchwire.Model]) -> None:
    model = served["gpt2"]
    with pytest.raises(InputError, match="none at 7"):
        methods.patchscope(model, SOURCE, TARGET, position=7)
    with pytest.raises(InputError, match="none at -5"):
        methods.patchscope(model, SOURCE, TARGET, tokens=[-5])
    with pytest.raises(InputError, match="layers 0 to"):
        methods.patchscope(model, SOURCE, TARGET, into_layer=99)
    with pytest.raises(InputError, match="no states"):
        methods.patchscope(model, SOURCE, TARGET, layers=[])
    with pytest.raises(ShapeError):
        methods.patchscope(model, SOURCE, TARGET, mapping=lambda states: states[:, :3])
