"""Enrichment: how many attributes of a subject its representation promotes, and which sublayers put them there.

Geva, Bastings, Filippova and Globerson (2023), "Dissecting Recall of Factual Associations in Auto-Regressive Language
Models", section 5. A state is read in the vocabulary, and the share of what it promotes is counted that a text about
the subject contains.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from patchwire.errors import InputError, here
from patchwire.methods.measured import LAYER
from patchwire.methods.prompts import Prompt, prompt_of, span, words_of
from patchwire.methods.result import Axis, Origin, Result, layers_axis
from patchwire.methods.stopwords import STOPWORDS
from patchwire.methods.sweeping import sweep
from patchwire.model import Model, Module
from patchwire.results import Stats
from patchwire.tracing import Trace

_UNIT = "attributes rate"


def _without_mlp(layer: Module, tokens: int) -> None:
    layer.mlp.output[:] = 0


def _without_neurons(layer: Module, tokens: int) -> None:
    layer.mlp.neurons[:] = 0


def _without_mixer(layer: Module, tokens: int) -> None:
    layer.mixer.output[:] = 0


def _uniformly(layer: Module, tokens: int) -> None:
    seen = torch.ones(tokens, tokens).tril()
    layer.mixer.pattern[:] = seen / seen.sum(-1, keepdim=True)


KNOCKOUTS: Mapping[str, Callable[[Module, int], None]] = {
    "mlp": _without_mlp,
    "neurons": _without_neurons,
    "mixer": _without_mixer,
    "uniform": _uniformly,
}
"""What is knocked out of a layer, by name: the MLP's output; its neurons, so that its bias is left, as in the authors'
code; the output of attention or the SSM; or what attention looks at, so that every token sees all that it may see
alike: what their code does, since it masks every edge."""


def attributes_rate(
    model: Model,
    prompt: Any,
    subject: str | Sequence[int],
    attributes: str | Sequence[int],
    *,
    position: int | None = None,
    top: int = 50,
    among: int = 500,
    stopwords: Collection[str] = STOPWORDS,
) -> Result:
    """After each layer, the share of the tokens that a state promotes that belong to the subject (Geva et al. 2023,
    section 5.1).

    The state is multiplied with the unembedding, without the last norm. Of the `among` tokens with the highest scores
    those are dropped that are stop-words or have two letters or less, and of the first `top` of the others it is
    counted how many are attributes. Only token ids come back.

    Args:
        model: Any model with `layers` and an unembedding: attention or SSM alike.
        prompt: One prompt: a text, or token ids.
        subject: Its subject: words that stand in it once, or the positions of their tokens.
        attributes: What belongs to the subject: a text about it, whose tokens all count, or token ids.
        position: Whose state; the subject's last token if left out.
        top: How many tokens are counted.
        among: How many are looked at.
        stopwords: Words in lower case that do not count.

    Returns:
        `[layers]` float32, from 0 to 1; NaN where no token is left that could count.

    Raises:
        InputError: the subject is not in the prompt, there is no such position, or there are no attributes.

    Example:
        >>> about = "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France."
        >>> attributes_rate(model, "The Eiffel Tower is in", "The Eiffel Tower", about).plot()
    """
    given, read, wanted = _asked(model, prompt, subject, attributes, position, top, among)
    with model.trace(given.rows) as trace:
        found = [_promoted(model, layer.output[0, read], among).save() for layer in model.layers]
    ids = torch.stack([each.value for each in found])
    return Result(
        values=_shares(model, ids, wanted, top, stopwords),
        axes=(layers_axis(model),),
        unit=_UNIT,
        origin=Origin.of(
            "attributes_rate", model, prompt=prompt, attributes=attributes, position=read, top=top, among=among
        ),
        stats=trace.stats or Stats(),
    )


def sublayer_knockout(
    model: Model,
    prompt: Any,
    subject: str | Sequence[int],
    attributes: str | Sequence[int],
    *,
    knockouts: Sequence[str] = ("mlp", "mixer"),
    block: int = 10,
    layer: int = -1,
    position: int | None = None,
    top: int = 50,
    among: int = 500,
    stopwords: Collection[str] = STOPWORDS,
) -> Result:
    """The attributes rate after one layer without the MLPs, or without attention, of a block of layers before it (Geva
    et al. 2023, section 5.2). They are knocked out at all tokens.

    Args:
        model: Any model that has what is knocked out.
        prompt: As for `attributes_rate`, like `subject`, `attributes`, `position`, `top`, `among` and `stopwords`.
        subject: Its subject.
        attributes: What belongs to the subject.
        knockouts: What is knocked out, one after the other: names of `patchwire.methods.enrichment.KNOCKOUTS`, "mlp",
            "neurons", "mixer" and "uniform".
        block: Of how many layers; the authors name 10, and their code takes 11.
        layer: After which layer the rate is measured; the authors take 40 of 48.
        position: Whose state.
        top: How many tokens are counted.
        among: How many are looked at.
        stopwords: Words that do not count.

    Returns:
        `[knockouts, layers]` float32, by the first layer of each block, up to the one after which is measured, where
        blocks end; `numbers["base"]` is the rate without a knockout.

    Raises:
        InputError: as `attributes_rate`; or there is no such knockout or layer.
        SiteError: the model has nothing of that kind: a Mamba has no MLPs, and no patterns that could be written.

    Example:
        >>> found = sublayer_knockout(model, "The Eiffel Tower is in", "The Eiffel Tower", about, layer=40)
        >>> found.at(knockout=0).values - found.numbers["base"]
    """
    given, read, wanted = _asked(model, prompt, subject, attributes, position, top, among)
    for each in knockouts:
        if each not in KNOCKOUTS:
            raise InputError(f"There is no knockout “{each}”; there are {', '.join(KNOCKOUTS)}.", lines=here())
    if block < 1 or not -model.num_layers <= layer < model.num_layers:
        raise InputError(
            f"There is no block of {block} layers up to layer {layer}: the model has layers 0 to "
            f"{model.num_layers - 1}.",
            lines=here(),
        )
    layer %= model.num_layers

    def before(trace: Trace) -> Any:
        with trace.invoke(given.rows):
            return _promoted(model, model.layers[layer].output[0, read], among).save()

    def measure(trace: Trace, _: Any, cell: tuple[str, int]) -> Any:
        name, first = cell
        with trace.invoke(given.rows):
            for each in range(first, min(first + block, layer + 1)):
                KNOCKOUTS[name](model.layers[each], len(given))
            return _promoted(model, model.layers[layer].output[0, read], among)

    cells = [(name, first) for name in knockouts for first in range(layer + 1)]
    ids, runs, stats = sweep(model, cells, len(given), before, measure, what="knockouts")
    return Result(
        values=_shares(model, ids, wanted, top, stopwords).view(len(knockouts), -1),
        axes=(Axis("knockout", tuple(knockouts)), Axis(LAYER, tuple(map(str, range(layer + 1))))),
        unit=_UNIT,
        origin=Origin.of(
            "sublayer_knockout",
            model,
            prompt=prompt,
            attributes=attributes,
            block=block,
            layer=layer,
            position=read,
            top=top,
            among=among,
        ),
        numbers={"base": float(_shares(model, runs[0].value[None], wanted, top, stopwords))},
        stats=stats,
    )


def _asked(
    model: Model,
    prompt: Any,
    subject: str | Sequence[int],
    attributes: str | Sequence[int],
    position: int | None,
    top: int,
    among: int,
) -> tuple[Prompt, int, frozenset[int]]:
    """The prompt, the position whose state is read, and the tokens that are looked for."""
    given = prompt_of(model, prompt)
    last = span(given, subject if isinstance(subject, str) else list(subject))[-1]
    read = last if position is None else position
    if not -len(given) <= read < len(given):
        raise InputError(f"The prompt has {len(given)} tokens, and none at {read}.", lines=here())
    wanted = frozenset(_tokens_of(model, attributes) if isinstance(attributes, str) else attributes)
    if not wanted:
        raise InputError("There are no attributes.", hint="Give a text about the subject.", lines=here())
    if not 1 <= top <= among:
        raise InputError(f"The first {top} of {among} tokens cannot be counted.", lines=here())
    return given, read % len(given), wanted


def _tokens_of(model: Model, text: str) -> set[int]:
    """The tokens of a text, without those that every text begins or ends with: these say nothing of a subject."""
    return set(model.tokenizer.encode(text)).difference(model.tokenizer.encode(""))


def _promoted(model: Model, state: Any, among: int) -> Any:
    """The tokens with the highest scores, best first: `[among]`."""
    scores: Any = state @ model.W_U
    return scores.float().topk(min(among, scores.shape[-1]))[1]


def _shares(model: Model, ids: Tensor, wanted: Collection[int], top: int, stopwords: Collection[str]) -> Tensor:
    """The share of each row, `[rows, among]`."""
    named = model.tokenizer.backend is not None
    shares = []
    for row in ids.tolist():
        words = [each.strip() for each in words_of(model, row)]
        left = [
            token
            for token, word in zip(row, words, strict=True)
            if not named or (len(word) > 2 and word.lower() not in stopwords)
        ]
        counted = left[:top]
        shares.append(sum(each in wanted for each in counted) / len(counted) if counted else float("nan"))
    return torch.tensor(shares)
