"""Optimisers for `loop.step`: each a pure function of values, from a parameter and its gradient to the next parameter.

What an optimiser remembers from step to step is carried by the loop like everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Optimiser(Protocol):
    """What `loop.step` takes."""

    def start(self, parameter: Any) -> list[Any]:
        """What is remembered before the first step, for a parameter that starts as this."""

    def step(self, parameter: Any, gradient: Any, memory: Sequence[Any]) -> tuple[Any, list[Any]]:
        """The next parameter, and what is remembered then."""


@dataclass(frozen=True)
class SGD:
    """Gradient descent, as `torch.optim.SGD` does it."""

    lr: Any
    """The length of a step, as a multiple of the gradient: a number, or a value of one element."""
    momentum: float = 0.0
    """How much of the last step's direction stays."""

    def start(self, parameter: Any) -> list[Any]:
        """The direction of the last step: none."""
        return [torch.zeros_like(parameter)] if self.momentum else []

    def step(self, parameter: Any, gradient: Any, memory: Sequence[Any]) -> tuple[Any, list[Any]]:
        """One step against the gradient."""
        if not self.momentum:
            return parameter - self.lr * gradient, []
        direction = self.momentum * memory[0] + gradient
        return parameter - self.lr * direction, [direction]


@dataclass(frozen=True)
class Adam:
    """Kingma & Ba 2015, algorithm 1, as `torch.optim.Adam` does it.

    g is the gradient, t counts the steps, m and v are running means of g and of its square.
    """

    lr: Any = 1e-3
    """The length of a step (alpha): a number, or a value of one element."""
    betas: tuple[float, float] = (0.9, 0.999)
    """How much of the running means stays."""
    eps: float = 1e-8
    """Added to the root of v."""

    def start(self, parameter: Any) -> list[Any]:
        """t = 0, m = 0, v = 0."""
        count = torch.zeros_like(parameter.flatten()[:1].sum(), dtype=torch.float64)
        return [count, torch.zeros_like(parameter), torch.zeros_like(parameter)]

    def step(self, parameter: Any, gradient: Any, memory: Sequence[Any]) -> tuple[Any, list[Any]]:
        """One step, with both means corrected for their start at 0."""
        (one, two), (t, m, v) = self.betas, memory
        t = t + 1
        m = one * m + (1 - one) * gradient
        v = two * v + (1 - two) * gradient * gradient
        size = self.lr / (1 - one**t)
        root = v.sqrt() / (1 - two**t).sqrt() + self.eps
        # t has 64 bits, which would show in a parameter of one number.
        return parameter - (size * m / root).to(parameter.dtype), [t, m, v]
