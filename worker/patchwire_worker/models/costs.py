"""What a pass of a model costs: floating-point operations, and bytes of the activations that it holds at once.

Both are polynomials in the rows and tokens of the pass, learnt once per model (metering.py): for every part of the
model (what is before its layers, each layer, what is after them, the head that makes logits) its operations, and what
is held at each moment of it. So what a pass of any size would cost is known before it runs, also one whose rows fork or
that ends early.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchwire.sites import Order

Polynomial = NDArray[np.float64]
"""A coefficient for each of the terms that `terms` gives."""


def terms(rows: float, seq: float, past: float = 0, chunk: int = 0) -> Polynomial:
    """What the coefficients are multiplied with: once for the pass, and once for each of its rows.

    Args:
        rows: How many rows there are.
        seq: How many tokens each has.
        past: How many tokens before these are in a cache.
        chunk: The tokens that an SSM computes together, which it pads its rows to a multiple of; 0 if it does not.
    """
    padded = -(-seq // chunk) * chunk if chunk else 0.0
    with_first = padded + chunk  # the states between chunks, of which there is one more
    by_chunk = [padded, padded * padded, with_first, with_first * with_first, padded * with_first]
    each = np.array([1.0, seq, seq * (seq + past), *by_chunk])
    return np.concatenate([each, rows * each])


ONCE, ROW, TOKEN = np.eye(16)[[0, 8, 9]]
"""The polynomials that are 1, the number of rows, and the number of tokens in all rows."""


def are_few(positions: int, of: int) -> bool:
    """Whether logits are computed at some positions alone."""
    return 0 < positions < of


_MOST_COLUMNS = 1 << 10


def are_few_columns(columns: int, vocabulary: int) -> bool:
    """Whether logits are computed of some entries of the vocabulary alone: their weights are copied for each pass."""
    return 0 < columns <= min(_MOST_COLUMNS, vocabulary // 4)


@dataclass(frozen=True)
class Size:
    """How large a pass is."""

    rows: int
    """How many rows it has."""
    seq: int
    """How many tokens the longest has."""
    end: Order
    """The last moment that it is for."""
    positions: int | None
    """How many positions, of all rows together, have logits that are looked at; None if it may be all."""
    held: int
    """Bytes of what is read in it, but for logits."""
    logits: int
    """How many rows of logits are read."""
    stepwise: bool
    """Whether attention is computed step by step."""
    columns: frozenset[int] | None = None
    """The entries of the vocabulary whose logits are looked at; None if it may be all."""

    @property
    def few(self) -> int | None:
        """At how many positions logits are computed; None if at all."""
        return self.positions if self.positions and are_few(self.positions, self.rows * self.seq) else None

    def __add__(self, other: Size) -> Size:
        """Of both in one pass."""
        known = self.positions is not None and other.positions is not None
        return Size(
            self.rows + other.rows,
            max(self.seq, other.seq),
            max(self.end, other.end),
            (self.positions or 0) + (other.positions or 0) if known else None,
            self.held + other.held,
            self.logits + other.logits,
            self.stepwise or other.stepwise,
            None if self.columns is None or other.columns is None else self.columns | other.columns,
        )


@dataclass(frozen=True, eq=False)
class Held:
    """What is held at each moment of a pass, of which only those are here that may be the most of their part."""

    moments: Polynomial
    """`[moment, 2 x term]`: bytes of what was made before the head, and then of what the head has made, whose tokens
    are those that have logits."""
    starts: Sequence[int]
    """The first moment of each part of the model, and, at the end, how many there are."""


@dataclass(frozen=True, eq=False)
class Costs:
    """What passes of one model cost.

    The parts of the model are counted from 0: what is before the layers, the layers, what is after them, the head.
    """

    operations: Polynomial
    """`[part, term]`: floating-point operations."""
    usual: Held
    """What is held when the model computes attention as it is configured."""
    stepwise: Held
    """The same, when attention is computed step by step, so that its scores exist."""
    cached: Polynomial
    """Bytes of what a generation keeps of the tokens so far."""
    chunk: int
    """The tokens that an SSM computes together; 0 if there is no such thing."""
    vocabulary: int
    """How many logits a position has."""
    logit_bytes: int
    """The bytes of the logits of one position."""
    learnt: str
    """How this was learnt: from a "run" on a few tokens; from a run on "fakes", where it takes many; or, of a model
    that cannot be watched, from the shapes of its "parameters" alone, which is a guess."""

    def flops(
        self,
        rows: int,
        seq: int,
        *,
        past: int = 0,
        since: int | None = None,
        until: int | None = None,
        positions: int | None = None,
        columns: int | None = None,
    ) -> float:
        """Floating-point operations of matrix products, convolutions and attention; a multiplication and an addition
        are two.

        Args:
            rows: How many rows there are.
            seq: How many tokens each has.
            past: How many tokens before these are in a cache.
            since: The layer that is the first to be computed; from the embeddings on if left out.
            until: The layer that is the first not to be computed (`num_layers`: the last norm); to the end if left out.
            positions: How many positions, of all rows together, have logits; all if left out.
            columns: Of how many entries of the vocabulary; all if left out.
        """
        usual, of_head = self._terms(rows, seq, past, positions, columns)
        found = self.operations @ usual
        found[-1] = self.operations[-1] @ of_head
        return float(found[self._between(since, until)].sum())

    def bytes(
        self,
        rows: int,
        seq: int,
        *,
        past: int = 0,
        since: int | None = None,
        until: int | None = None,
        positions: int | None = None,
        columns: int | None = None,
        stepwise: bool = False,
    ) -> float:
        """The most bytes of activations that are held at once, without weights, logits included.

        Args:
            rows: How many rows there are.
            seq: How many tokens each has.
            past: How many tokens before these are in a cache, whose own bytes are `cache`.
            since: The layer that is the first to be looked at; from the embeddings on if left out.
            until: The layer that is the first not to be computed; to the end if left out.
            positions: How many positions, of all rows together, have logits; all if left out.
            columns: Of how many entries of the vocabulary; all if left out.
            stepwise: Whether attention is computed step by step.
        """
        held, chosen = self.stepwise if stepwise else self.usual, self._between(since, until)
        moments = held.moments[held.starts[chosen.start] : held.starts[chosen.stop]]
        return float((moments @ np.concatenate(self._terms(rows, seq, past, positions, columns))).max(initial=0.0))

    def cache(self, rows: int, tokens: int) -> float:
        """The bytes of a cache of so many rows and tokens: keys and values, states. 0 if the model has none.

        Of a sliding window all keys and values are counted: those of a prompt stay in memory behind the last of them.
        """
        return float(self.cached @ terms(rows, tokens, 0, self.chunk))

    def logits(self, positions: int, columns: int | None = None) -> int:
        """The bytes of the logits of so many positions, of all rows together, which are a part of `bytes`."""
        return positions * self.logit_bytes * (columns or self.vocabulary) // self.vocabulary

    def few_columns(self, columns: Collection[int] | None) -> int | None:
        """Of how many entries of the vocabulary logits are computed, if those are looked at; None if of all."""
        few = columns is not None and are_few_columns(len(columns), self.vocabulary)
        return len(columns) if columns is not None and few else None

    @property
    def num_layers(self) -> int:
        """How many layers are told apart."""
        return len(self.operations) - 3

    def _terms(
        self, rows: int, seq: int, past: int, positions: int | None, columns: int | None
    ) -> tuple[Polynomial, Polynomial]:
        """What polynomials of the model, and of its head, are multiplied with."""
        usual = terms(rows, seq, past, self.chunk)
        of_head = usual if positions is None else terms(positions, 1, 0, self.chunk)
        return usual, of_head * self._share(columns)

    def _share(self, columns: int | None) -> float:
        return 1.0 if columns is None else columns / self.vocabulary

    def _between(self, since: int | None, until: int | None) -> slice:
        return slice(0 if since is None else since + 1, len(self.operations) if until is None else until + 1)
