"""Uploaded tensors, each under the hash of its content; the least recently used ones go when there are too many."""

from __future__ import annotations

import threading
from collections import OrderedDict

from torch import Tensor

from patchwire import tensors
from patchwire.errors import LimitError, MissingTensorsError

_BYTES_OF_ENTRY = 1024
"""What is counted for a tensor besides its own bytes, so that there are not too many small ones."""


def _size(tensor: Tensor) -> int:
    return tensor.nbytes + _BYTES_OF_ENTRY


class TensorStore:
    """Tensors by their hash, up to so many bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._tensors: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, tensor: Tensor) -> bytes:
        """Keep a tensor; its hash.

        Raises:
            LimitError: it alone is larger than the store.
        """
        if _size(tensor) > self.limit:
            raise LimitError(
                f"A tensor of {tensor.nbytes:,} bytes does not fit; the server keeps {self.limit:,}.",
                hint="Use a smaller one.",
            )
        name = tensors.digest(tensor)
        with self._lock:
            if name not in self._tensors:
                self._bytes += _size(tensor)
            self._tensors[name] = tensor
            self._tensors.move_to_end(name)
            while self._bytes > self.limit:
                _, dropped = self._tensors.popitem(last=False)
                self._bytes -= _size(dropped)
        return name

    def get(self, names: list[bytes]) -> list[Tensor]:
        """The tensors of these hashes.

        Raises:
            MissingTensorsError: some are not here (any more).
        """
        with self._lock:
            missing = [name for name in names if name not in self._tensors]
            if missing:
                error = MissingTensorsError(f"{len(missing)} tensors that the graph refers to are not on the server.")
                error.missing = tuple(missing)
                raise error
            for name in names:
                self._tensors.move_to_end(name)
            return [self._tensors[name] for name in names]
