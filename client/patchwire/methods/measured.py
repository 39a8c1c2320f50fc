"""What an experiment measured, by layer and by token: the form in which results of two models are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

LAYER = "layer"
TOKEN = "token"
ROLE = "role"
"""What the tokens of several facts have in common, in place of the tokens."""
ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)


@dataclass(frozen=True, eq=False)
class Measured:
    """Numbers by layer, by token, or by both."""

    values: Tensor = field(repr=False)
    """`[layers, tokens]`, `[layers]` or `[tokens]`, any real dtype."""
    axes: tuple[str, ...]
    """What its dimensions are: `("layer", "token")`, `("layer",)` or `("token",)`."""
    prompt: Any = None
    """Whose tokens the tokens are: a text, or token ids."""
    depths: tuple[float, ...] = ()
    """How deep in the model each layer is, from 0 to 1; `(i + 0.5) / layers` if left out."""
    unit: str = ""
    """What the numbers are: "probability"."""


@runtime_checkable
class Measuring(Protocol):
    """A result that says what it measured."""

    @property
    def measured(self) -> Measured:
        """Its numbers by layer and token."""


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


def is_role(label: str) -> bool:
    """Whether a token's label is its role, perhaps with its position where several have the same."""
    return label.rstrip(" 0123456789") in ROLES


def depths(layers: int) -> tuple[float, ...]:
    """The relative depth of each layer: the middle of its part of the model, `(i + 0.5) / layers`."""
    return tuple((index + 0.5) / layers for index in range(layers))
