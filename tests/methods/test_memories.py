"""Layers as key-value memories: shares that plain hooks count, one text at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import patchwire
import tiny
from patchwire import methods
from patchwire.methods import triggering, vocabulary
from patchwire_worker.zoo import corpus

DATA = [tiny.prompt(2 + index % 7, seed=index) for index in range(30)]


@pytest.fixture(params=["gpt2", "llama", "mamba"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(served: Mapping[str, patchwire.Model], name: str) -> patchwire.Model:
    return served[name]


@pytest.fixture
def reference(references: Mapping[str, PreTrainedModel], name: str) -> PreTrainedModel:
    return references[name]


def shares(model: PreTrainedModel) -> tuple[list[list[float]], int]:
    """Agreement, active and differs of each layer; and how many tokens there are."""
    base = model.base_model
    names = ("mlp.c_proj", "mlp.down_proj", "mixer.out_proj")
    layers = [dict(each.named_modules()) for each in (base.h if hasattr(base, "h") else base.layers)]
    modules = [next(each[name] for name in names if name in each) for each in layers]
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in modules]
    handles = [
        module.register_forward_hook(lambda _, args, output, mine=mine: mine.append((args[0][0], output[0])))
        for module, mine in zip(modules, seen, strict=True)
    ]
    with torch.no_grad():
        for ids in DATA:
            model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    head: Any = model.get_output_embeddings()
    after = torch.tensor([token for ids in DATA for token in [*ids[1:], -1]])
    prefixes = [tuple(ids[: end + 1]) for ids in DATA for end in range(len(ids))]
    new = torch.tensor([prefix not in prefixes[:at] for at, prefix in enumerate(prefixes)])
    assert not new.all()
    found = []
    for module, mine in zip(modules, seen, strict=True):
        coefficients, outputs = (torch.cat(each).detach() for each in zip(*mine, strict=True))
        weight: Tensor = module.weight.detach()  # type: ignore[assignment,operator]
        values = weight if type(module).__name__ == "Conv1D" else weight.T
        first = (values @ head.weight.detach().T).argmax(1)
        largest, place = coefficients.masked_fill(~new[:, None], -torch.inf).max(0)
        trigger = after[place]
        there = (trigger >= 0) & (largest > 0)
        differs = []
        for row, output in zip(coefficients, outputs, strict=True):
            said = int((head.weight.detach() @ output).argmax())
            differs.append(said not in ((row[:, None] * values) @ head.weight.detach().T).argmax(1)[row != 0])
        agreement = (first == trigger)[there].float().mean()
        found.append([float(agreement), float((coefficients > 0).float().mean()), sum(differs) / len(differs)])
    return found, len(after)


@pytest.mark.parametrize("small", [False, True], ids=["one request", "several"])
def test_shares_are_those_of_plain_hooks(
    model: patchwire.Model, reference: PreTrainedModel, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:  # blocks of the vocabulary that do not divide the whole, and data in several requests
        monkeypatch.setattr(vocabulary, "BLOCK", 200)
        monkeypatch.setattr(triggering, "_BATCHES", 2)

    found = methods.key_value_memories(model, iter(DATA), batch_size=4)

    expected, tokens = shares(reference)
    counted = found.values[[methods.SHARES.index(each) for each in ("agreement", "active", "differs")]]
    torch.testing.assert_close(counted.T, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert 0 < float(counted[2].mean()) < 1
    assert found.numbers["tokens"] == tokens
    assert [each.name for each in found.axes] == ["share", "layer"]


def test_agreement_is_that_of_triggers_and_value_projections(model: patchwire.Model) -> None:
    found = methods.key_value_memories(model, DATA, layers=[-1]).at(layer=0)

    triggers = methods.triggers(model, -1, DATA, top=1)
    values = methods.value_projections(model, -1, triggers=triggers)
    on = triggers.coefficients.values[:, 0] > 0
    assert values.agreement is not None
    assert float(found.values[0]) == pytest.approx(float(values.agreement.values[on].nanmean()))
    on &= triggers.following[:, 0] >= 0
    pairs = values.tokens.ids[on, 0][:, None] == triggers.following[on, 0]
    assert float(found.values[1]) == pytest.approx(float(pairs.float().mean()))
    assert float(found.values[2]) == pytest.approx(triggers.statistics.numbers["active"])


def test_all_layers_share_the_passes(model: patchwire.Model) -> None:
    found = methods.key_value_memories(model, DATA, batch_size=10)

    assert found.stats.passes == 3


def test_memories_that_are_none_are_refused(served: Mapping[str, patchwire.Model]) -> None:
    gpt2, mamba = served["gpt2"], served["mamba"]
    with pytest.raises(patchwire.InputError, match="no sum over “scan”"):
        methods.key_value_memories(mamba, DATA, kind="scan")
    with pytest.raises(patchwire.SiteError):
        methods.key_value_memories(gpt2, DATA, kind="ssm")
    with pytest.raises(patchwire.InputError, match="There are no examples"):
        methods.key_value_memories(gpt2, [])
    with pytest.raises(patchwire.InputError, match="There are no layers"):
        methods.key_value_memories(gpt2, DATA, layers=[])
    with pytest.raises(patchwire.InputError, match="at least one text"):
        methods.key_value_memories(gpt2, DATA, batch_size=0)
    with pytest.raises(patchwire.InputError, match="has layers 0 to 2"):
        methods.key_value_memories(gpt2, DATA, layers=[3])


def test_values_of_late_keys_predict_what_follows_and_outputs_are_composed(facts: patchwire.Model) -> None:
    texts = [f"{fact.prompt(template).text} {fact.attribute}" for fact in corpus.facts()[::3] for template in range(3)]
    found = methods.key_value_memories(facts, texts, batch_size=64)
    agreement, chance, active, differs = found.values

    assert float(agreement[-1]) >= 0.04
    assert float(agreement[-1]) >= 4 * float(chance[-1])
    assert 0.1 <= float(active.min()) <= float(active.max()) <= 0.5
    assert float(differs[-1]) >= 2 * float(differs[:3].max())
