"""Patchscopes: a state is put into another prompt, and the model itself says what is in it.

Ghandeharioun, Caciularu, Pearce, Dixon and Geva (2024), "Patchscopes: A Unifying Framework for Inspecting Hidden
Representations of Language Models", section 3: the state `h` of a source prompt, at a layer and a token, takes the
place of another at a token of a target prompt, as in "cat -> cat; 135 -> 135; hello -> hello; ?". What the target
prompt goes on with is a reading of the state. The target's layer may be another, and so may its model, with a map
between both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patchwire.errors import InputError, here
from patchwire.methods.neurons import layer_of
from patchwire.methods.prompts import Prompt, prompt_of, token_of
from patchwire.methods.result import Axis, Origin, Result, layers_axis, tokens_axis
from patchwire.methods.sweeping import sweep
from patchwire.methods.vocabulary import TopTokens, check_top
from patchwire.model import Model
from patchwire.tracing import Trace

IDENTITY = "cat -> cat; 135 -> 135; hello -> hello; black -> black; shoe -> shoe; x"
"""A target prompt that repeats words (section 4.1): its last token is what a state takes the place of."""

Map = Callable[[Any], Any]
"""From states `[tokens, width]` of one model to those of another: `lambda h: h @ A + b`."""


@dataclass(frozen=True, eq=False)
class Patchscope:
    """What a target prompt goes on with, for each state that was put into it."""

    tokens: TopTokens
    """`[layer, token, rank]`: the likeliest next tokens, with their probabilities."""
    answer: Result | None
    """`[layer, token]`: the probability of the answer; None if none was asked for. `numbers["base"]` is that of the
    target prompt as it is."""


def patchscope(
    model: Model,
    source: Any,
    target: Any = IDENTITY,
    *,
    answer: str | int | None = None,
    position: int = -1,
    layers: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    into_layer: int | None = None,
    into: Model | None = None,
    mapping: Map | None = None,
    top: int = 5,
) -> Patchscope:
    """Put states of a prompt into another one, a (layer, token) at a time, and read the next token (Ghandeharioun et
    al. 2024, section 3).

    What is put in is the residual stream after a layer. All cells are rows of a few passes, one for each layer and
    token; only the `top` likeliest tokens of each come back.

    Args:
        model: Whose states are read.
        source: The prompt that they are of: a text, or token ids.
        target: The prompt that they are put into.
        answer: How the target prompt goes on if the state says so, or a token id.
        position: The target's token whose state is replaced.
        layers: Of which layers; all if left out.
        tokens: Of which of the source's tokens; all if left out.
        into_layer: The target's layer, after which the state is replaced; the layer that the state is of if left out.
        into: The target's model, which may be on another server; the same if left out.
        mapping: From states `[tokens, width]` of the one to those of the other, written with PyTorch's operations.
        top: How many tokens.

    Raises:
        InputError: there is no such layer or token, or the answer is not how the target goes on.
        ShapeError: the models have other widths, and no map is given.

    Example:
        >>> found = methods.patchscope(model, "The Eiffel Tower", answer=" Paris")
        >>> found.tokens.at(5, 3), found.answer.values[5, 3]
    """
    given = prompt_of(model, source)
    reader = into or model
    prompt = prompt_of(reader, target)
    place = _token(prompt, position)
    read = [layer_of(model, each)[0] for each in (range(model.num_layers) if layers is None else layers)]
    chosen = [_token(given, each) for each in (range(len(given)) if tokens is None else tokens)]
    if not read or not chosen:
        raise InputError("There are no states: name a layer and a token.", lines=here())
    written = {layer: _into(reader, layer, into_layer, into is not None) for layer in read}
    wanted = None if answer is None else token_of(reader, prompt, answer)
    # In one run nothing goes back to an earlier layer.
    forward = reader is model and all(written[layer] >= layer for layer in read)
    states = None if forward else _saved(model, given, read)

    def measured() -> Any:
        probabilities = reader.logits[0, -1].float().softmax(-1)
        check_top(top, probabilities.shape[-1])
        best = probabilities.topk(top)
        # float64 has every token id.
        found = [best[0].double(), best[1].double(), probabilities[wanted or 0][None].double()]
        return torch.cat(found)

    def before(trace: Trace) -> tuple[Any, Any]:
        if states is None:
            with trace.invoke(given.rows):
                own = {layer: model.layers[layer].output[0] for layer in read}
        else:
            own = states
        with trace.invoke(prompt.rows):
            base = measured().save()
        return {layer: mapping(each) if mapping is not None else each for layer, each in own.items()}, base

    def measure(trace: Trace, runs: tuple[Any, Any], cell: tuple[int, int]) -> Any:
        layer, token = cell
        with trace.invoke(prompt.rows):
            reader.layers[written[layer]].output[0, place] = runs[0][layer][token]
            return measured()

    cells = [(layer, token) for layer in read for token in chosen]
    values, runs, stats = sweep(reader, cells, len(prompt), before, measure, what="states")
    values = values.reshape(len(read), len(chosen), -1)
    origin = Origin.of(
        "patchscope", model, prompt=given.given, target=prompt.given, answer=wanted, position=place, layers=read,
        tokens=chosen, into_layer=into_layer, into=reader.name, into_fingerprint=reader.fingerprint, top=top,
    )  # fmt: skip
    axes = _chosen(layers_axis(model), read), _chosen(tokens_axis(given.tokens), chosen)
    ranked = Axis("rank", tuple(map(str, range(top))))
    likeliest = Result(values[..., :top].float(), (*axes, ranked), "probability", origin, stats=stats)
    numbers = {"base": float(runs[0][1].value[-1])}
    return Patchscope(
        TopTokens(likeliest, values[..., top : 2 * top].long(), reader),
        None if wanted is None else Result(values[..., -1].float(), axes, "probability", origin, numbers, stats=stats),
    )


def patchscope_text(
    model: Model,
    source: Any,
    layer: int,
    token: int = -1,
    target: Any = IDENTITY,
    *,
    position: int = -1,
    into_layer: int | None = None,
    into: Model | None = None,
    mapping: Map | None = None,
    max_new_tokens: int = 20,
) -> str:
    """Put one state of a prompt into another one, and let the model go on (Ghandeharioun et al. 2024, section 4.3).

    The state takes its place while the target prompt is read; what is generated after it is as the model will.

    Args:
        model: Whose state is read.
        source: The prompt that it is of: a text, or token ids.
        layer: After which layer.
        token: At which of the source's tokens.
        target: The prompt that it is put into.
        position: The target's token whose state is replaced.
        into_layer: As for `patchscope`.
        into: As for `patchscope`.
        mapping: As for `patchscope`.
        max_new_tokens: How many tokens are generated.

    Returns:
        What comes after the target prompt; token ids "#5 #17" where the model has no tokenizer here.

    Raises:
        InputError: there is no such layer or token.
        ShapeError: the models have other widths, and no map is given.

    Example:
        >>> methods.patchscope_text(model, "Diana, Princess of Wales", 5, target="Syria: a country. Leo: an actor. x")
    """
    given = prompt_of(model, source)
    reader = into or model
    prompt = prompt_of(reader, target)
    at, place, read = _token(given, token), _token(prompt, position), layer_of(model, layer)[0]
    written = _into(reader, read, into_layer, into is not None)
    state = _saved(model, given, [read])[read][at : at + 1]
    state = mapping(state) if mapping is not None else state
    with reader.generate(prompt.rows, max_new_tokens=max_new_tokens) as generation:
        reader.layers[written].output[0, place] = state[0]
        ids = generation.output.save()
    new = ids.value[0, len(prompt) :].tolist()
    if reader.tokenizer.backend is None:
        return " ".join(f"#{each}" for each in new)
    return reader.tokenizer.decode(new)


def _saved(model: Model, prompt: Prompt, layers: Sequence[int]) -> dict[int, Any]:
    """States `[tokens, width]` after layers, here."""
    with model.trace(prompt.rows):
        saved = {layer: model.layers[layer].output[0].save() for layer in layers}
    return {layer: each.value for layer, each in saved.items()}


def _token(prompt: Prompt, token: int) -> int:
    if not -len(prompt) <= token < len(prompt):
        raise InputError(f"“{prompt.given}” has {len(prompt)} tokens, and none at {token}.", lines=here())
    return token % len(prompt)


def _into(reader: Model, layer: int, into_layer: int | None, other: bool) -> int:
    """The layer of the target after which a state is replaced."""
    if into_layer is None and other and layer >= reader.num_layers:
        raise InputError(
            f"{reader.name} has no layer {layer} for the state of that layer.", hint="Say `into_layer`.", lines=here()
        )
    return layer_of(reader, layer if into_layer is None else into_layer)[0]


def _chosen(axis: Axis, indices: Sequence[int]) -> Axis:
    return Axis(axis.name, tuple(axis.labels[each] for each in indices))
