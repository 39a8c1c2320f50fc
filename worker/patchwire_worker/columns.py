"""Columns: of which entries of the vocabulary a graph looks at the logits, as far as that is known beforehand.

A sweep measures the difference of two logits, and the output head has a row of weights for each of a hundred thousand.
Whoever knows which two need not multiply with the others. What is looked at is found by following a read through one
index after the other; and since each index takes something of every dimension for itself, what it all comes to is a
part of the tensor, which can be taken of one that has these columns only.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor

from patchwire_worker.models.costs import are_few_columns
from patchwire_worker.positions import is_of

Taken = int | Sequence[int]
"""What is taken of a dimension: an index, and the dimension is gone; or several, in their order."""
Part = tuple[Taken, Taken, Taken]
"""What is taken of a tensor `[batch, seq, vocabulary]`."""


def parts_of(
    read: torch.fx.Node,
    shape: tuple[int, int, int],
    needed: Collection[torch.fx.Node],
    *,
    any_columns: bool = False,
) -> dict[torch.fx.Node, Part | None] | None:
    """What a graph takes of a tensor `[batch, seq, vocabulary]`, if that is a few columns.

    Args:
        read: Its value is the tensor.
        shape: The tensor's.
        needed: The nodes that are evaluated.
        any_columns: Whether it may be more of them: then it is what is indexed first.

    Returns:
        All that is indexed: the nodes whose value is a part of few columns, and, with None, those on the way there,
        whose value nobody looks at. None if anything else may be looked at.
    """
    found: dict[torch.fx.Node, Part | None] = {}
    stack: list[tuple[torch.fx.Node, Part]] = [(read, (range(shape[0]), range(shape[1]), range(shape[2])))]
    while stack:
        node, whole = stack.pop()
        for user in node.users:
            if user not in needed:
                continue
            part = _indexed(whole, user.args[1]) if is_of(user, operator.getitem, node) else None
            if part is None:
                return None
            columns = columns_of(part)
            few = any_columns or not columns or are_few_columns(len(columns), shape[2])
            found[user] = part if few else None
            stack += [] if few else [(user, part)]
    return found


def columns_of(part: Part) -> Sequence[int]:
    """The columns of a part."""
    return _several(part[2])


def positions_of(part: Part) -> Sequence[int]:
    """The positions of a part."""
    return _several(part[1])


def moved(part: Part, positions: Mapping[int, int], columns: Mapping[int, int] | None) -> Part:
    """The same part in a tensor that does not have all positions and columns.

    Args:
        part: The part.
        positions: Where each position is.
        columns: Where each column is; None if all are there.
    """
    rows, second, third = part
    return rows, _moved(second, positions), third if columns is None else _moved(third, columns)


def _moved(taken: Taken, there: Mapping[int, int]) -> Taken:
    return there[taken] if isinstance(taken, int) else tuple(there[each] for each in taken)


def take(whole: Tensor, part: Part) -> Tensor:
    """A part of a tensor `[batch, seq, vocabulary]`; contiguous."""
    for dim, each in enumerate(part):
        places = _several(each)
        first = places[0] if places else 0
        follow = range(first, first + len(places))
        if places == follow if isinstance(places, range) else all(map(operator.eq, places, follow)):
            whole = whole.narrow(dim, first, len(places))
        else:
            whole = whole.index_select(dim, torch.tensor(places, device=whole.device))
    for dim in reversed(range(len(part))):
        if isinstance(part[dim], int):
            whole = whole.select(dim, 0)
    return whole.contiguous()


def _several(taken: Taken) -> Sequence[int]:
    return (taken,) if isinstance(taken, int) else taken


def _indexed(part: Part, index: Any) -> Part | None:
    """What an index takes of a part; None if it does anything but to take something of each dimension."""
    items = list(index) if isinstance(index, tuple) else [index]
    left = [dim for dim, each in enumerate(part) if not isinstance(each, int)]
    dots = [at for at, each in enumerate(items) if each is Ellipsis]
    if len(dots) == 1:
        items[dots[0] : dots[0] + 1] = [slice(None)] * (len(left) - len(items) + 1)
    # Two lists would take pairs.
    if len(items) > len(left) or len(dots) > 1 or sum(isinstance(each, list) for each in items) > 1:
        return None
    taken = list(part)
    for dim, each in zip(left, items, strict=False):
        here = taken[dim]
        assert not isinstance(here, int)
        try:
            match each:
                case slice(start=start, stop=stop, step=step) if all(map(_is_bound, (start, stop, step))):
                    taken[dim] = here[each]
                case list() if each and all(type(one) is int for one in each):
                    taken[dim] = tuple(here[one] for one in each)
                case int() if type(each) is int:
                    taken[dim] = here[each]
                case _:
                    return None
        except (IndexError, ValueError):  # it is for whoever evaluates it to say so
            return None
    first, second, third = taken
    return first, second, third


def _is_bound(each: Any) -> bool:
    return each is None or type(each) is int
