"""Views: the way from a tensor that exists in a model to the part of it that a canonical name means.

Where GPT-2 computes queries, keys and values as one tensor `[batch, seq, 3*768]`, the queries of each head are a part
of it, seen as `[batch, seq, 12, 64]`. The steps from the one to the other are data, which the worker makes and the
client records as ordinary operations: reading gives a view, and an edit of that view is a write to the tensor in the
model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from patchwire.errors import GraphError
from patchwire.v1 import model_pb2

_MAX_STEPS = 16
_MAX_NUMBERS = 16
_NUMBERS: Mapping[str, tuple[int, int]] = {
    "narrow": (3, 3), "select": (2, 2), "unflatten": (2, _MAX_NUMBERS), "permute": (1, _MAX_NUMBERS),
    "unsqueeze": (1, 1), "flatten": (2, 2), "rows": (1, 1),
}  # fmt: skip
"""How many numbers each operation has, at least and at most."""
_OPERATIONS: Mapping[str, str] = {each: f"torch.{each}" for each in _NUMBERS} | {"rows": "torch.unflatten"}


@dataclass(frozen=True)
class View:
    """One step: an operation of PyTorch's that gives a view, and its numbers."""

    operation: str
    """"narrow" (dimension, start, length), "select" (dimension, index), "unflatten" (dimension, lengths…),
    "permute" (dimensions…), "unsqueeze" (dimension), "rows" (dimension: all tokens of the first row, then all of the
    second, …), or "flatten" (first dimension, last dimension), which is no view but a copy."""
    numbers: tuple[int, ...]
    """Its arguments; dimensions are counted from the end where they are negative."""

    @property
    def copies(self) -> bool:
        """Whether what it gives has memory of its own."""
        return self.operation == "flatten"

    def call(self, rows: int) -> tuple[str, tuple[int | list[int], ...]]:
        """The operation's name in a graph, and its arguments after the tensor, of which there are so many rows."""
        name = _OPERATIONS[self.operation]
        match self.operation:
            case "rows":
                (dim,) = self.numbers
                return name, (dim, [rows, -1])
            case "unflatten":
                dim, *sizes = self.numbers
                return name, (dim, sizes)
            case "permute":
                return name, (list(self.numbers),)
        return name, self.numbers


def _is_known(view: View) -> bool:
    least, most = _NUMBERS.get(view.operation, (1, 0))
    return least <= len(view.numbers) <= most


def views_to_proto(views: Iterable[View]) -> list[model_pb2.View]:
    """The steps as messages."""
    return [model_pb2.View(operation=each.operation, numbers=each.numbers) for each in views]


def views_from_proto(messages: Iterable[model_pb2.View]) -> tuple[View, ...]:
    """The steps of messages.

    Raises:
        GraphError: one is not known or lacks numbers, or there are too many.
    """
    views = tuple(View(each.operation, tuple(each.numbers)) for each in messages)
    if len(views) > _MAX_STEPS or not all(map(_is_known, views)):
        raise GraphError(
            "The server describes a part of a tensor in a way that this version does not know.",
            hint="Compare `patchwire doctor` here and there.",
        )
    return views
