"""Information flow: which tokens the last one reads from, and in which layers.

Geva, Bastings, Filippova and Globerson (2023), "Dissecting Recall of Factual Associations in Auto-Regressive Language
Models", section 4. An edge from a group of tokens to the last one is cut in a window of layers; where the answer then
becomes improbable, something that it needs goes along that edge. On a Mamba as Sharma et al. (2024), "Locating and
Editing Factual Associations in Mamba", but exactly: no other token loses anything (`patchwire.knockout`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import patchwire
from patchwire.errors import InputError, here
from patchwire.methods.metrics import Probability
from patchwire.methods.places import window_around
from patchwire.methods.prompts import Prompt, answer_of, group, prompt_of, span
from patchwire.methods.result import Axis, Origin, Result, layers_axis
from patchwire.methods.sweeping import sweep
from patchwire.model import Model
from patchwire.tracing import Trace


def information_flow(
    model: Model,
    prompt: Any,
    subject: str | Sequence[int] | None = None,
    *,
    answer: str | int | None = None,
    sources: Sequence[str] | Mapping[str, str | Sequence[int]] = ("subject", "non-subject", "last"),
    queries: int | Sequence[int] = -1,
    window: int = 1,
    means: Sequence[Any] | None = None,
) -> Result:
    """Cut what flows from groups of tokens to the last one, in a window of layers around each (Geva et al. 2023,
    section 4).

    All cells are rows of a few passes. Attention is cut in all heads; an SSM's queries get the scan of a second run in
    which the keys are gone from the convolution's input.

    Args:
        model: Any model: attention or SSM alike.
        prompt: One prompt: a text, or token ids.
        subject: Its subject: words that stand in it once, or the positions of their tokens.
        answer: Whose probability is measured: how the text goes on, or a token id; what the model itself says if left
            out.
        sources: The groups whose flow is cut: names of `patchwire.methods.prompts.GROUPS`, "subject", "last subject",
            "non-subject" (without the last token) and "last"; or any names, with their words or positions.
        queries: The positions that are cut off from them.
        window: In how many layers around each: `[l - window // 2, l + (window + 1) // 2)`, clipped. The authors take 9
            of 48.
        means: Only of an SSM: for each layer, what the input of the convolution is at the keys, `[d_inner]`, such as
            its mean over a data set; 0 if left out.

    Returns:
        `[sources, layers]` float32: by how many percent the probability changes, `100 (p' - p) / p`; `numbers["base"]`
        is p.

    Raises:
        InputError: the subject is not in the prompt, there is no such group, or the answer is no answer.
        GraphError: a query would see nothing at all.

    Example:
        >>> flow = information_flow(model, "The Eiffel Tower is in the city of", "The Eiffel Tower", window=9)
        >>> flow.plot().savefig("flow.png")
    """
    given = prompt_of(model, prompt)
    where = None if subject is None else span(given, subject if isinstance(subject, str) else list(subject))
    keys = {name: _positions(given, where, name, sources) for name in sources}
    if means is not None and len(means) != model.num_layers:
        raise InputError(f"There are {len(means)} means, and {model.num_layers} layers.", lines=here())
    metric = Probability(answer_of(model, given, answer))
    windows = [window_around(model, layer, window) for layer in range(model.num_layers)]

    def before(trace: Trace) -> Any:
        with trace.invoke(given.rows):
            logits = model.logits[:, -1]
            return metric(logits, logits)[0].save()

    def measure(trace: Trace, _: Any, cell: tuple[str, range]) -> Any:
        name, layers = cell
        with trace.invoke(given.rows):
            for each in layers:
                value = 0.0 if means is None else means[each]
                patchwire.knockout(model.layers[each].mixer, keys[name], queries, value=value)
            logits = model.logits[:, -1]
            return metric(logits, logits)[0]

    cells = [(name, layers) for name in keys for layers in windows]
    values, runs, stats = sweep(model, cells, len(given), before, measure, what="cut edges")
    base = runs[0].value.double()
    return Result(
        values=(100 * (values.double() - base) / base).float().view(len(keys), -1),
        axes=(Axis("source", tuple(keys)), layers_axis(model)),
        unit="% change of the probability",
        origin=Origin.of(
            "information_flow",
            model,
            prompt=prompt,
            answer=metric.answer,
            sources=keys,
            queries=queries,
            window=window,
            means=means is not None,
        ),
        numbers={"base": float(base)},
        signed=True,
        stats=stats,
    )


def _positions(
    prompt: Prompt, subject: range | None, name: str, sources: Sequence[str] | Mapping[str, str | Sequence[int]]
) -> list[int]:
    if not isinstance(sources, Mapping):
        return group(prompt, subject, name)
    told = sources[name]
    return list(span(prompt, told) if isinstance(told, str) else told)
