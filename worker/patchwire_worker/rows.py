"""Rows: which part of a pass's tensors belongs to an invoke, and how its rows look when their lengths differ.

In a pass every row starts at position 0 and short rows are padded on the right, so that a causal model gives each row
exactly its own numbers. An invoke sees its rows only, cut to its own longest; rows of different lengths are aligned at
their end, so that `[:, -1]` is everyone's last token, and the positions before a shorter row hold NaN (0 where the type
has none): padding that finds its way into a result cannot go unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from patchwire.sites import Axis, Leaf


@dataclass(frozen=True)
class Rows:
    """The rows of one invoke in a pass."""

    start: int
    """The first."""
    lengths: tuple[int, ...]
    """How many tokens each has."""
    batch: int
    """How many rows the pass has."""
    seq: int
    """How many tokens its longest row has."""

    @cached_property
    def longest(self) -> int:
        """The length of the invoke's longest row."""
        return max(self.lengths)

    @cached_property
    def ragged(self) -> bool:
        """Whether its rows differ in length."""
        return len(set(self.lengths)) > 1

    @cached_property
    def everything(self) -> bool:
        """Whether the pass has no other rows and no padding."""
        return not self.ragged and len(self.lengths) == self.batch and self.longest == self.seq

    def take(self, whole: Tensor, leaf: Leaf) -> Tensor:
        """This invoke's part of a site's tensor; a view of it where possible."""
        if self.everything:
            return whole
        whole, axes = self._unflattened(whole, leaf)
        if Axis.BATCH in axes:
            whole = whole.narrow(axes.index(Axis.BATCH), self.start, len(self.lengths))
        if self.ragged and Axis.BATCH in axes and Axis.SEQ in axes:
            part = self._aligned(whole, axes)
        else:
            part = self._cut(whole, axes, self.longest)
        return self._flattened(part, leaf)

    def computed(self, whole: Tensor) -> Tensor:
        """What a tensor `[batch, seq, …]` has of this invoke's rows, all positions that were computed; a view of it."""
        return whole.narrow(0, self.start, len(self.lengths))

    def put(self, whole: Tensor, leaf: Leaf, part: Tensor, *, mutable: bool = False) -> Tensor:
        """The site's tensor with this invoke's part replaced; other rows and padding stay as they are.

        Args:
            whole: The site's tensor.
            leaf: What its dimensions are.
            part: The invoke's part.
            mutable: Whether the site's tensor may be changed in place.
        """
        if self.everything:
            return part
        flat = whole if mutable else whole.clone(memory_format=torch.contiguous_format)
        target, axes = self._unflattened(flat, leaf)
        source, _ = self._unflattened(part, leaf, own=True)
        if Axis.BATCH in axes:
            target = target.narrow(axes.index(Axis.BATCH), self.start, len(self.lengths))
        if self.ragged and Axis.BATCH in axes and Axis.SEQ in axes:
            batch = axes.index(Axis.BATCH)
            for row, length in enumerate(self.lengths):
                place = self._cut(target.narrow(batch, row, 1), axes, length)
                place.copy_(self._cut(source.narrow(batch, row, 1), axes, length, from_end=True))
        else:
            self._cut(target, axes, self.longest).copy_(source)
        return flat

    def _aligned(self, rows: Tensor, axes: list[Axis]) -> Tensor:
        batch = axes.index(Axis.BATCH)
        shape = [self.longest if axis is Axis.SEQ else length for axis, length in zip(axes, rows.shape, strict=True)]
        filler = float("nan") if rows.is_floating_point() or rows.is_complex() else 0
        part = rows.new_full(shape, filler)
        for row, length in enumerate(self.lengths):
            place = self._cut(part.narrow(batch, row, 1), axes, length, from_end=True)
            place.copy_(self._cut(rows.narrow(batch, row, 1), axes, length))
        return part

    @staticmethod
    def _cut(tensor: Tensor, axes: list[Axis], length: int, *, from_end: bool = False) -> Tensor:
        for dim, axis in enumerate(axes):
            if axis is Axis.SEQ:
                tensor = tensor.narrow(dim, tensor.shape[dim] - length if from_end else 0, length)
        return tensor

    def _unflattened(self, tensor: Tensor, leaf: Leaf, *, own: bool = False) -> tuple[Tensor, list[Axis]]:
        """The tensor with rows and tokens in dimensions of their own, and what each dimension is."""
        batch, seq = (len(self.lengths), self.longest) if own else (self.batch, self.seq)
        axes: list[Axis] = []
        for dim in leaf.shape:
            if dim.axis is Axis.BATCH_SEQ:
                tensor = tensor.unflatten(len(axes), (batch, seq))  # type: ignore[no-untyped-call]
                axes += [Axis.BATCH, Axis.SEQ]
            else:
                axes.append(dim.axis)
        return tensor, axes

    @staticmethod
    def _flattened(tensor: Tensor, leaf: Leaf) -> Tensor:
        for index, dim in enumerate(leaf.shape):
            if dim.axis is Axis.BATCH_SEQ:
                tensor = tensor.flatten(index, index + 1)
        return tensor


@dataclass(frozen=True)
class SomePositions(Rows):
    """The rows of one invoke in a tensor `[position, 1, …]` that has some positions of each row, one after the other.

    It looks as if it had all of them: what is at the others is of no meaning, and nobody looks there.
    """

    first: int = 0
    """Where those of its first row begin."""
    count: int = 0
    """How many each row has."""
    places: Mapping[int, int] = field(default_factory=dict)
    """The positions that are looked at, of rows that are aligned at their end, and which of its row's each is."""
    length: int = 0
    """How many positions it looks as if it had."""

    def take(self, whole: Tensor, leaf: Leaf) -> Tensor:
        """This invoke's part; a view of it if one position is looked at, or none."""
        if not self.places:
            return whole.narrow(0, 0, 1).expand(len(self.lengths), self.length, *whole.shape[2:])
        mine = self.computed(whole)
        if len(self.places) == 1:
            (place,) = self.places.values()
            return mine.narrow(1, place, 1).expand(-1, self.length, *mine.shape[2:])
        index = torch.zeros(self.length, dtype=torch.long)
        for position, place in self.places.items():
            index[position] = place
        return mine.index_select(1, index.to(mine.device))

    def computed(self, whole: Tensor) -> Tensor:
        """What a tensor has of this invoke's rows, `[row, place, …]`; a view of it."""
        rows = len(self.lengths)
        mine = whole.narrow(0, self.first, rows * self.count)
        return mine.view(rows, self.count, *mine.shape[2:])


@dataclass(frozen=True)
class LaterPositions(Rows):
    """The rows of one invoke in a tensor `[batch, seq, …]` that was computed from some position on only.

    It looks as if it had those before too: what is there is of no meaning, and nobody looks there or changes it.
    """

    past: int = 0
    """How many positions come before."""

    def take(self, whole: Tensor, leaf: Leaf) -> Tensor:
        """This invoke's part, after as many positions as are missing; always a copy."""
        mine = super().take(whole, leaf)
        part = mine.new_empty((mine.shape[0], self.past + mine.shape[1], *mine.shape[2:]))
        part[:, : self.past] = float("nan") if mine.is_floating_point() or mine.is_complex() else 0
        part[:, self.past :] = mine
        return part

    def put(self, whole: Tensor, leaf: Leaf, part: Tensor, *, mutable: bool = False) -> Tensor:
        """The site's tensor with this invoke's part replaced, as far as it was computed."""
        return super().put(whole, leaf, part[:, self.past :], mutable=mutable)
