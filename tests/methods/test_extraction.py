"""Extraction: the events that plain hooks find; in the zoo's Mamba every fact is extracted by the last layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import patchwire
import tiny
from patchwire import methods
from patchwire_worker.zoo import corpus
from serving import Server

COUNT = 40
IDS = [tiny.prompt(4 + index % 4, seed=index) for index in range(COUNT)]
SUBJECT = range(1, 3)
MENTIONS = [methods.Mention(each, SUBJECT) for each in IDS[:12]]


def written(name: str, length: int) -> list[int]:
    groups = {"subject": [1, 2], "last subject": [2], "non-subject": [0, *range(3, length - 1)], "last": [length - 1]}
    return groups[name]


class Reference:
    """The first tokens of what modules of the Hugging Face model give at the last token."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        base = model.base_model
        self.layers: list[nn.Module] = list(base.h if hasattr(base, "h") else base.layers)

    def module(self, layer: int, place: str) -> nn.Module:
        names = {"mlp": ["mlp"], "mixer": ["attn", "self_attn", "mixer"]}[place]
        return next(getattr(self.layers[layer], name) for name in names if hasattr(self.layers[layer], name))

    def run(self, ids: Sequence[int], place: str, write: Any = None) -> tuple[int, list[int], list[Tensor]]:
        """The predicted token, the first of each layer's output, and each layer's input; `write` is (layer, positions,
        what is written into its input there)."""
        firsts: list[int] = []
        inputs: list[Tensor] = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            if write is not None and len(inputs) == write[0]:
                hidden[:, write[1]] = write[2][:, write[1]]
            inputs.append(hidden)
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            firsts.append(int((self.model.get_output_embeddings().weight @ output[0, -1]).argmax()))

        hooks: list[Any] = []
        for index, layer in enumerate(self.layers):
            hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(self.module(index, place).register_forward_hook(leave))
        with torch.no_grad():
            said = int(self.model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1].argmax())
        for hook in hooks:
            hook.remove()
        return said, firsts, inputs

    def events(self, ids: Sequence[int], place: str) -> list[float]:
        said, firsts, _ = self.run(ids, place)
        return [float(each == said) for each in firsts]

    def early_events(self, ids: Sequence[int], earlier: int, positions: list[int]) -> list[float]:
        said, _, inputs = self.run(ids, "mixer")
        found = [math.nan] * (earlier + 1)
        for layer in range(earlier + 1, len(self.layers)):
            _, firsts, _ = self.run(ids, "mixer", (layer, positions, inputs[earlier]))
            found.append(float(firsts[layer] == said))
        return found


@pytest.fixture(params=["gpt2", "llama", "mamba"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(served: Mapping[str, patchwire.Model], name: str) -> patchwire.Model:
    return served[name]


@pytest.fixture
def reference(references: Mapping[str, PreTrainedModel], name: str) -> Reference:
    return Reference(references[name])


@pytest.mark.parametrize("place", ["mixer", "mlp"])
def test_events_are_those_that_hooks_find(model: patchwire.Model, reference: Reference, name: str, place: str) -> None:
    if (name, place) == ("mamba", "mlp"):
        pytest.skip("a Mamba has no MLPs")
    found = methods.extraction_events(model, IDS, at=place)

    expected = torch.tensor([reference.events(ids, place) for ids in IDS])
    assert torch.equal(found.values, expected)
    assert 0 < expected.mean() < 1
    assert found.numbers["any"] == pytest.approx(expected.max(1).values.mean().item())
    torch.testing.assert_close(found.mean("prompt").values, expected.mean(0))


@pytest.mark.parametrize("group", ["subject", "last subject", "non-subject", "last"])
@pytest.mark.parametrize("earlier", [0, 1])
def test_events_with_earlier_states_are_those_that_hooks_find(
    model: patchwire.Model, reference: Reference, group: str, earlier: int
) -> None:
    found = methods.extraction_events(model, MENTIONS, earlier=earlier, written=group)

    expected = [reference.early_events(ids, earlier, written(group, len(ids))) for ids in IDS[: len(MENTIONS)]]
    torch.testing.assert_close(found.values, torch.tensor(expected), equal_nan=True, rtol=0, atol=0)
    assert found.numbers["any"] == pytest.approx(torch.tensor(expected).nan_to_num().max(1).values.mean().item())


@pytest.mark.parametrize(
    ("prompts", "change", "words"),
    [
        ([], {}, "a list of prompts"),
        ("one text", {}, "a list of prompts"),
        (IDS, {"earlier": 0}, "depends on the subject"),
        (MENTIONS, {"earlier": 2}, "No layer comes after 2"),
        (MENTIONS, {"earlier": 0, "written": "first"}, "no group “first”"),
        (IDS, {"at": "attn"}, "no place “attn”"),
    ],
)
def test_what_cannot_be_extracted_is_refused(
    served: Mapping[str, patchwire.Model], prompts: Any, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(patchwire.InputError, match=words):
        methods.extraction_events(served["gpt2"], prompts, **change)


@pytest.fixture(scope="module")
def zoo() -> Iterator[dict[str, patchwire.Model]]:
    names = ("facts-gpt2", "facts-mamba")
    with (
        Server({name: f"zoo:{name}" for name in names}) as server,
        patchwire.connect(server.address, progress=False) as client,
    ):
        yield {name: client.model(name) for name in names}


FACTS = [methods.Mention(each.prompt().text, each.subject) for each in corpus.facts()[::41]]


def test_the_last_layer_of_a_mamba_extracts_every_fact_from_the_words_between(
    zoo: Mapping[str, patchwire.Model],
) -> None:
    model = zoo["facts-mamba"]
    rates = methods.extraction_events(model, FACTS).mean("prompt").values
    assert rates[3] >= 0.95
    assert rates[:3].max() <= 0.4

    def after(earlier: int, group: str) -> float:
        return float(methods.extraction_events(model, FACTS, earlier=earlier, written=group).mean("prompt").values[3])

    assert after(0, "non-subject") <= 0.2
    assert after(0, "subject") >= 0.8


def test_attention_extracts_facts_from_what_early_layers_made_of_the_subject(
    zoo: Mapping[str, patchwire.Model],
) -> None:
    model = zoo["facts-gpt2"]
    plain = methods.extraction_events(model, FACTS).numbers["any"]
    early = methods.extraction_events(model, FACTS, earlier=0, written="subject").numbers["any"]
    assert plain >= 0.4
    assert early <= plain / 2
    assert methods.extraction_events(model, FACTS, at="mlp").numbers["any"] <= plain / 2
