"""What neurons write: their value vectors in words of the vocabulary, and their sub-updates of one run.

Geva, Schuster, Berant and Levy (2021), "Transformer Feed-Forward Layers Are Key-Value Memories", section 4: a value
vector, times the unembedding, is a distribution over tokens, and where it is most sure, the neuron's triggers go on
like this. Geva, Caciularu, Wang and Goldberg (2022), "Transformer Feed-Forward Layers Build Predictions by Promoting
Concepts in the Vocabulary Space", section 3: in a run each neuron adds `m_i v_i`, a sub-update, that moves the logits.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patchwire.errors import InputError, PatchwireWarning, here
from patchwire.methods.neurons import chosen_of, layer_of, neurons_of
from patchwire.methods.prompts import prompt_of, token_of
from patchwire.methods.result import Axis, Origin, Result
from patchwire.methods.triggering import Triggers
from patchwire.methods.vocabulary import TopTokens, check_top, project
from patchwire.model import Model
from patchwire.results import Stats


@dataclass(frozen=True, eq=False)
class ValueProjections:
    """The value vectors of neurons in words of the vocabulary."""

    tokens: TopTokens
    """`[neuron, token]`: the tokens that each speaks for."""
    agreement: Result | None = None
    """`[neuron]`: 1 where the first of them is the token after the neuron's first trigger, or 0; NaN where the trigger
    ends its text. `numbers["agreement"]` is the mean, `numbers["chance"]` what it would be if the triggers were those
    of other neurons. None without triggers."""
    rank: Result | None = None
    """`[neuron]`: how many tokens the value vector puts before that token; NaN as above, None without triggers."""


@dataclass(frozen=True, eq=False)
class SubUpdates:
    """The neurons that add most to the residual stream at one token of one run."""

    importance: Result
    """`[layer, rank]` float32: |m_i| ‖v_i‖, the largest first."""
    coefficients: Result
    """`[layer, rank]` float32: m_i."""
    neurons: Tensor = field(repr=False)
    """`[layer, rank]` int64: which neurons they are."""
    tokens: TopTokens
    """`[layer, rank, token]`: the tokens whose logits `m_i v_i` raises most, and by how much."""
    answer: Result | None
    """`[layer, rank]` float32: by how much it raises that of the answer; None without an answer."""
    gap: Result
    """`[layer]` float32: the largest number of `Σ m_i v_i + b - output`, which is rounding."""


def value_projections(
    model: Model,
    layer: int,
    *,
    top: int = 10,
    kind: str | None = None,
    neurons: Sequence[int] | None = None,
    triggers: Triggers | None = None,
) -> ValueProjections:
    """Project the value vectors of a layer's neurons to the vocabulary (Geva et al. 2021, section 4).

    The model does not run. The logits `v_i W_U`, with no norm in between, are made on the server, for a block of
    neurons at a time; `top` of each neuron come back.

    Args:
        model: Any model with the neurons and an unembedding.
        layer: Which layer's.
        top: How many tokens of each neuron.
        kind: One of `patchwire.methods.NEURONS`; "mlp" if left out, or "ssm" of a layer without an MLP.
        neurons: Which of them; all if left out, or those of the triggers.
        triggers: Their trigger examples, if the values are to be compared with what comes after those.

    Raises:
        InputError: there is no such layer or neuron, or the triggers are of others.
        SiteError: the model does not have the neurons.

    Example:
        >>> found = methods.value_projections(model, 5, triggers=methods.triggers(model, 5, texts))
        >>> found.tokens.at(17)[0], found.agreement.numbers
    """
    layer, module = layer_of(model, layer)
    if triggers is not None:
        kind, neurons = kind or triggers.kind, triggers.neurons if neurons is None else neurons
    kind, site = neurons_of(module, kind)
    width = site.values(module).shape[0]
    which = list(range(width)) if neurons is None else chosen_of(neurons, width)
    if triggers is not None and (triggers.layer, triggers.kind, triggers.neurons) != (layer, kind, tuple(which)):
        raise InputError(
            f"The triggers are of neurons “{triggers.kind}” of layer {triggers.layer}, or not of those asked for.",
            hint="Give both the same layer, kind and neurons.",
            lines=here(),
        )
    next_tokens = torch.full((len(which),), -1) if triggers is None else triggers.following[:, 0]
    with model.session() as session:
        with model.trace([[0]]):  # weights are read in a trace; nothing runs for them
            vectors, unembedding = site.values(model.layers[layer]), model.W_U
            vectors = vectors if neurons is None else vectors[which]
        found = project(session, vectors, unembedding, top, next_tokens.clamp(min=0))
    scores, ids, ranks = found.tensors()
    origin = Origin.of("value_projections", model, layer=layer, kind=kind, neurons=neurons, top=top)
    axis, stats = Axis("neuron", tuple(map(str, which))), session.stats or Stats()
    ranked = Axis("token", tuple(map(str, range(top))))
    tokens = TopTokens(Result(scores, (axis, ranked), "logit", origin, signed=True, stats=stats), ids, model)
    if triggers is None:
        return ValueProjections(tokens)
    there = next_tokens >= 0
    agree = (ids[:, 0] == next_tokens).float().masked_fill(~there, torch.nan)
    numbers = {"agreement": float(agree.nanmean()), "chance": chance(ids[there, 0], next_tokens[there])}
    return ValueProjections(
        tokens,
        Result(agree, (axis,), "1 where both are the same token", origin, numbers, stats=stats),
        Result(ranks.float().masked_fill(~there, torch.nan), (axis,), "rank", origin, stats=stats),
    )


def sub_updates(
    model: Model,
    prompt: Any,
    position: int = -1,
    *,
    answer: str | int | None = None,
    layers: Sequence[int] | None = None,
    top: int = 10,
    tokens: int = 10,
    kind: str | None = None,
) -> SubUpdates:
    """The neurons that add most at a token of a prompt, and what each of them promotes (Geva et al. 2022, section 3).

    One pass. The importance of a sub-update is |m_i| ‖v_i‖; what it does to the logits is `m_i v_i W_U`, with no norm
    in between.

    Args:
        model: Any model with the neurons and an unembedding: those of MLPs, or the channels of SSMs.
        prompt: One prompt: a text, or token ids.
        position: At which of its tokens.
        answer: A token whose logit is measured: how the text goes on, or a token id.
        layers: Of which layers; all if left out.
        top: How many neurons of each.
        tokens: How many tokens of each neuron.
        kind: "mlp" or "ssm"; "mlp" if left out, or "ssm" of a layer without an MLP.

    Raises:
        InputError: there is no such token, layer, or so many neurons; or those of the kind add nothing themselves.
        SiteError: a layer does not have the neurons.

    Example:
        >>> found = methods.sub_updates(model, "The Eiffel Tower is in the city of", answer=" Paris")
        >>> found.neurons[5, 0], found.importance.values[5, 0], found.tokens.at(5, 0)[:3]
    """
    given = prompt_of(model, prompt)
    if not -len(given) <= position < len(given):
        raise InputError(f"The prompt has {len(given)} tokens, and none at {position}.", lines=here())
    token = None if answer is None else token_of(model, given, answer)
    places = []
    for each in range(model.num_layers) if layers is None else layers:
        index, module = layer_of(model, each)
        name, site = neurons_of(module, kind)
        if site.output is None:
            raise InputError(
                f"What a layer adds is no sum over “{name}”.",
                hint='Write `kind="ssm"`: the product of scan and gate.',
                lines=here(),
            )
        check_top(top, site.values(module).shape[0], "neurons")
        places.append((index, site, hasattr(site.part(module), "b_out")))
    if not places:
        raise InputError("There are no layers.", lines=here())

    saved = []
    with model.trace(given.rows) as trace:
        unembedding = model.W_U.float()
        check_top(tokens, unembedding.shape[1])
        for index, site, biased in places:
            module = model.layers[index]
            coefficients = site.coefficients(module)[0, position].float()
            values = site.values(module).float()
            assert site.output is not None
            output = site.output(module)[0, position].float()
            whole = coefficients @ values + (site.part(module).b_out.float() if biased else 0.0)
            importance, neurons = (coefficients.abs() * values.norm(dim=1)).topk(top)
            logits = (coefficients[neurons][:, None] * values[neurons]) @ unembedding
            raised, ids = logits.topk(tokens)
            parts = [importance, coefficients[neurons], neurons, raised, ids]
            parts += [(whole - output).abs().max(), output.abs().max(), logits[:, token or 0]]
            saved.append([each.save() for each in parts])
        epsilon = torch.finfo(model.W_U.dtype).eps
    importances, numbers, which, raised, ids, gaps, largest, of_answer = (
        torch.stack([each.value for each in column]) for column in zip(*saved, strict=True)
    )
    if bool((gaps > max(1e-3, 4 * epsilon) * largest).any()):
        warnings.warn(
            PatchwireWarning(
                f"What a layer of {model.name} adds is not the sum of its sub-updates alone: they differ by up to "
                f"{float(gaps.max()):.3g}."
            ),
            stacklevel=2,
        )
    origin = Origin.of(
        "sub_updates", model, prompt=prompt, position=position, answer=token, layers=layers, top=top, kind=kind
    )
    layer_axis = Axis("layer", tuple(str(index) for index, *_ in places))
    axes = layer_axis, Axis("rank", tuple(map(str, range(top))))
    stats = trace.stats or Stats()
    return SubUpdates(
        importance=Result(importances, axes, "|m| ‖v‖", origin, stats=stats),
        coefficients=Result(numbers, axes, "coefficient", origin, signed=True, stats=stats),
        neurons=which,
        tokens=TopTokens(
            Result(raised, (*axes, Axis("token", tuple(map(str, range(tokens))))), "logit", origin, stats=stats),
            ids,
            model,
        ),
        answer=None if token is None else Result(of_answer, axes, "logit", origin, signed=True, stats=stats),
        gap=Result(gaps, (layer_axis,), "largest difference", origin, stats=stats),
    )


def chance(first: Tensor, second: Tensor) -> float:
    """How often tokens of both agree if they are paired in any way."""
    if not len(first):
        return float("nan")
    size = int(torch.cat([first, second]).max()) + 1
    shares = [torch.bincount(each, minlength=size).double() / len(each) for each in (first, second)]
    return float((shares[0] * shares[1]).sum())
