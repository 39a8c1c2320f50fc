"""What was checked once is not checked again: an operation that is given what looks alike gives what looks alike.

The traces of a sweep ask for the same operations on tensors of the same looks, hundreds of times. A fake has no
numbers: its lengths, strides, offset and dtype, and with which other arguments it shares memory, are all that PyTorch's
rules can see of it. So a result is remembered by these and by the plain arguments, and the next one is made in its
likeness, with memory of its own or as a view of the same argument. Only what was found to be in order is remembered; an
error is found again for each node, at its own line.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor
from torch.fx.immutable_collections import immutable_dict, immutable_list

_MOST_REMEMBERED = 1 << 12
_MOST_ARGUMENTS = 64
_PLAIN = frozenset({bool, int, float, str, type(None), type(Ellipsis), torch.dtype})
_SEQUENCES = frozenset({tuple, list, immutable_list})
_MAPPINGS = frozenset({dict, immutable_dict})


class _Look(NamedTuple):
    """What a result looks like."""

    source: int | None
    """The argument that it shares memory with, if it does."""
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt
    dtype: torch.dtype


_REMEMBERED: dict[Hashable, _Look] = {}
_LOCK = threading.Lock()


class _OddError(Exception):
    """An argument is not of the kinds that are remembered."""


class Asked:
    """What an operation is asked for, on arguments that look so and so."""

    def __init__(self, what: Hashable, args: Any, kwargs: Any) -> None:
        """
        Args:
            what: The operation, and whatever else its check depends on.
            args: Its arguments; nodes stand for their fakes.
            kwargs: Its arguments by name.

        Raises:
            _OddError: what it gives is not to be remembered.
        """
        self._tensors: list[Tensor] = []
        self._places: dict[int, int] = {}
        self._left = _MOST_ARGUMENTS
        # PyTorch's own default decides what whole numbers are divided to.
        self._key = (what, torch.get_default_dtype(), self._look(args), self._look(kwargs))

    @classmethod
    def of(cls, what: Hashable, node: torch.fx.Node) -> Asked | None:
        """What a node asks for; None if what it gives is not to be remembered."""
        try:
            return cls(what, node.args, node.kwargs)
        except _OddError:
            return None

    def _look(self, argument: Any) -> Hashable:
        kind = type(argument)
        if kind in _PLAIN:
            return kind, argument  # 1, 1.0 and True are equal, and not alike
        if kind is torch.fx.Node:
            argument = argument.meta.get("fake")
            kind = type(argument)
        if kind is Tensor:
            return self._look_of(argument)
        if kind is slice:
            start, stop, step = argument.start, argument.stop, argument.step
            if start is stop is step is None:
                return slice
            return slice, self._look(start), self._look(stop), self._look(step)
        if kind in _SEQUENCES:
            self._count(len(argument))
            # What is plain is most of what there is, and not worth a call.
            return kind, *[(type(each), each) if type(each) in _PLAIN else self._look(each) for each in argument]
        if kind in _MAPPINGS:
            self._count(len(argument))
            return kind, *[(name, self._look(each)) for name, each in argument.items()]
        raise _OddError

    def _count(self, arguments: int) -> None:
        self._left -= arguments
        if self._left < 0:
            raise _OddError

    def _look_of(self, tensor: Tensor) -> Hashable:
        if not _is_plain(tensor):
            raise _OddError
        place = self._places.setdefault(tensor.untyped_storage()._cdata, len(self._tensors))
        self._tensors.append(tensor)
        return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, place

    def known(self) -> Tensor | None:
        """What it gives; None if that is not known."""
        look = _REMEMBERED.get(self._key)
        if look is None:
            return None
        if look.source is None:
            return torch.empty_strided(look.shape, look.stride, dtype=look.dtype, device="meta")
        return self._tensors[look.source].as_strided(look.shape, look.stride, look.offset)

    def remember(self, result: Any) -> None:
        """Remember what it gave, if that is one tensor."""
        if type(result) is not Tensor or not _is_plain(result):
            return
        source = self._places.get(result.untyped_storage()._cdata)
        look = _Look(source, result.shape, result.stride(), result.storage_offset(), result.dtype)
        if look.offset if source is None else look.dtype != self._tensors[source].dtype:
            return  # it could not be made again from what is remembered
        with _LOCK:
            _REMEMBERED[self._key] = look
            if len(_REMEMBERED) > _MOST_REMEMBERED:
                del _REMEMBERED[next(iter(_REMEMBERED))]


def _is_plain(tensor: Tensor) -> bool:
    """Whether shape, strides, offset and dtype are all that there is to a tensor."""
    return tensor.is_meta and not (tensor.is_conj() or tensor.is_neg() or tensor.requires_grad)
