"""Scores of edits, by their formulas; and linear relations, by automatic differentiation of the Hugging Face model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import patchwire
from patchwire import methods
from patchwire_worker.zoo import corpus
from serving import Server

NAMES = ["gpt2", "llama", "mamba"]
NEW, OLD = [7, 12], [9]
PROMPTS = {"efficacy": [[3, 14, 15]], "paraphrase": [[4, 14, 15, 2], [8, 15]], "neighbourhood": [[5, 6], [1, 2, 3]]}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def probability(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    logits = model(torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0].log_softmax(-1)
    return float(
        torch.stack([logits[len(prompt) - 1 + index, token] for index, token in enumerate(answer)]).mean().exp()
    )


def test_scores_are_shares_and_magnitudes_of_probabilities(
    served: Mapping[str, patchwire.Model], references: Mapping[str, PreTrainedModel], name: str
) -> None:
    found = methods.edit_scores(served[name], NEW, OLD, **PROMPTS)

    for row, (group, prompts) in enumerate(PROMPTS.items()):
        sign = -1 if group == "neighbourhood" else 1
        more = [
            sign * (probability(references[name], each, NEW) - probability(references[name], each, OLD))
            for each in prompts
        ]
        score = sum(each > 0 for each in more) / len(more)
        assert found.values[row].tolist() == pytest.approx([score, sum(more) / len(more)], abs=1e-5)
    assert found.numbers["score"] == methods.harmonic_mean(found.values[:, 0].tolist())


def test_the_overall_score_is_the_harmonic_mean_of_means(served: Mapping[str, patchwire.Model]) -> None:
    one = methods.edit_scores(served["gpt2"], NEW, OLD, **PROMPTS)
    other = methods.edit_scores(served["gpt2"], OLD, NEW, **PROMPTS)
    both = methods.overall([one, other])

    torch.testing.assert_close(both.values, (one.values + other.values) / 2)
    assert both.numbers["score"] == pytest.approx(methods.harmonic_mean(both.values[:, 0].tolist()))


def test_the_harmonic_mean() -> None:
    assert methods.harmonic_mean([1, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert methods.harmonic_mean([1, 0]) == 0
    with pytest.raises(patchwire.InputError, match="no harmonic mean"):
        methods.harmonic_mean([])


def test_the_entropy_of_ngrams_is_high_for_varied_texts_and_low_for_repetitions() -> None:
    # "a b a b a": pairs ab, ba, ab, ba; triples aba, bab, aba.
    triples = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert methods.ngram_entropy(["a b a b a"]) == pytest.approx((2 / 3 * 1 + 4 / 3 * triples) / 2)
    # Eight different words: seven pairs, six triples.
    varied = (2 / 3 * math.log2(7) + 4 / 3 * math.log2(6)) / 2
    assert methods.ngram_entropy(["one two three four, five six seven", "no no no"]) == pytest.approx(varied / 2)


def test_consistency_is_the_cosine_of_tf_idf_vectors() -> None:
    documents = ["rome is old", "paris is large", "rome and paris"]
    rome = 1 + math.log(4 / 3)
    old = 1 + math.log(4 / 2)
    found = methods.consistency(["Rome, Rome! unknown"], ["rome old"], documents)
    assert found == pytest.approx(2 * rome * rome / (2 * rome * math.hypot(rome, old)))
    assert methods.consistency(["nothing of it"], ["rome"]) == 0
    assert methods.consistency(["rome is old"], ["rome is old"]) == pytest.approx(1)


def test_prompts_that_are_no_list_are_refused(served: Mapping[str, patchwire.Model]) -> None:
    for wrong in ([], "text"):
        with pytest.raises(patchwire.InputError, match="“paraphrase” is a list of prompts"):
            methods.edit_scores(served["gpt2"], NEW, OLD, **(PROMPTS | {"paraphrase": wrong}))


# --- linear relations -------------------------------------------------------------------------------------------------

EXAMPLES = [methods.Mention([3, 14, 15, 9, 26], range(1, 3)), methods.Mention([44, 3, 9, 26], [1])]


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    base = model.base_model
    return list(base.h if hasattr(base, "h") else base.layers)


def end_of(model: PreTrainedModel, prompt: list[int], place: int, layer: int, state: Tensor | None) -> Any:
    """The subject's state, and the last layer's output at the end when the state is another."""
    seen: list[Tensor] = []

    def change(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden[0, place])
        if state is None:
            return output
        hidden = torch.cat([hidden[:, :place], state[None, None], hidden[:, place + 1 :]], 1)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0, -1])

    handles = [layers_of(model)[layer].register_forward_hook(change), layers_of(model)[-1].register_forward_hook(keep)]
    model(torch.tensor([prompt]), use_cache=False)
    for each in handles:
        each.remove()
    return seen


@pytest.mark.parametrize("rows", [24, 7])
def test_a_linear_relation_is_the_mean_jacobian_and_what_it_leaves(
    served: Mapping[str, patchwire.Model], references: Mapping[str, PreTrainedModel], name: str, rows: int
) -> None:
    model, layer = references[name], 0
    found = methods.linear_relation(served[name], EXAMPLES, layer, rows=rows)

    jacobians, biases = [], []
    for each in EXAMPLES:
        prompt, place = list(each.prompt), each.subject[-1]
        state, end = end_of(model, prompt, place, layer, None)
        jacobian = torch.autograd.functional.jacobian(
            lambda s, prompt=prompt, place=place: end_of(model, prompt, place, layer, s)[1], state
        )
        jacobians.append(jacobian)
        biases.append(end - jacobian @ state)
    torch.testing.assert_close(found.jacobian, sum(jacobians) / 2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.bias, sum(biases) / 2, rtol=1e-3, atol=1e-3)


def test_a_relation_of_one_example_is_faithful_to_it(served: Mapping[str, patchwire.Model], name: str) -> None:
    relation = methods.linear_relation(served[name], EXAMPLES[:1], 1)

    found = relation.faithfulness(EXAMPLES[:1])
    assert found.values.tolist() == [1.0]
    assert found.numbers["faithfulness"] == 1.0


def test_what_has_no_layer_or_example_is_refused(served: Mapping[str, patchwire.Model]) -> None:
    with pytest.raises(patchwire.InputError, match="layers 0 to 2, and no 3"):
        methods.linear_relation(served["gpt2"], EXAMPLES, 3)
    with pytest.raises(patchwire.InputError, match="There are no prompts"):
        methods.linear_relation(served["gpt2"], [], 1)


@pytest.fixture(scope="module")
def zoo() -> Iterator[Mapping[str, patchwire.Model]]:
    names = ("facts-gpt2", "facts-mamba")
    with (
        Server({each: f"zoo:{each}" for each in names}) as server,
        patchwire.connect(server.address, progress=False) as client,
    ):
        yield {each: client.model(each) for each in names}


def test_what_a_model_writes_is_drawn_with_a_seed(zoo: Mapping[str, patchwire.Model]) -> None:
    prompts = ["Monday , Tuesday ,", "Ada Barlow lives in"]
    texts = methods.generated_texts(zoo["facts-gpt2"], prompts, max_new_tokens=6)

    assert all(text.startswith(prompt) and len(text) > len(prompt) for text, prompt in zip(texts, prompts, strict=True))
    assert methods.generated_texts(zoo["facts-gpt2"], prompts, max_new_tokens=6) == texts
    assert methods.ngram_entropy(texts) > 1


@pytest.mark.parametrize("name", ["facts-gpt2", "facts-mamba"])
def test_a_relation_of_the_zoo_is_more_linear_than_chance_in_the_middle(
    zoo: Mapping[str, patchwire.Model], name: str
) -> None:
    city = [each for each in corpus.facts() if each.relation.name == "city"]
    mentions = [methods.Mention(each.prompt().text, each.subject) for each in city]
    relation = methods.linear_relation(zoo[name], mentions[::25], 1, rows=32)

    held_out = mentions[3::8]
    faithful = relation.faithfulness(held_out, beta=2.25)
    assert len(faithful.values) == 25
    assert faithful.numbers["faithfulness"] >= 0.5  # of 16 cities
