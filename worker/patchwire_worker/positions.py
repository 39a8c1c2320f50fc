"""Positions: which tokens of a tensor a graph looks at, and which it changes, as far as that is known beforehand.

A sweep reads the last token's logits and changes one token's state. Whoever knows that need not compute the logits of
the others, nor anything of the tokens before.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from typing import Any

import torch.fx

from patchwire import graph as g

Positions = frozenset[int]
"""Positions in a row, from 0."""
_GET, _SET = "operator.getitem", "operator.setitem"


def taken(node: torch.fx.Node, length: int, needed: Collection[torch.fx.Node]) -> Positions | None:
    """The positions of a tensor `[batch, seq, …]` that anybody looks at.

    Args:
        node: Its value is the tensor.
        length: How many positions it has.
        needed: The nodes that are evaluated.

    Returns:
        None if it may be any.
    """
    return _together(
        _index(user.args[1], length) if is_of(user, operator.getitem, node) else None
        for user in node.users
        if user in needed
    )


def touched(read: torch.fx.Node, length: int, needed: Collection[torch.fx.Node]) -> Positions | None:
    """The positions of a tensor `[batch, seq, …]` that anybody looks at or changes, before it is put back where it was.

    Args:
        read: Reads the tensor.
        length: How many positions it has.
        needed: The nodes that are evaluated.

    Returns:
        None if it may be any.
    """
    found: list[Positions | None] = []
    stack = [read]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user not in needed:
                continue
            if is_of(user, operator.getitem, node):
                found.append(_index(user.args[1], length))
            elif is_of(user, g.edit, node):
                found.append(_edited(user, length))
                stack.append(user)
            elif user.target is not g.write or user.args[0] != read.args[0]:
                return None
    return _together(found)


def edited(write: torch.fx.Node) -> torch.fx.Node | None:
    """The read whose value a write puts back, with some of it edited; None if it writes something else."""
    value = write.args[1]
    while isinstance(value, torch.fx.Node) and value.target is g.edit:
        value = value.args[0]
    return value if isinstance(value, torch.fx.Node) and value.target is g.read else None


def copied(write: torch.fx.Node, length: int) -> tuple[torch.fx.Node, Positions] | None:
    """The read of which a write copies some positions, of all rows, to where they are in its own tensor.

    Args:
        write: Puts back its own tensor with that change: `x[:, 3] = y[:, 3]`.
        length: How many positions both tensors have.

    Returns:
        The read of the other tensor, and the positions; None if the write does anything else.
    """
    value = write.args[1]
    own = value.args[0] if isinstance(value, torch.fx.Node) and value.target is g.edit else None
    if not isinstance(own, torch.fx.Node) or own.target is not g.read or own.args[0] != write.args[0]:
        return None
    assert isinstance(value, torch.fx.Node)
    change: Any
    _, views, change = value.args
    name, arguments, _ = change
    if views or name != _SET or len(arguments) != 2:
        return None
    index, put = arguments
    if not isinstance(put, torch.fx.Node) or put.target is not operator.getitem:
        return None
    source, its_index = put.args
    if not isinstance(source, torch.fx.Node) or source.target is not g.read:
        return None
    plain = isinstance(index, tuple) and all(map(_is_plain, index)) and index[:1] == (slice(None),)
    if not plain or index != its_index:
        return None
    positions = _index(index, length)
    return None if positions is None else (source, positions)


def _is_plain(each: Any) -> bool:
    """Whether a part of an index is numbers and nothing else, so that it may be compared."""
    if isinstance(each, slice):
        return all(part is None or type(part) is int for part in (each.start, each.stop, each.step))
    return type(each) is int


def is_of(user: torch.fx.Node, target: Any, node: torch.fx.Node) -> bool:
    """Whether a user of a node does this to it, and needs it for nothing else."""
    others: list[torch.fx.Node] = []
    torch.fx.node.map_arg((user.args[1:], user.kwargs), others.append)
    return user.target is target and user.args[0] is node and node not in others


def _together(found: Iterable[Positions | None]) -> Positions | None:
    known: set[int] = set()
    for each in found:
        if each is None:
            return None
        known |= each
    return frozenset(known)


def _edited(edit: torch.fx.Node, length: int) -> Positions | None:
    """Which positions of a tensor an edit changes."""
    _, views, change = edit.args
    step: Any = views[0] if views else change  # type: ignore[index]
    name, arguments, _ = step
    return _index(arguments[0], length) if name in (_GET, _SET) and arguments else None


def _index(index: Any, length: int) -> Positions | None:
    """Which positions of a tensor `[batch, seq, …]` an index takes."""
    if not isinstance(index, tuple) or any(isinstance(each, bool) for each in index):  # rows, or no positions
        return None
    match index:
        case (int() | slice(), int(position), *_) if -length <= position < length:
            return frozenset({position % length})
        case (int() | slice(), slice(start=start, stop=stop, step=step), *_):
            if all(each is None or isinstance(each, int) for each in (start, stop, step)):
                return frozenset(range(length)[start:stop:step])
    return None
