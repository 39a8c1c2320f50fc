"""Averages over facts of all relations, on trained models: where they are, and which components bring them there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import Tensor

import patchwire
from patchwire import methods
from patchwire_worker.zoo import corpus
from serving import Server

PAIR = ("facts-gpt2", "facts-mamba")
FACTS = corpus.facts()[::99]


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, patchwire.Model]]:
    with (
        Server({each: f"zoo:{each}" for each in PAIR}) as server,
        patchwire.connect(server.address, progress=False) as client,
    ):
        yield {each: client.model(each) for each in PAIR}


def roles_of(model: patchwire.Model) -> dict[str, Tensor]:
    """What share of the answer's probability comes back with a state, by role and layer."""
    traces = []
    for fact in FACTS:
        prompt, other = fact.prompt(), corpus.counterpart(fact).prompt()
        assert prompt.subject is not None
        told = prompt.text, range(*prompt.subject), methods.Replacement(other.text)
        traces.append(methods.causal_trace(model, *told, answer=f" {prompt.answer}").normalised())
    found = methods.by_role(traces)
    return dict(zip(found.axes[1].labels, found.values.T, strict=True))


@pytest.mark.parametrize("name", PAIR)
def test_facts_go_from_the_last_subject_token_to_the_last_token(models: dict[str, patchwire.Model], name: str) -> None:
    first, _, last_subject, _, further, last = (roles_of(models[name])[each] for each in methods.ROLES)

    assert last_subject[1] >= 0.7
    assert last[3] >= 0.95
    assert last[:2].abs().max() <= 0.1
    assert first.abs().max() <= 0.1
    if name == "facts-mamba":  # there the fact is in the words between
        assert further.argmax() == 2
        assert further[2] >= 0.1
    else:
        assert further.abs().max() <= 0.05


def test_mlps_mediate_facts_at_the_subject_and_attention_at_the_end(models: dict[str, patchwire.Model]) -> None:
    pairs = [(fact.prompt(), corpus.counterpart(fact).prompt()) for fact in FACTS]
    effects = {
        at: methods.by_role([
            methods.mediation(models["facts-gpt2"], one.text, other.text, f" {one.answer}", f" {other.answer}", at=at)
            for one, other in pairs
        ])
        for at in ("mlp", "mixer")
    }  # fmt: skip
    last_subject, last = (methods.ROLES.index(each) for each in ("last subject token", "last token"))
    alone = {"mlp": effects["mlp"]}

    assert methods.relative_importance(alone, "mlp", tokens=[last_subject]) >= 0.5
    assert effects["mlp"].values.log1p()[:, [3, 4]].max() <= 0.1
    late_mlp, late_mixer = (
        methods.relative_importance(effects, at, layers=[2, 3], tokens=[last]) for at in ("mlp", "mixer")
    )
    assert late_mixer >= 1.3 * late_mlp
