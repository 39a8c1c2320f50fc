"""Averages over prompts: results of several prompts as one.

Prompts of one template have their tokens in the same places, and are put on top of each other. Facts do not: their
tokens are averaged by the role that they play, relative to the subject (Meng et al. 2022, figure 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from patchwire.errors import InputError, here
from patchwire.methods.measured import ROLE, TOKEN
from patchwire.methods.result import Axis, Result
from patchwire.results import Stats

PROMPT = "prompt"
ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)


def role_of(token: int, subject: Sequence[int], length: int) -> str | None:
    """The role of a token, one of `ROLES`; None before the subject.

    The last token is that even where it is the subject's last, or follows it; and the only token of a subject is its
    last.

    Args:
        token: Its position.
        subject: The positions of the subject.
        length: How many tokens the prompt has.
    """
    first, last = min(subject), max(subject)
    if token == length - 1:
        return ROLES[5]
    if token <= last:
        known = {first: ROLES[0], last: ROLES[2]}
        return None if token < first else known.get(token, ROLES[1])
    return ROLES[3] if token == last + 1 else ROLES[4]


def stacked(results: Sequence[Result]) -> Result:
    """Results of one method on prompts of one template, as one: `.mean("prompt")` is their average.

    Args:
        results: At least one; their axes have the same names and lengths.

    Returns:
        A first axis "prompt" and those of the results. A label that is not the same in all of them is the index.
        `numbers` are the means.

    Raises:
        InputError: there is none, or they are of different things.
    """
    first = _alike(results)
    if any(each.values.shape != first.values.shape for each in results):
        raise InputError(
            "These results do not have the same shape: their prompts have other numbers of tokens.",
            hint="Average them by role: `methods.by_role(results)`.",
            lines=here(),
        )
    axes = [
        Axis(
            axis.name,
            tuple(one if set(others) == {one} else str(at) for at, (one, *others) in enumerate(
                zip(axis.labels, *(each.axes[dim].labels for each in results), strict=True))),
            axis.marked if all(each.axes[dim].marked == axis.marked for each in results) else (),
        )
        for dim, axis in enumerate(first.axes)
    ]  # fmt: skip
    prompts = Axis(PROMPT, tuple(map(str, range(len(results)))))
    return _averaged(results, torch.stack([each.values for each in results]), (prompts, *axes))


def by_role(results: Sequence[Result]) -> Result:
    """The average of results over facts, with the roles of tokens in place of the tokens (Meng et al. 2022, figure 2).

    Of each fact the tokens of one role are averaged first, then the facts that have the role. Tokens before the subject
    have none and are left out.

    Args:
        results: At least one, with an axis "token" on which the subject is marked, as `causal_trace` gives; take
            `.effect()` or `.normalised()` of each first.

    Returns:
        The axes of the results, with "role" in place of "token"; NaN where no fact has the role. `numbers` are the
        means.

    Raises:
        InputError: there is none, they are of different things, or one has no subject.

    Example:
        >>> traces = [methods.causal_trace(model, prompt, subject) for prompt, subject in facts]
        >>> methods.by_role([each.effect() for each in traces]).plot()
    """
    first = _alike(results)
    dim = first.axis(TOKEN)
    found: list[Tensor] = []
    for each in results:
        tokens = each.axes[dim]
        if not tokens.marked:
            raise InputError("A result has no subject marked on its tokens.", lines=here())
        roles = [role_of(at, tokens.marked, len(tokens)) for at in range(len(tokens))]
        parts = []
        for role in ROLES:
            places = [at for at, its in enumerate(roles) if its == role]
            chosen = each.values.index_select(dim, torch.tensor(places, dtype=torch.long))
            parts.append(chosen.mean(dim))  # NaN of none
        found.append(torch.stack(parts, dim))
    if any(each.shape != found[0].shape for each in found):
        raise InputError("These results do not have the same shape in all but their tokens.", lines=here())
    axes = (*first.axes[:dim], Axis(ROLE, ROLES), *first.axes[dim + 1 :])
    return _averaged(results, torch.stack(found).nanmean(0), axes)


def _alike(results: Sequence[Result]) -> Result:
    """The first of results that are of the same thing."""
    if not results:
        raise InputError("There are no results.", lines=here())
    first = results[0]
    for each in results:
        one, other = ([result.unit, [axis.name for axis in result.axes]] for result in (first, each))
        if one != other:
            raise InputError(f"These results are of different things: {one} and {other}.", lines=here())
    return first


def _averaged(results: Sequence[Result], values: Tensor, axes: tuple[Axis, ...]) -> Result:
    first = results[0]
    shared = set.intersection(*(set(each.numbers) for each in results))
    numbers = {name: sum(each.numbers[name] for each in results) / len(results) for name in sorted(shared)}
    prompts: Mapping[str, object] = {"prompts": [each.origin.arguments.get(PROMPT) for each in results]}
    origin = replace(first.origin, arguments={**first.origin.arguments, **prompts})
    stats = Stats.sum([each.stats for each in results])
    return replace(first, values=values, axes=axes, origin=origin, numbers=numbers, stats=stats)
