"""Reproducible randomness: noise that is made on the worker from a seed that the program names.

    noise = patchwire.random.normal(hidden, seed=0)          # of the shape and dtype of a value
    mask = patchwire.random.bernoulli(hidden.shape, 0.9, seed=1)

Nothing of it travels, and it is the same in every run, beside whatever shares the batch, and on every device. Outside
of a block the same call gives the same numbers as a tensor.

With a list of seeds, one for each row, a row's noise follows from its own seed alone. Rows of different lengths end
together; give their `lengths` too, and each row's noise is drawn for its own tokens (0 before them), as it would be for
that prompt alone:

    lengths = [len(row) for row in trace.tokens]
    patchwire.random.normal(hidden, seed=[10, 11, 12], lengths=lengths)
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from patchwire import ops
from patchwire.errors import GraphError, ShapeError, here
from patchwire.noise import Seed
from patchwire.proxy import Structure, Value
from patchwire.tracing import open_recorder

Like = Value | Tensor | Sequence[int] | int
"""A value or tensor whose shape is meant, or a shape."""
Noise = Any
"""A value inside a block, a tensor outside of one."""


def normal(like: Like, *, seed: Seed, dtype: torch.dtype | None = None, lengths: Sequence[int] | None = None) -> Noise:
    """Standard normal numbers: what `torch.randn` draws from `torch.Generator().manual_seed(seed)`.

    Args:
        like: A value or tensor of the shape that is meant, or that shape (`hidden.shape`).
        seed: Of all, or of each row, `[row, …]`.
        dtype: The element type, float32 or that of `like` if left out. Drawn as float32 and converted: the same noise
            in every dtype.
        lengths: How many tokens each row has, for seeds of rows: row i's noise stands in its last `lengths[i]`
            positions of the second dimension, and 0 before.

    Raises:
        ShapeError: seeds or lengths do not fit the shape.
        LimitError: it is larger than the server allows.
    """
    size, own = _size(like)
    return _draw("normal", (size,), seed, dtype=dtype or own, lengths=lengths)


def uniform(like: Like, *, seed: Seed, dtype: torch.dtype | None = None, lengths: Sequence[int] | None = None) -> Noise:
    """Numbers uniform in [0, 1), as `torch.rand`; arguments and errors are those of `normal`.

    A choice with probabilities of its own for every element is `patchwire.random.uniform(p, seed=0) < p`.
    """
    size, own = _size(like)
    return _draw("uniform", (size,), seed, dtype=dtype or own, lengths=lengths)


def bernoulli(
    like: Like, p: float, *, seed: Seed, dtype: torch.dtype | None = None, lengths: Sequence[int] | None = None
) -> Noise:
    """1 with probability `p`, else 0: `torch.rand(…) < p`, in float32 or the dtype of `like` if none is given.

    Other arguments and errors are those of `normal`.
    """
    size, own = _size(like)
    return _draw("bernoulli", (size, p), seed, dtype=dtype or own, lengths=lengths)


def randint(
    like: Like,
    low: int,
    high: int,
    *,
    seed: Seed,
    dtype: torch.dtype = torch.int64,
    lengths: Sequence[int] | None = None,
) -> Noise:
    """Integers from `low` to `high - 1`, as `torch.randint`; other arguments and errors are those of `normal`."""
    return _draw("randint", (_size(like)[0], low, high), seed, dtype=dtype, lengths=lengths)


def randperm(n: int, *, seed: int) -> Noise:
    """The integers from 0 to `n - 1` in random order, `[n]` int64: `value[patchwire.random.randperm(8, seed=0)]`."""
    return _draw("randperm", (n,), seed)


def _size(like: Like) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape that is meant, and the dtype that goes with it."""
    if isinstance(like, (Value, Tensor)):
        return tuple(like.shape), like.dtype
    if isinstance(like, Structure):
        raise like.not_one_tensor()
    if isinstance(like, int):
        return (like,), torch.float32
    try:
        return tuple(index(each) for each in like), torch.float32
    except TypeError:
        raise GraphError(
            f"A {type(like).__name__} is not a shape.",
            hint="Write `patchwire.random.normal(value, seed=0)`, or a shape: `value.shape`, `(2, 3)`.",
            lines=here(),
        ) from None


def _draw(name: str, args: tuple[Any, ...], seed: Seed, **options: Any) -> Noise:
    if isinstance(seed, range):
        seed = list(seed)
    kwargs = {"seed": seed} | {key: each for key, each in options.items() if each is not None}
    operation = ops.OPERATIONS[f"patchwire.random.{name}"]
    recorder = open_recorder()
    if recorder is not None:
        return recorder.call(operation, args, kwargs)
    try:
        return operation.function(*args, **kwargs)
    except ValueError as error:
        hint = "`help(patchwire.random.normal)` says what fits."
        raise ShapeError(f"`{name}` cannot be done: {error}", hint=hint, lines=here()) from None
