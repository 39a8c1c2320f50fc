"""Noise: tensors of random numbers that follow from a seed and a shape, and from nothing else.

Every draw is made on the CPU by a generator of its own, so it is the same on every device, in every batch and however
often it is made. It is made in one element type and then converted, so it is the same noise in every dtype, rounded.
These are the functions of the allow-list's random operations; `patchwire.random` is how programs call them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Generator, Tensor

Seed = int | Sequence[int]
"""A seed of a whole tensor, or one of each of its rows."""

_MAX_DIMENSIONS = 64


def normal(
    size: Sequence[int],
    seed: Seed,
    dtype: torch.dtype = torch.float32,
    lengths: Sequence[int] | None = None,
    device: str = "cpu",
) -> Tensor:
    """Standard normal: `torch.randn(size, generator=…)` as float32, converted."""
    _check_floating(dtype)
    return _drawn(size, seed, dtype, lengths, device, lambda shape, generator: torch.randn(shape, generator=generator))


def uniform(
    size: Sequence[int],
    seed: Seed,
    dtype: torch.dtype = torch.float32,
    lengths: Sequence[int] | None = None,
    device: str = "cpu",
) -> Tensor:
    """Uniform in [0, 1): `torch.rand(size, generator=…)` as float32, converted; a narrow dtype may round up to 1."""
    _check_floating(dtype)
    return _drawn(size, seed, dtype, lengths, device, lambda shape, generator: torch.rand(shape, generator=generator))


def bernoulli(
    size: Sequence[int],
    p: float,
    seed: Seed,
    dtype: torch.dtype = torch.float32,
    lengths: Sequence[int] | None = None,
    device: str = "cpu",
) -> Tensor:
    """1 with probability `p` and 0 otherwise: `torch.rand(size, generator=…) < p`, converted."""
    if not _is_number(p) or not 0 <= p <= 1:
        raise ValueError(f"a probability is a number from 0 to 1, not {p!r}")
    return _drawn(
        size, seed, dtype, lengths, device, lambda shape, generator: torch.rand(shape, generator=generator) < p
    )


def randint(
    size: Sequence[int],
    low: int,
    high: int,
    seed: Seed,
    dtype: torch.dtype = torch.int64,
    lengths: Sequence[int] | None = None,
    device: str = "cpu",
) -> Tensor:
    """Integers from `low` to `high - 1`: `torch.randint(low, high, size, generator=…)`, converted."""
    if not (_is_integer(low) and _is_integer(high)) or low >= high:
        raise ValueError(f"there is no integer from {low!r} to below {high!r}")
    return _drawn(
        size,
        seed,
        dtype,
        lengths,
        device,
        lambda shape, generator: torch.randint(low, high, shape, generator=generator),
    )


def randperm(n: int, seed: int, device: str = "cpu") -> Tensor:
    """The integers from 0 to `n - 1` in random order: `torch.randperm(n, generator=…)`, `[n]` int64."""
    _check_seeds([seed])
    return _drawn((n,), seed, torch.int64, None, device, lambda _, generator: torch.randperm(n, generator=generator))


FUNCTIONS: tuple[Callable[..., Tensor], ...] = (normal, uniform, bernoulli, randint, randperm)
"""All of them."""


def _drawn(
    size: Sequence[int],
    seed: Seed,
    dtype: torch.dtype,
    lengths: Sequence[int] | None,
    device: str,
    draw: Callable[[Sequence[int], Generator], Tensor],
) -> Tensor:
    if not isinstance(size, (tuple, list)) or len(size) > _MAX_DIMENSIONS or not all(map(_is_length, size)):
        raise ValueError(f"a shape is a tuple of lengths, not {str(size)[:80]}")
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{str(dtype)[:80]} is not a dtype")
    whole = torch.zeros(tuple(size), dtype=dtype, device=device)
    for part, each in _parts(whole, seed, lengths):
        if device != "meta":
            part.copy_(draw(part.shape, Generator().manual_seed(each)))
    return whole


def _parts(whole: Tensor, seed: Seed, lengths: Sequence[int] | None) -> Iterator[tuple[Tensor, int]]:
    """What is drawn in one go, and from which seed."""
    if not isinstance(seed, (tuple, list)):
        _check_seeds([seed])
        if lengths is not None:
            raise ValueError("`lengths` are of rows: give each row a seed of its own, `seed=[…]`")
        yield whole, seed  # type: ignore[misc]
        return
    _check_seeds(seed)
    if whole.ndim == 0 or len(seed) != len(whole):
        raise ValueError(f"{len(seed)} seeds do not fit {list(whole.shape)}: it takes one for each row")
    if lengths is None:
        yield from zip(whole, seed, strict=True)
        return
    fits = isinstance(lengths, (tuple, list)) and len(lengths) == len(whole) and whole.ndim > 1
    if not fits or not all(_is_length(each) and each <= whole.shape[1] for each in lengths):
        raise ValueError(f"these lengths do not fit {list(whole.shape)}: it takes one for each row, [batch, seq, …]")
    for row, each, length in zip(whole, seed, lengths, strict=True):
        yield row[len(row) - length :], each


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_length(value: object) -> bool:
    return isinstance(value, int) and _is_integer(value) and value >= 0


def _check_seeds(seeds: Sequence[object]) -> None:
    if wrong := [each for each in seeds if not _is_integer(each)]:
        raise ValueError(f"a seed is an int, not {str(wrong[0])[:80]}")


def _check_floating(dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"these are real numbers, and {str(dtype)[:80]} is not a dtype for them")
