"""Tensors inside what modules take and return: tuples, lists, mappings, model outputs, and calls `(args, kwargs)`.

Other objects (caches, configurations) are left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from patchwire.sites import CALL, INPUT, Path


def tensors(value: Any, side: str) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor in the value of a side, with its path; of an input, the paths start with "args" or "kwargs"."""
    if side == INPUT:
        for name, part in zip(CALL, value, strict=True):
            yield from ((((name, *path)), tensor) for path, tensor in _inside(part))
    else:
        yield from _inside(value)


def _inside(value: Any) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        yield (), value
    elif isinstance(value, (tuple, list)):
        for index, each in enumerate(value):
            yield from (((index, *path), tensor) for path, tensor in _inside(each))
    elif isinstance(value, Mapping):
        for key, each in value.items():
            if isinstance(key, str):
                yield from (((key, *path), tensor) for path, tensor in _inside(each))


def get(value: Any, side: str, path: Path) -> Any:
    """What is at a path.

    Raises:
        KeyError, IndexError, TypeError: there is nothing.
    """
    if side == INPUT:
        value, path = value[CALL.index(path[0])], path[1:]
    for step in path:
        value = value[step]
    return value


def replaced(value: Any, side: str, path: Path, new: Any) -> Any:
    """A copy of the containers on the way, with `new` at a path; the rest is shared."""
    if side == INPUT:
        args, kwargs = value
        if path[0] == CALL[0]:
            return _replaced(args, path[1:], new), kwargs
        return args, _replaced(kwargs, path[1:], new)
    return _replaced(value, path, new)


def _replaced(value: Any, path: Path, new: Any) -> Any:
    if not path:
        return new
    step, rest = path[0], path[1:]
    inner = _replaced(value[step], rest, new)
    if isinstance(value, tuple):
        items = [inner if index == step else each for index, each in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    changed = copy.copy(value)
    changed[step] = inner
    return changed
