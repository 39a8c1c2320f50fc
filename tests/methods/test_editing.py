"""Rank-one editing: every step against plain PyTorch on the Hugging Face module; on the zoo what the papers claim."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

PROMPT = [3, 14, 15, 9, 26, 5]
SUBJECT = range(1, 3)
PREFIXES = [[7, 8], [50, 41, 32, 1]]
ESSENCE = methods.Mention([3, 14, 15, 30], SUBJECT)
TARGET = [7, 12]
LAYER = 1
DATA = [tiny.prompt(3 + index % 12, seed=index) for index in range(60)]
CASES = [("gpt2", "mlp"), ("llama", "mlp"), ("mamba", "ssm_out"), ("mamba", "ssm_in"), ("mamba", "ssm_gate")]


@dataclass
class Reference:
    """A projection of a Hugging Face model."""

    model: PreTrainedModel
    module: nn.Module
    transposed: bool
    """Whether the weight is `[d_key, d_value]`."""
    part: slice
    """Which of its outputs are the projection's."""

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight if self.transposed else self.module.weight.T
        return weight[:, self.part]

    def run(self, ids: list[int], delta: Tensor | None = None, place: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """The keys, values and logits of one prompt, with something added to the value at a token."""
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen.extend((args[0][0], output[0, :, self.part]))
            if delta is not None:
                output = output.clone()
                output[:, place, self.part] += delta
            return output

        handle = self.module.register_forward_hook(hook)
        try:
            logits = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        finally:
            handle.remove()
        return seen[0], seen[1], logits

    def moment(self) -> Tensor:
        keys = torch.cat([self.run(ids)[0] for ids in DATA]).double()
        return keys.T @ keys / len(keys)

    def value(self) -> Tensor:
        return self.run(PROMPT)[1][SUBJECT[-1]]

    def delta(
        self, steps: int, lr: float, kl_factor: float, weight_decay: float, clamp: float, enough: float = 0.0
    ) -> Any:
        """The search for v*, as the paper's authors wrote it."""
        place = SUBJECT[-1]
        value = self.value()
        usual = self.run(list(ESSENCE.prompt))[2][-1].log_softmax(-1)
        delta = torch.zeros_like(value, requires_grad=True)
        optimiser = torch.optim.Adam([delta], lr=lr)
        losses = []
        for step in range(steps):
            nll = []
            for prefix in ([], *PREFIXES):
                ids = [*prefix, *PROMPT, *TARGET[:-1]]
                said = self.run(ids, delta, place + len(prefix))[2].log_softmax(-1)
                nll += [-said[len(prefix) + len(PROMPT) - 1 + index, token] for index, token in enumerate(TARGET)]
            now = self.run(list(ESSENCE.prompt), delta, place)[2][-1].log_softmax(-1)
            kl = nn.functional.kl_div(usual, now, log_target=True, reduction="sum")
            loss = torch.stack(nll).mean() + kl_factor * kl + weight_decay * delta.norm() / value.norm() ** 2
            losses.append(loss.detach())
            if loss < enough or step == steps - 1:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                if delta.norm() > clamp * value.norm():
                    delta *= clamp * value.norm() / delta.norm()
        return delta.detach(), value, losses


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def model(served: Mapping[str, patchwire.Model], case: tuple[str, str]) -> patchwire.Model:
    return served[case[0]]


@pytest.fixture
def reference(references: Mapping[str, PreTrainedModel], case: tuple[str, str]) -> Reference:
    name, projection = case
    module = references[name]
    base = module.base_model
    layer = (base.h if hasattr(base, "h") else base.layers)[LAYER]
    if name == "gpt2":
        return Reference(module, layer.mlp.c_proj, True, slice(None))
    if name == "llama":
        return Reference(module, layer.mlp.down_proj, False, slice(None))
    half = layer.mixer.intermediate_size
    linear = layer.mixer.out_proj if projection == "ssm_out" else layer.mixer.in_proj
    return Reference(
        module, linear, False, {"ssm_in": slice(0, half), "ssm_gate": slice(half, None)}.get(projection, slice(None))
    )


@pytest.mark.parametrize("keep", [None, 60.0])
def test_the_second_moment_is_that_of_all_tokens(
    model: patchwire.Model, reference: Reference, case: tuple[str, str], keep: float | None
) -> None:
    found = methods.second_moment(model, LAYER, DATA, projection=case[1], batch_size=7, keep=keep)
    matrix = found.matrix
    if not isinstance(matrix, Tensor):
        with model.session(), model.trace(PROMPT):
            back = (found.matrix * 1.0).save()
        matrix.forget()
        matrix = back.value

    assert found.count == sum(map(len, DATA))
    torch.testing.assert_close(matrix, reference.moment(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("end", ["of steps", "of room", "as it is enough"])
def test_each_step_gives_what_pytorch_gives(
    model: patchwire.Model, reference: Reference, case: tuple[str, str], end: str
) -> None:
    moment = methods.SecondMoment(LAYER, case[1], reference.moment(), sum(map(len, DATA)))
    told: dict[str, Any] = {"steps": 8, "lr": 0.1, "kl_factor": 5.0, "weight_decay": 0.7, "clamp": 4.0}
    if end == "of room":
        told["clamp"] = 0.5 * float(torch.linalg.vector_norm(reference.delta(**told)[0]) / reference.value().norm())
    enough = 0.0
    if end == "as it is enough":
        told["weight_decay"] = 0.0  # with which the loss falls from the first step on
        enough = float(reference.delta(**told)[2][4]) + 1e-3
    found = methods.rank_one_edit(
        model, PROMPT, SUBJECT, TARGET, moment, prefixes=PREFIXES, essence=[ESSENCE], enough_loss=enough, **told
    )

    place = SUBJECT[-1]
    key = torch.stack([reference.run([*each, *PROMPT])[0][len(each) + place] for each in ([], *PREFIXES)]).mean(0)
    direction = torch.linalg.solve(reference.moment(), key.double())
    direction = (direction / direction.norm()).float()
    delta, value, losses = reference.delta(enough=enough, **told)
    if end == "of room":
        assert float(delta.norm() / value.norm()) == pytest.approx(told["clamp"], rel=1e-4)
    assert float(found.losses.values[-1, 2]) > 2e-4  # the divergence counts
    assert len(losses) == (5 if end == "as it is enough" else 8)
    own = reference.run(PROMPT)[0][place]
    close: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.key, key, **close)
    torch.testing.assert_close(found.direction, direction, **close)
    torch.testing.assert_close(found.losses.values[: len(losses), 0], torch.stack(losses), **close)
    torch.testing.assert_close(found.value, value + delta, **close)
    torch.testing.assert_close(found.update, delta / (own @ direction), **close)


def test_the_edited_model_is_one_whose_weight_is_edited_and_the_others_stay(
    model: patchwire.Model, reference: Reference, case: tuple[str, str]
) -> None:
    def logits(model: patchwire.Model) -> Tensor:
        with model.trace(PROMPT):
            found = model.logits.save()
        return found.value

    before = logits(model)
    generator = torch.Generator().manual_seed(0)
    direction, update = (torch.randn(size, generator=generator) / 8 for size in reference.weight.shape)
    edited = methods.with_update(model, LAYER, direction, update, projection=case[1])
    found = logits(edited)

    weight = reference.weight
    was = weight.clone()
    with torch.no_grad():
        weight += torch.outer(direction, update)
        expected = reference.run(PROMPT)[2]
        weight.copy_(was)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 0.01
    assert torch.equal(logits(model), before)


def test_the_last_layer_is_edited_only_where_it_looks_back(
    model: patchwire.Model, reference: Reference, case: tuple[str, str]
) -> None:
    moment = methods.second_moment(model, tiny.LAYERS - 1, DATA, projection=case[1])
    found = methods.rank_one_edit(model, PROMPT, SUBJECT, TARGET, moment, essence=[], steps=3)

    assert bool(found.update.any()) == (case[1] == "ssm_in")  # what the scan reads; all else is of one token


TOLD: dict[str, Any] = {"kl_factor": 1.0, "lr": 0.1, "steps": 40, "weight_decay": 0.0, "enough_loss": 0.1}


@pytest.fixture(scope="module")
def zoo() -> Iterator[Server]:
    with Server({name: f"zoo:{name}" for name in ("facts-gpt2", "facts-mamba")}) as server:
        yield server


@pytest.fixture(scope="module", params=[("facts-gpt2", "mlp"), ("facts-mamba", "ssm_out")], ids="-".join)
def facts(zoo: Server, request: pytest.FixtureRequest) -> Iterator[tuple[patchwire.Model, methods.SecondMoment]]:
    """A model of the zoo, and its second moment of the layer that its facts are in, kept on the server."""
    name, projection = request.param
    with patchwire.connect(zoo.address, progress=False) as client:
        model = client.model(name)
        texts = [fact.prompt(index % 3).text for index, fact in enumerate(corpus.facts())]
        texts += [each.text for each in corpus.ioi(60) + corpus.induction(60)]
        yield model, methods.second_moment(model, 1, texts, projection=projection, batch_size=64, keep=600)


def edit_of(model: patchwire.Model, moment: methods.SecondMoment, fact: corpus.Fact, said: str) -> methods.RankOneEdit:
    others = [each for each in corpus.facts() if each.subject == fact.subject and each.relation is not fact.relation]
    essence = [methods.Mention(each.prompt(index).text, each.subject) for each in others for index in range(3)]
    return methods.rank_one_edit(model, fact.prompt().text, fact.subject, f" {said}", moment, essence=essence, **TOLD)


def words_after(model: patchwire.Model, prompts: Sequence[str]) -> list[str]:
    with model.trace(list(prompts)):
        said = model.logits[:, -1].argmax(-1).save()
    return [model.tokenizer.decode([each]).strip() for each in said.value.tolist()]


def test_facts_are_changed_in_every_wording_and_others_stay(
    facts: tuple[patchwire.Model, methods.SecondMoment],
) -> None:
    model, moment = facts
    scores, kept = [], []
    for fact in corpus.facts()[5:800:161]:
        said = corpus.counterpart(fact).attribute
        edited = edit_of(model, moment, fact, said).model
        alike = [each for each in corpus.facts() if (each.relation, each.attribute) == (fact.relation, fact.attribute)]
        scores.append(
            methods.edit_scores(
                edited,
                f" {said}",
                f" {fact.attribute}",
                efficacy=[fact.prompt().text],
                paraphrase=[fact.prompt(index).text for index in (1, 2)],
                neighbourhood=[each.prompt().text for each in alike if each is not fact],
            )
        )
        others = [
            each for each in corpus.facts() if each.subject == fact.subject and each.relation is not fact.relation
        ]
        prompts = [each.prompt(index) for each in others for index in range(3)]
        words = words_after(edited, [each.text for each in prompts])
        kept += [word == each.answer for word, each in zip(words, prompts, strict=True)]

    efficacy, paraphrase, neighbourhood = methods.overall(scores).at(measure=0).values.tolist()
    assert efficacy == 1.0
    assert min(paraphrase, neighbourhood) >= 0.9
    assert sum(kept) / len(kept) >= 0.95
    assert methods.overall(scores).numbers["score"] >= 0.93


def test_an_edit_is_its_owners_alone_and_is_reverted_to_the_last_bit(
    facts: tuple[patchwire.Model, methods.SecondMoment], zoo: Server
) -> None:
    model, moment = facts
    fact = corpus.facts()[5]

    def logits(model: patchwire.Model) -> Tensor:
        with model.trace(fact.prompt().text):
            found = model.logits.save()
            weight = methods.PROJECTIONS[moment.projection].weight(model.layers[1]).save()
        return torch.cat([found.value.flatten(), weight.value.flatten()])

    before = logits(model)
    edit = edit_of(model, moment, fact, corpus.counterpart(fact).attribute)
    with patchwire.connect(zoo.address, progress=False) as other:
        changed, others = logits(edit.model), logits(other.model(model.name))

    assert not torch.equal(changed, before)
    assert torch.equal(others, before)
    assert torch.equal(logits(edit.original), before)


def test_edits_add_up(facts: tuple[patchwire.Model, methods.SecondMoment]) -> None:
    model, moment = facts
    edited, said, changed = model, [], corpus.facts()[5:800:265]
    for fact in changed:
        said.append(corpus.counterpart(fact).attribute)
        edited = edit_of(edited, moment, fact, said[-1]).model

    assert words_after(edited, [each.prompt(1).text for each in changed]) == said


def test_prefixes_by_the_model_itself_may_stand_before_the_prompt(
    facts: tuple[patchwire.Model, methods.SecondMoment],
) -> None:
    model, moment = facts
    fact = corpus.facts()[9]
    said = corpus.counterpart(fact).attribute
    edit = methods.rank_one_edit(
        model, fact.prompt().text, fact.subject, f" {said}", moment,
        prefixes=methods.sampled_prefixes(model, "Monday ,", lengths={2: 2, 4: 1}, end=" . "), **TOLD,
    )  # fmt: skip

    assert words_after(edit.model, [fact.prompt().text]) == [said]
    assert edit.losses.at(part=0, step=-1).values < edit.losses.at(part=0, step=0).values


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": "a"}, "is not how"),
        ({"target": []}, "is not how token ids go on"),
        ({"subject": range(5, 9)}, "none at 8"),
        ({"steps": 0}, "at least one step"),
        ({"moment": methods.SecondMoment(9, "mlp", torch.eye(2), 1)}, "layers 0 to 2"),
        ({"moment": methods.SecondMoment(1, "attn", torch.eye(2), 1)}, "no projection “attn”"),
    ],
)
def test_what_cannot_be_edited_is_refused(
    served: Mapping[str, patchwire.Model], change: dict[str, Any], words: str
) -> None:
    told: dict[str, Any] = {"prompt": PROMPT, "subject": SUBJECT, "target": TARGET}
    told["moment"] = methods.SecondMoment(1, "mlp", torch.eye(96), 1)
    with pytest.raises(patchwire.InputError, match=words):
        methods.rank_one_edit(served["gpt2"], **(told | change))
