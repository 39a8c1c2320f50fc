"""The vocabulary as the model's own words for its vectors: which tokens a vector of the residual stream speaks for.

A vector times the unembedding is a number for each token. Of many vectors these are far too many numbers, and of all
pairs of tokens even more: they are made on the server a block at a time, and of each block only the largest are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from patchwire.errors import InputError, here
from patchwire.methods.prompts import words_of
from patchwire.methods.result import Result
from patchwire.model import Model
from patchwire.session import Session

BLOCK = 1 << 22
"""How many numbers a block has, at most, unless the vocabulary alone is larger: 16 MiB of float32."""


@dataclass(frozen=True, eq=False)
class TopTokens:
    """The tokens that each of some vectors speaks for most."""

    scores: Result
    """`[…, token]` float32: their logits, the largest first."""
    ids: Tensor = field(repr=False)
    """`[…, token]` int64: which tokens they are."""
    model: Model = field(repr=False)

    @cached_property
    def _words(self) -> dict[int, str]:
        found = sorted(set(self.ids.flatten().tolist()))
        return dict(zip(found, words_of(self.model, found), strict=True))

    def at(self, *place: int) -> list[tuple[str, float]]:
        """The tokens of one vector with their logits, the largest first.

        Args:
            place: An index for each dimension but the last.
        """
        ids, scores = self.ids[place].tolist(), self.scores.values[place].tolist()
        return [(self._words[token], score) for token, score in zip(ids, scores, strict=True)]


@dataclass(frozen=True)
class Projected:
    """What `project` has asked for, there when its session has ended."""

    scores: Any
    ids: Any
    ranks: Any
    """Of the tokens that were asked for."""
    count: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The largest logits and their tokens `[vectors, top]`, and the ranks `[vectors]`."""
        scores, ids, ranks = (each.value.flatten(0, 1)[: self.count] for each in (self.scores, self.ids, self.ranks))
        return scores, ids, ranks


def project(session: Session, vectors: Any, unembedding: Any, top: int, of: Tensor | None = None) -> Projected:
    """Record the projection of vectors to the vocabulary, block by block.

    Args:
        session: The open session.
        vectors: `[vectors, d_model]`, a value.
        unembedding: `[d_model, vocabulary]`, a value.
        top: How many tokens of each vector.
        of: Token ids `[vectors]` whose ranks among all tokens are asked for.

    Raises:
        InputError: there are not so many tokens.
    """
    count, vocabulary = vectors.shape[0], unembedding.shape[1]
    check_top(top, vocabulary)
    size = block_size(count, vocabulary)
    asked = torch.zeros(count, dtype=torch.long) if of is None else of
    weight = unembedding.float()
    loop: Any = session.repeat(-(-count // size))
    with loop:
        index = (loop.index * size + torch.arange(size)).clamp(max=count - 1)
        logits = vectors[index].float() @ weight
        largest = logits.topk(top)
        own = logits.gather(1, torch.index_select(asked, 0, index)[:, None])
        ranks = (logits > own).sum(1).save()
        scores, ids = largest[0].save(), largest[1].save()
    return Projected(scores, ids, ranks, count)


@dataclass(frozen=True)
class Paired:
    """What `project_pairs` has asked for, there when its session has ended."""

    scores: Any
    cells: Any
    columns: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The largest numbers of the product, and their rows and columns, `[top]` each."""
        return self.scores.value, self.cells.value // self.columns, self.cells.value % self.columns


def project_pairs(session: Session, rows: Any, left: Any, right: Any, columns: Any, top: int) -> Paired:
    """Record the search for the largest numbers of `rows @ left @ right @ columns`, of which no more than a block is
    ever there.

    Args:
        session: The open session.
        rows: `[vocabulary, d_model]`, a value.
        left: `[d_model, rank]`, a value.
        right: `[rank, d_model]`, a value.
        columns: `[d_model, vocabulary]`, a value.
        top: How many.

    Raises:
        InputError: there are not so many pairs.
    """
    count, width = rows.shape[0], columns.shape[1]
    size = block_size(count, width)
    check_top(top, count * width, "pairs of tokens")
    left, right, columns = left.float(), right.float(), columns.float()
    # In the order in which less is computed, and nothing made that is larger than the embeddings.
    left, right = (left, right @ columns) if left.shape[1] <= left.shape[0] else (left @ right, columns)
    loop: Any = session.repeat(-(-count // size))
    with loop:
        best, cells = loop.carry(torch.full((top,), -torch.inf)), loop.carry(torch.full((top,), -1))
        index = loop.index * size + torch.arange(size)
        block = rows[index.clamp(max=count - 1)].float() @ left @ right
        block = torch.where((index < count)[:, None], block, -torch.inf)
        largest, place = block.flatten().topk(min(top, size * width))
        found = index[place // width] * width + place % width
        best_now, chosen = torch.cat([best, largest]).topk(top)
        loop.update(cells, torch.cat([cells, found])[chosen])
        loop.update(best, best_now)
    best, cells = loop.result(best), loop.result(cells)
    return Paired(best.save(), cells.save(), width)


def block_size(rows: int, columns: int) -> int:
    """How many rows of a matrix are in a block."""
    return max(1, min(rows, BLOCK // columns))


def check_top(top: int, count: int, what: str = "tokens") -> None:
    """Check that one can have the `top` largest of so many.

    Raises:
        InputError: one cannot.
    """
    if not 1 <= top <= count:
        raise InputError(f"There are {count} {what}: `top` is from 1 to this, not {top}.", lines=here())
