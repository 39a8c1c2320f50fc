"""Extraction: in which layers attention, or an SSM, writes the answer to the last token.

Geva, Bastings, Filippova and Globerson (2023), "Dissecting Recall of Factual Associations in Auto-Regressive Language
Models", section 6. An event is a layer whose output at the last token, read in the vocabulary, has the predicted token
as its first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from patchwire.errors import InputError, here
from patchwire.methods.editing import Mention
from patchwire.methods.places import Place, value_of
from patchwire.methods.prompts import Prompt, group, prompt_of, span
from patchwire.methods.result import Axis, Origin, Result, layers_axis
from patchwire.methods.sweeping import sweep
from patchwire.model import Model, Module
from patchwire.tracing import Trace


def extraction_events(
    model: Model,
    prompts: Sequence[Any],
    *,
    at: Place = "mixer",
    earlier: int | None = None,
    written: str | Sequence[int] = "subject",
) -> Result:
    """Whether a layer's output at the last token has the predicted token as its first (Geva et al. 2023, section 6).

    `result.mean("prompt")` is the rate of each layer; `numbers["any"]` the share of prompts with an event in one layer
    at least. With `earlier`, one layer at a time reads what some tokens were before an earlier layer: what is still
    extracted was there already, and what is not was made in between (section 6.2).

    Args:
        model: Any model with an unembedding: attention or SSM alike.
        prompts: Texts, token ids, or `Mention`s, which say their subject.
        at: Whose output: "mixer", attention or the SSM, or "mlp".
        earlier: Write the residual stream before this layer into that before each later one, of the same prompt.
        written: At which tokens: a group of `patchwire.methods.prompts.GROUPS`, "subject", "last subject",
            "non-subject" or "last"; or positions.

    Returns:
        `[prompts, layers]` float32, 1 for an event; NaN in the layers up to `earlier`, for which nothing is earlier.

    Raises:
        InputError: there are no prompts, a prompt does not say its subject, or no layer comes after `earlier`.
        SiteError: the model has nothing at that place.

    Example:
        >>> facts = [Mention("The Eiffel Tower is in", "The Eiffel Tower"), Mention("Nokia is based in", "Nokia")]
        >>> extraction_events(model, facts).mean("prompt").plot()
        >>> extraction_events(model, facts, earlier=0).numbers["any"]
    """
    if isinstance(prompts, str) or not len(prompts):
        raise InputError(f"This takes a list of prompts, not {prompts!r}.", lines=here())
    if earlier is not None and not 0 <= earlier < model.num_layers - 1:
        raise InputError(
            f"No layer comes after {earlier}: the model has layers 0 to {model.num_layers - 1}.", lines=here()
        )
    cells = [_placed(model, each, None if earlier is None else written) for each in prompts]

    def events(layers: Sequence[int]) -> Any:
        """The first tokens, `[layers]`."""
        outputs = [_added(model.layers[each], at)[0, -1] for each in layers]
        return (torch.stack(outputs) @ model.W_U).argmax(-1)

    def measure(trace: Trace, _: None, cell: tuple[Prompt, list[int]]) -> Any:
        prompt, where = cell
        with trace.invoke(prompt.rows):
            said = model.logits[0, -1].argmax(-1)
            if earlier is None:
                return (events(range(model.num_layers)) == said).float()
            state = model.layers[earlier].input[:, where]
        found = []
        for layer in range(earlier + 1, model.num_layers):
            with trace.invoke(prompt.rows):
                model.layers[layer].input[:, where] = state
                found.append(events([layer]))
        return (torch.cat(found) == said).float()

    tokens = max(len(prompt) for prompt, _ in cells) * (1 if earlier is None else model.num_layers - earlier)
    values, _, stats = sweep(model, cells, tokens, lambda trace: None, measure, what="prompts")
    if earlier is not None:
        values = torch.cat([torch.full((len(cells), earlier + 1), float("nan")), values], 1)
    return Result(
        values=values,
        axes=(Axis("prompt", tuple("".join(prompt.tokens) for prompt, _ in cells)), layers_axis(model)),
        unit="rate of extraction events",
        origin=Origin.of(
            "extraction_events",
            model,
            prompts=[prompt.given for prompt, _ in cells],
            at=at,
            earlier=earlier,
            written=[where for _, where in cells],
        ),
        numbers={"any": float((values.nansum(1) > 0).float().mean())},
        stats=stats,
    )


def _added(layer: Module, at: Place) -> Any:
    """What a module adds to the residual stream: after a norm of its own, where it has one."""
    module = {"mixer": lambda: layer.mixer, "mlp": lambda: layer.mlp}.get(at, lambda: None)()
    return module.update if module is not None and hasattr(module, "update") else value_of(layer, at)


def _placed(model: Model, given: Any, written: str | Sequence[int] | None) -> tuple[Prompt, list[int]]:
    """A prompt, and the positions at which it is written."""
    prompt = prompt_of(model, given.prompt if isinstance(given, Mention) else given)
    if written is None:
        return prompt, []
    if not isinstance(written, str):
        return prompt, list(written)
    subject = None
    if isinstance(given, Mention):
        subject = span(prompt, given.subject if isinstance(given.subject, str) else list(given.subject))
    return prompt, group(prompt, subject, written)
