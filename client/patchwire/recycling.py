"""Memory for large tensors, used again when they are gone.

To get fresh memory from the system costs more than to fill it: on its way to a program every page is cleared and mapped
one by one. So what a large tensor leaves behind is kept for the next one, and the system is told that it may take it
back at any time.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FROM_BYTES = 4 << 20
"""Smaller tensors are left to PyTorch."""
KEPT_BYTES = 512 << 20
"""Bytes that are kept at most."""

_SLACK = 1.25
_LONGEST_IN_HEAP = 31 << 20
_HUGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
"""Asks for pages of 2 MiB: three times as fast to fill for the first time as those of 4 KiB."""
_POSSIBLE = hasattr(mmap, "MADV_FREE") and hasattr(mmap, "MAP_ANONYMOUS")


class _Free:
    """The pieces of memory that nobody uses."""

    def __init__(self) -> None:
        self._pieces: list[mmap.mmap] = []
        # A tensor may go at any moment, also while this thread is in here.
        self._lock = threading.RLock()

    def take(self, size: int) -> mmap.mmap:
        """A piece of at least so many bytes."""
        with self._lock:
            fitting = [each for each in self._pieces if size <= len(each) <= size * _SLACK]
            if fitting:
                piece = min(fitting, key=len)
                self._remove(piece)
                return piece
            # What does not fit goes, so that more is never held than is used at some time.
            self._shrink(sum(map(len, self._pieces)) - size)
        piece = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if _HUGE is not None:
            with contextlib.suppress(OSError):  # a system that has none
                piece.madvise(_HUGE)
        return piece

    def give(self, piece: mmap.mmap) -> None:
        """Take back a piece."""
        piece.madvise(mmap.MADV_FREE)
        with self._lock:
            self._pieces.append(piece)
            self._shrink(KEPT_BYTES)

    def _shrink(self, size: int) -> None:
        """Let go of the oldest pieces until there are so many bytes at most."""
        while self._pieces and sum(map(len, self._pieces)) > size:
            del self._pieces[0]

    def _remove(self, piece: mmap.mmap) -> None:
        self._pieces = [each for each in self._pieces if each is not piece]


_FREE = _Free()


def keep_freed() -> None:
    """Have the C library keep more of what is freed, for what comes next.

    By itself it keeps less than a few messages of a large tensor, and each would be given fresh memory by the system.
    glibc learns how much to keep from the longest piece that is freed, up to 32 MiB; other libraries are left as is.
    """
    bytearray(_LONGEST_IN_HEAP)  # freed at once; it was never written, so it costs nothing


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of any numbers, on the CPU, as `torch.empty` gives it."""
    size = math.prod(shape) * dtype.itemsize
    if size < FROM_BYTES or not _POSSIBLE:
        return torch.empty(tuple(shape), dtype=dtype)
    piece = _FREE.take(size)
    array = np.frombuffer(piece, np.uint8)
    weakref.finalize(array, _FREE.give, piece).atexit = False
    return torch.from_numpy(array)[:size].view(dtype).reshape(tuple(shape))


def copy(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy on the CPU, of this element type or another."""
    into = empty(tensor.shape, dtype or tensor.dtype)
    return into.copy_(tensor.detach())
