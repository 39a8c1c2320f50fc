"""Averages: what many results say together, token by token or by the role that a token has.

Facts have subjects and relations of different lengths. What they have in common are roles: a token is a subject's
first, a middle or its last one, the first after it, a further one, or the prompt's last (Meng et al. 2022, "Locating
and Editing Factual Associations in GPT", figure 2; Sharma et al. 2024 for Mamba).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from patchwire.errors import InputError, here
from patchwire.methods.measured import TOKEN
from patchwire.methods.result import Axis, Origin, Result
from patchwire.results import Stats

ROLES: Mapping[str, Callable[[int, int, int], range]] = {
    "first subject": lambda first, last, end: range(first, first + 1),
    "middle subject": lambda first, last, end: range(first + 1, last),
    "last subject": lambda first, last, end: range(last, last + 1),
    "first subsequent": lambda first, last, end: range(last + 1, min(last + 2, end + 1)),
    "further": lambda first, last, end: range(last + 2, end),
    "last": lambda first, last, end: range(end, end + 1),
}
"""The tokens of a role, by its name, of the subject's first and last position and of the prompt's last one. As in the
authors' code, the only token of a subject is its first and its last, and the only one after it the first subsequent and
the last; what is before the subject has no role."""


def by_role(results: Sequence[Result]) -> Result:
    """The mean of the results of many facts over the tokens of each role.

    Args:
        results: Of one method and one model, each with an axis of tokens on which its subject is marked, such as those
            of `causal_trace`, or their `effect()`.

    Returns:
        `[roles, …]`, the results' other axes after that of the roles; NaN where no token has a role. Every token counts
        the same, as in the authors' code. `numbers` are the means of the results' numbers.

    Raises:
        InputError: there are no results, they are not of one kind, or one has no tokens with a subject.

    Example:
        >>> traces = [causal_trace(model, each.prompt, each.subject).effect() for each in facts]
        >>> by_role(traces).plot().savefig("average.png")
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in ROLES}
    for each in results:
        dim = each.axis(TOKEN)
        subject, end = each.axes[dim].marked, len(each.axes[dim]) - 1
        if not subject or list(subject) != list(range(subject[0], subject[-1] + 1)):
            raise InputError(f"No subject is marked on the tokens “{'|'.join(each.axes[dim].labels)}”.", lines=here())
        values = each.values.movedim(dim, 0)
        for name, role in ROLES.items():
            parts[name].append(values[list(role(subject[0], subject[-1], end))])
    left = [tuple(axis for axis in each.axes if axis.name != TOKEN) for each in results]
    axes = (Axis("role", tuple(ROLES)), *_common(results, left))
    values = torch.stack([torch.cat(each).nanmean(0) for each in parts.values()])
    return _together("by_role", results, values, axes)


def average(results: Sequence[Result]) -> Result:
    """The mean of many results with the same axes, NaN left out.

    Args:
        results: Of one method and one model. Labels that differ between them, such as the tokens of other prompts,
            become their numbers.

    Raises:
        InputError: there are no results, or they are not of one kind.

    Example:
        >>> average([information_flow(model, each.prompt, each.subject) for each in facts]).plot()
    """
    axes = _common(results, [each.axes for each in results])
    return _together("average", results, torch.stack([each.values for each in results]).nanmean(0), axes)


def _common(results: Sequence[Result], axes: Sequence[tuple[Axis, ...]]) -> tuple[Axis, ...]:
    """The axes that all have."""
    if not results:
        raise InputError("There are no results.", lines=here())
    first = results[0]
    for each, its in zip(results, axes, strict=True):
        alike = [(axis.name, len(axis)) for axis in its] == [(axis.name, len(axis)) for axis in axes[0]]
        if not alike or each.unit != first.unit or each.origin.fingerprint != first.origin.fingerprint:
            raise InputError(
                f"{_told(each, its)} is not of one kind with {_told(first, axes[0])}: they have no mean.", lines=here()
            )
    found = []
    for index, axis in enumerate(axes[0]):
        others = [its[index] for its in axes]
        labels = [
            label if all(other.labels[at] == label for other in others) else str(at)
            for at, label in enumerate(axis.labels)
        ]
        found.append(
            Axis(axis.name, tuple(labels), axis.marked if all(o.marked == axis.marked for o in others) else ())
        )
    return tuple(found)


def _told(result: Result, axes: tuple[Axis, ...]) -> str:
    sizes = " × ".join(f"{len(axis)} {axis.name}s" for axis in axes)
    return f"{result.unit} of {result.origin.model} by {sizes}"


def _together(method: str, results: Sequence[Result], values: Tensor, axes: tuple[Axis, ...]) -> Result:
    first = results[0]
    numbers = {
        name: sum(each.numbers[name] for each in results) / len(results)
        for name in first.numbers
        if all(name in each.numbers for each in results)
    }
    arguments = {"method": first.origin.method, "results": [dict(each.origin.arguments) for each in results]}
    return replace(
        first,
        values=values,
        axes=axes,
        origin=Origin(method, first.origin.model, first.origin.fingerprint, arguments),
        numbers=numbers,
        stats=Stats.sum([each.stats for each in results]),
    )
