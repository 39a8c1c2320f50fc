"""Patching on trained models: facts are in the subject early and at the last token late; estimates find that, too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import patchwire
from patchwire import methods
from patchwire_worker.zoo import corpus
from serving import Server

PAIR = ("facts-gpt2", "facts-mamba")
FACTS = corpus.facts()[::41]


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, patchwire.Model]]:
    with (
        Server({each: f"zoo:{each}" for each in PAIR}) as server,
        patchwire.connect(server.address, progress=False) as client,
    ):
        yield {each: client.model(each) for each in PAIR}


@pytest.fixture(params=PAIR)
def model(models: dict[str, patchwire.Model], request: pytest.FixtureRequest) -> patchwire.Model:
    return models[request.param]


def arguments(model: patchwire.Model, fact: corpus.Fact) -> tuple[str, str, methods.Metric]:
    """The fact, the same words about somebody else, and the difference of their answers' logits."""
    clean, corrupt = fact.prompt(), corpus.counterpart(fact).prompt()
    answer, foil = (model.tokenizer.encode(each.answer)[0] for each in (clean, corrupt))
    return clean.text, corrupt.text, methods.LogitDifference(answer, foil)


def parts(values: Tensor, fact: corpus.Fact) -> Tensor:
    """At the subject's last token, the largest at the words between, and at the last token: `[layers, 3]`."""
    subject = fact.prompt().subject
    assert subject is not None
    between = values[:, subject[1] : -1].abs().amax(1)
    return torch.stack([values[:, subject[1] - 1], between, values[:, -1]], 1)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_facts_are_in_the_subject_early_and_at_the_last_token_late(model: patchwire.Model, direction: Any) -> None:
    found = [methods.activation_patching(model, *arguments(model, each), direction=direction) for each in FACTS]
    shares = torch.stack([parts(each.normalised().values, fact) for each, fact in zip(found, FACTS, strict=True)])
    subject, between, last = shares.mean(0).unbind(1)

    assert subject[1] > 0.7
    assert subject[-1] == pytest.approx(0, abs=1e-4)
    assert between[:2].max() < 0.2
    assert last[:2].max() < 0.1
    assert last[-1] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_gradients_between_the_runs_estimate_better_than_those_at_one(model: patchwire.Model, direction: Any) -> None:
    agreements = []
    for fact in FACTS:
        given = arguments(model, fact)
        exact = methods.activation_patching(model, *given, direction=direction)
        estimates = [
            estimate(model, *given, direction=direction)
            for estimate in (methods.attribution_patching, methods.integrated_gradients)
        ]
        agreements.append([methods.agreement(each, exact) for each in estimates])
    one, between = torch.tensor([[each.pearson for each in both] for both in agreements]).mean(0)
    signs = torch.tensor([both[1].sign_of_large for both in agreements])

    assert between > 0.95
    assert between > one + 0.03
    assert signs.mean() > 0.9


@pytest.mark.parametrize(
    ("name", "severed", "left"),
    [("facts-gpt2", "mlp", 0.35), ("facts-gpt2", "mixer", 0.75), ("facts-mamba", "scan", 0.6)],
)
def test_what_is_restored_early_goes_through_what_comes_after_it_at_the_subject(
    models: dict[str, patchwire.Model], name: str, severed: str, left: float
) -> None:
    model = models[name]
    shares = []
    for fact in FACTS:
        clean, corrupt = fact.prompt(), corpus.counterpart(fact).prompt()
        answer = model.tokenizer.encode(clean.answer)[0]
        assert clean.subject is not None
        both = [
            methods.causal_trace(
                model, clean.text, range(*clean.subject), methods.Replacement(corrupt.text), answer=answer, severed=path
            )
            for path in (None, severed)
        ]
        shares.append(torch.stack([parts(each.normalised().values, fact)[:, 0] for each in both]))
    free, blocked = torch.stack(shares).mean(0)

    assert free[0] > 0.4
    assert blocked[0] < left * free[0]
    assert blocked[2] == pytest.approx(float(free[2]), abs=0.05)  # by then it has all been used


def test_heads_for_indirect_objects_are_found_by_gradients_between_the_runs(models: dict[str, patchwire.Model]) -> None:
    """The names are swapped, and every head is patched at all tokens; what is compared is the mean effect of each."""
    model = models["facts-gpt2"]
    effects = []
    for prompt in corpus.ioi(8):
        swapped = {prompt.answer: prompt.foil, prompt.foil: prompt.answer}
        corrupt = " ".join(swapped.get(word, word) for word in prompt.words)
        answer, foil = (model.tokenizer.encode(each)[0] for each in (prompt.answer, prompt.foil))
        given = (model, prompt.text, corrupt, methods.LogitDifference(answer, foil))
        ways = (methods.activation_patching, methods.attribution_patching, methods.integrated_gradients)
        found = [way(*given, at="attn.z", over=("layer", "head")).effect().values.double().flatten() for way in ways]
        effects.append(torch.stack(found))
    exact, one, between = torch.stack(effects).mean(0)
    large = exact.abs() > 0.05 * exact.abs().max()

    correlations = torch.corrcoef(torch.stack([exact, one, between]))[0]
    assert correlations[2] > 0.98
    assert correlations[2] > correlations[1]
    assert large.sum() >= 4
    assert torch.equal(between[large].sign(), exact[large].sign())
