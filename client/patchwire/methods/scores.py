"""Scores of edits: is the new fact said, also in other words, do the neighbours stay, and does the text stay fluent?

Meng, Bau, Andonian and Belinkov (2022), "Locating and Editing Factual Associations in GPT", section 3.4, table 4 and
appendix D: efficacy, paraphrase and neighbourhood scores and magnitudes, their harmonic mean, n-gram entropy (GE) and
consistency with reference texts (RS).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from patchwire.errors import InputError, here
from patchwire.methods.editing import target_ids
from patchwire.methods.prompts import prompt_of
from patchwire.methods.result import Axis, Origin, Result
from patchwire.model import Model
from patchwire.results import Stats

_GROUPS = ("efficacy", "paraphrase", "neighbourhood")


def edit_scores(
    model: Model,
    target: str | int | Sequence[int],
    true: str | int | Sequence[int],
    *,
    efficacy: Sequence[Any],
    paraphrase: Sequence[Any],
    neighbourhood: Sequence[Any],
) -> Result:
    """What an edited model says after the edited prompt, after paraphrases, and after prompts about neighbours.

    The score of the first two is the share of prompts with P(target) > P(true), that of the neighbourhood the share
    with P(true) > P(target); the magnitude is the mean of the difference. P of several tokens is `exp` of their mean
    log probability, as in the authors' code. One request; only the probabilities come back.

    Args:
        model: The edited model; of the unedited one it says where one starts from.
        target: What it is to say now: a text with which the prompts go on, or token ids.
        true: What it said before, and what is true of the neighbours.
        efficacy: The prompts that were edited: texts, or token ids.
        paraphrase: The same in other words.
        neighbourhood: Prompts about other subjects of which `true` holds.

    Returns:
        `[group, measure]`, "score" and "magnitude"; `numbers["score"]` is the harmonic mean of the three scores.

    Raises:
        InputError: there are no prompts of a kind, or they do not go on like that.

    Example:
        >>> scores = edit_scores(edit.model, " Rome", " Paris", efficacy=[prompt], paraphrase=others,
        ...                      neighbourhood=["The Louvre is in"])
    """
    groups = dict(zip(_GROUPS, (efficacy, paraphrase, neighbourhood), strict=True))
    for name, prompts in groups.items():
        if isinstance(prompts, str) or not len(prompts):
            raise InputError(f"“{name}” is a list of prompts, not {prompts!r}.", lines=here())
    found: dict[str, list[Any]] = {name: [] for name in groups}
    with model.trace() as trace:
        for name, prompts in groups.items():
            for each in prompts:
                prompt = prompt_of(model, each)
                for answer in (target, true):
                    ids = target_ids(model, prompt, answer)
                    with trace.invoke([[*prompt.ids, *ids[:-1]]]):
                        said = model.logits[0, -len(ids) :].float().log_softmax(-1)
                        known: Any = sum(said[index, token] for index, token in enumerate(ids))
                        found[name].append((known / len(ids)).exp().save())
    values = []
    for name, probabilities in found.items():
        new, old = torch.stack([each.value for each in probabilities]).view(-1, 2).unbind(1)
        more = old - new if name == "neighbourhood" else new - old
        values.append([(more > 0).float().mean(), more.mean()])
    table = torch.tensor(values)
    return Result(
        values=table,
        axes=(Axis("prompts", _GROUPS), Axis("measure", ("score", "magnitude"))),
        unit="share, and difference of probabilities",
        origin=Origin.of("edit_scores", model, target=target, true=true, **groups),
        numbers={"score": harmonic_mean(table[:, 0].tolist())},
        signed=True,
        stats=trace.stats or Stats(),
    )


def overall(scores: Sequence[Result]) -> Result:
    """The mean of the scores of several edits; `numbers["score"]` is the harmonic mean of the mean scores, S.

    Raises:
        InputError: there are none.
    """
    if not scores:
        raise InputError("There are no scores.", lines=here())
    first = scores[0]
    table = torch.stack([each.values for each in scores]).mean(0)
    number = {"score": harmonic_mean(table[:, 0].tolist())}
    cost = Stats.sum([each.stats for each in scores])
    return Result(table, first.axes, first.unit, first.origin, number, signed=True, stats=cost)


def harmonic_mean(values: Sequence[float]) -> float:
    """n / Σ 1/x; 0 if one of them is 0.

    Raises:
        InputError: there are none, or one is negative.
    """
    if not values or min(values) < 0:
        raise InputError(f"{list(values)} have no harmonic mean.", lines=here())
    return 0.0 if min(values) == 0 else len(values) / sum(1 / each for each in values)


def ngram_entropy(texts: Sequence[str]) -> float:
    """How varied texts are, in bits: the mean over texts of (2/3 H₂ + 4/3 H₃) / 2, where Hₙ is the entropy of a text's
    n-grams of words (GE in Meng et al. 2022; low for a text that repeats itself). A text of fewer words has Hₙ = 0.

    Raises:
        InputError: there are no texts.
    """
    if isinstance(texts, str) or not texts:
        raise InputError("Give a list of texts.", lines=here())
    found = []
    for text in texts:
        words = re.findall(r"\w+|[^\w\s]", text)
        pairs = Counter(pairwise(words))
        triples = Counter(zip(words, words[1:], words[2:], strict=False))
        found.append((2 / 3 * _entropy(pairs) + 4 / 3 * _entropy(triples)) / 2)
    return sum(found) / len(found)


def consistency(texts: Sequence[str], references: Sequence[str], documents: Sequence[str] = ()) -> float:
    """How much texts are about what reference texts are about: the cosine of their tf-idf vectors (RS).

    Words are those of two letters or more, in lower case; a word's weight is `1 + ln((1 + n) / (1 + df))`, where df of
    n documents have it. Words of no document do not count.

    Args:
        texts: What was generated; taken together.
        references: About what it should be; taken together.
        documents: Where words are counted; the references if left out.

    Raises:
        InputError: there are no texts, or no references.
    """
    if isinstance(texts, str) or isinstance(references, str) or not texts or not references:
        raise InputError("Give a list of texts, and a list of references.", lines=here())
    counted = [set(_words(each)) for each in documents or references]
    often = Counter(word for each in counted for word in each)
    weights = {word: 1 + math.log((1 + len(counted)) / (1 + count)) for word, count in often.items()}
    one, other = (
        {word: count * weights[word] for word, count in Counter(_words(" ".join(part))).items() if word in weights}
        for part in (texts, references)
    )
    lengths = math.hypot(*one.values()) * math.hypot(*other.values())
    return sum(value * other.get(word, 0.0) for word, value in one.items()) / lengths if lengths else 0.0


def generated_texts(
    model: Model, prompts: Sequence[str], *, max_new_tokens: int = 100, top_k: int = 5, seed: int = 0
) -> list[str]:
    """What a model writes after prompts, with them: for `ngram_entropy` and `consistency`.

    Args:
        model: A model with a tokenizer, edited or not.
        prompts: Texts.
        max_new_tokens: How many tokens at most.
        top_k: Tokens are drawn from so many of the likeliest, as the authors do.
        seed: Another one gives others.

    Example:
        >>> ngram_entropy(generated_texts(edit.model, ["The Eiffel Tower is a place where"]))
    """
    gen: Any = model.generate(max_new_tokens=max_new_tokens, do_sample=True, top_k=top_k, seed=seed)
    rows = [prompt_of(model, each) for each in prompts]
    outputs = []
    with gen:
        for each in rows:
            with gen.invoke(each.rows):
                outputs.append(gen.output.save())
    return [
        prompt + model.tokenizer.decode(ids.value[0, len(row) :].tolist())
        for prompt, row, ids in zip(prompts, rows, outputs, strict=True)
    ]


def _entropy(counts: Mapping[Any, int]) -> float:
    """In bits."""
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values())


def _words(text: str) -> list[str]:
    return re.findall(r"\b\w\w+\b", text.lower())
