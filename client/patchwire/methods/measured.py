"""What an experiment measured, by layer and by token: the form in which results of two models are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

LAYER = "layer"
TOKEN = "token"
ROLE = "role"
"""What the tokens of several facts have in common, in place of the tokens."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Numbers by layer, by token, or by both."""

    values: Tensor
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


def depths(layers: int) -> tuple[float, ...]:
    """The relative depth of each layer: the middle of its part of the model, `(i + 0.5) / layers`."""
    return tuple((index + 0.5) / layers for index in range(layers))
