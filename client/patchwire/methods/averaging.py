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
from patchwire.methods.measured import ROLE, ROLES, TOKEN, role_of
from patchwire.methods.result import Axis, Result
from patchwire.results import Stats

PROMPT = "prompt"


def stacked(results: Sequence[Result], *, roles: Sequence[str] | None = None) -> Result:
    """Results of one method on prompts of one template, as one: `.mean("prompt")` is their average.

    Args:
        results: At least one; their axes have the same names and lengths.
        roles: What each token of the template is: `("first operand", "plus", "second operand", "equals")`.

    Returns:
        A first axis "prompt" and those of the results. A token that is not the same in all of them is labelled with its
        role, one of `ROLES`, if the subject that `causal_trace` was told is in the same place; any other label that is
        not the same is the index. With `roles` these are the labels, and the axis is "role" in place of "token".
        `numbers` are the means.

    Raises:
        InputError: there is none, they are of different things, or there are not as many roles as tokens.
    """
    first = _alike(results)
    if any(each.values.shape != first.values.shape for each in results):
        raise InputError(
            "These results do not have the same shape: their prompts have other numbers of tokens.",
            hint="Average them by role: `methods.by_role(results)`.",
            lines=here(),
        )
    of_subjects = all("subject" in each.origin.arguments for each in results)
    axes = [_common([each.axes[dim] for each in results], of_subjects) for dim in range(len(first.axes))]
    if roles is not None:
        dim = first.axis(TOKEN)
        if len(roles) != len(axes[dim]):
            raise InputError(f"There are {len(axes[dim])} tokens, and {len(roles)} roles.", lines=here())
        axes[dim] = Axis(ROLE, tuple(roles), axes[dim].marked)
    prompts = Axis(PROMPT, tuple(map(str, range(len(results)))))
    return _averaged(results, torch.stack([each.values for each in results]), (prompts, *axes))


def _common(axes: Sequence[Axis], of_subjects: bool) -> Axis:
    """An axis of several results: what all of them have in common; `of_subjects` says that subjects are marked."""
    first = axes[0]
    marked = first.marked if all(each.marked == first.marked for each in axes) else ()
    known = of_subjects and marked and first.name == TOKEN
    roles = [role_of(at, marked, len(first)) if known else None for at in range(len(first))]
    labels = []
    for at, (role, one, *others) in enumerate(zip(roles, *(each.labels for each in axes), strict=True)):
        named = str(at) if role is None else role if roles.count(role) == 1 else f"{role} {at}"
        labels.append(one if set(others) <= {one} else named)
    return Axis(first.name, tuple(labels), marked)


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
