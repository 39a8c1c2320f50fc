"""Mediation: by which modules, at which tokens, another prompt's answer comes about.

Stolfo, Belinkov and Sachan (2023), "A Mechanistic Interpretation of Arithmetic Reasoning in Language Models using
Causal Mediation Analysis". What one module gives at one token is written from the run of p' → r' into that of p → r;
how far the answer moves from r to r' is what this module mediates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchwire.errors import InputError, here
from patchwire.methods.measured import LAYER
from patchwire.methods.places import Place, at
from patchwire.methods.prompts import answer_of, prompt_of, span
from patchwire.methods.result import Axis, Origin, Result, layers_axis, tokens_axis
from patchwire.methods.sweeping import sweep
from patchwire.model import Model
from patchwire.tracing import Trace

EMBED = "embed"


def mediation(
    model: Model,
    prompt: Any,
    other: Any,
    answers: tuple[str | int | None, str | int | None] = (None, None),
    *,
    place: Place = "mlp",
    subject: str | Sequence[int] | None = None,
) -> Result:
    """The indirect effect of each module's output at each token (Stolfo et al. 2023, section 3, eq. 2).

    P is the model's distribution after the prompt p, P* the same when one output is that of the run of p':

        IE = ½ [(P(r) - P*(r)) / P*(r) + (P*(r') - P(r')) / P(r')]

    All cells are rows of a few passes; a row leaves that of p where it is first changed. The mean over many pairs is
    `average`, or `by_role` where their tokens differ, of their results.

    Args:
        model: Any model with the place: attention or SSM alike.
        prompt: p: a text, or token ids.
        other: p', of as many tokens.
        answers: r and r': how each text goes on, or token ids; what the model itself says where one is left out.
        place: Whose output is written: one of `patchwire.methods.PLACES`, "mlp" or "mixer", or "embed", the token
            embeddings.
        subject: What is marked on the axis of tokens, for `by_role`: words that stand in p once, or positions; where
            the prompts differ, if left out.

    Returns:
        `[layers, tokens]` float32, at least -1; for "embed" `[1, tokens]`. `numbers` has P(r) and P(r') as "r" and
        "r'", and the total effect, of P* the run of p', as "total".

    Raises:
        InputError: the prompts do not have the same number of tokens, or an answer is no answer.
        SiteError: the model has nothing at that place.

    Example:
        >>> found = mediation(model, "What is 12 plus 34 ? It is", "What is 51 plus 26 ? It is", (" 46", " 77"))
        >>> relative_importance(found, layer=range(14, 28), token=-1)
    """
    one, two = prompt_of(model, prompt), prompt_of(model, other)
    if len(one) != len(two):
        raise InputError(
            f"“{other}” has {len(two)} tokens, and “{prompt}” has {len(one)}.",
            hint="Take two prompts that differ in some tokens; `model.tokenizer.tokens(text)` shows them.",
            lines=here(),
        )
    tokens = [answer_of(model, each, answer) for each, answer in zip((one, two), answers, strict=True)]
    layers = Axis(LAYER, (EMBED,)) if place == EMBED else layers_axis(model)

    def output(index: int) -> Any:
        return model.embed.output if place == EMBED else at(model.layers[index], place)

    def said() -> Any:
        """The log probabilities of r and r', `[2]`."""
        return model.logits[0, -1].float().log_softmax(-1)[tokens]

    def before(trace: Trace) -> tuple[list[Any], Any, Any]:
        with trace.invoke(two.rows):
            source = [output(index) for index in range(len(layers))]
            theirs = said().save()
        with trace.invoke(one.rows):
            return source, said().save(), theirs

    def measure(trace: Trace, runs: tuple[list[Any], Any, Any], cell: tuple[int, int]) -> Any:
        index, token = cell
        with trace.invoke(one.rows):
            output(index)[:, token] = runs[0][index][:, token]
            return said()

    cells = [(index, token) for index in range(len(layers)) for token in range(len(one))]
    found, runs, stats = sweep(model, cells, len(one), before, measure, what="modules")
    _, base, theirs = runs[0]
    right, wrong = base.value.exp().tolist()
    marked = [index for index, (mine, its) in enumerate(zip(one.ids, two.ids, strict=True)) if mine != its]
    if subject is not None:
        marked = list(span(one, subject if isinstance(subject, str) else list(subject)))
    return Result(
        values=_effect(base.value, found).view(len(layers), len(one)),
        axes=(layers, tokens_axis(one.tokens, marked)),
        unit="indirect effect",
        origin=Origin.of("mediation", model, prompt=prompt, other=other, answers=tokens, place=place),
        numbers={"r": right, "r'": wrong, "total": float(_effect(base.value, theirs.value))},
        signed=True,
        stats=stats,
    )


def relative_importance(effects: Result | Sequence[Result], **where: int | Sequence[int]) -> float:
    """The share of some modules in the effects of all, RI(M) = Σ log(IE + 1) of M / Σ log(IE + 1) of all (Stolfo et al.
    2023, section 4).

    Args:
        effects: What `mediation` found; the mean over pairs, as `average` or `by_role` give it. Of several, such as
            those of two places, M is in the first.
        where: M, by the indices of axes, negative ones from the end: `layer=range(14, 28), token=-1`. Of an axis that
            is not named, all.

    Raises:
        InputError: there is no such axis, or no such index; or nothing has an effect.
    """
    of = [effects] if isinstance(effects, Result) else list(effects)
    if not of:
        raise InputError("There are no effects.", lines=here())
    logs = [each.values.double().log1p() for each in of]
    chosen = logs[0]
    for name, indices in where.items():
        dim = of[0].axis(name)
        length = chosen.shape[dim]
        listed = [indices] if isinstance(indices, int) else list(indices)
        if not listed or not all(-length <= each < length for each in listed):
            raise InputError(f"The axis “{name}” goes from 0 to {length - 1}, and has no {listed}.", lines=here())
        chosen = chosen.index_select(dim, torch.tensor(sorted({each % length for each in listed})))
    whole = sum(float(each.nansum()) for each in logs)
    if whole == 0:
        raise InputError("Nothing has an effect, and no part of it is the larger one.", lines=here())
    return float(chosen.nansum()) / whole


def _effect(base: Tensor, changed: Tensor) -> Tensor:
    """IE, from the logarithms of P and P* of r and r': `[…, 2]` to `[…]`."""
    base, changed = base.double(), changed.double()
    return ((base[0] - changed[..., 0]).expm1() / 2 + (changed[..., 1] - base[1]).expm1() / 2).float()
