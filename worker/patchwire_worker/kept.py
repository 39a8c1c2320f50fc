"""Values that outlive their request: each under a handle that nobody can guess, for a time, up to so many bytes.

Unlike uploaded tensors, which a client can send again, these exist nowhere else. So nothing is dropped to make room: a
full store refuses.
"""

from __future__ import annotations

import heapq
import secrets
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from patchwire.errors import GraphError, LimitError

_HANDLE_BYTES = 16
_BYTES_OF_ENTRY = 1024
"""What is counted for a value besides its own bytes, so that there are not too many small ones."""


@dataclass(frozen=True)
class _Entry:
    tensor: Tensor
    expires: float

    @property
    def size(self) -> int:
        return self.tensor.nbytes + _BYTES_OF_ENTRY


class KeptStore:
    """Tensors by their handle, on the CPU."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: dict[bytes, _Entry] = {}
        self._bytes = 0
        self._expiring: list[tuple[float, bytes]] = []  # a heap; some that were forgotten may still be in it
        self._lock = threading.Lock()

    def put(self, tensor: Tensor, seconds: float) -> bytes:
        """Keep a tensor for some time; its handle.

        Raises:
            LimitError: there is no room for it.
        """
        entry = _Entry(tensor, time.monotonic() + seconds)
        with self._lock:
            self._drop_expired()
            room = self.limit - self._bytes
            if entry.size > room:
                raise LimitError(
                    f"A value of {tensor.nbytes:,} bytes cannot be kept: of the server's {self.limit:,} bytes for kept "
                    f"values, {max(room, 0):,} are free.",
                    hint="Give back what is not needed any more with `kept.forget()`, or keep a part of it.",
                )
            handle = secrets.token_bytes(_HANDLE_BYTES)
            self._entries[handle] = entry
            self._bytes += entry.size
            heapq.heappush(self._expiring, (entry.expires, handle))
        return handle

    def get(self, handle: bytes) -> Tensor:
        """The tensor of a handle.

        Raises:
            GraphError: there is none (any more).
        """
        with self._lock:
            self._drop_expired()
            entry = self._entries.get(handle)
        if entry is None:
            raise GraphError(
                "A kept value is not on this server: its time is over, it was forgotten, or the server started anew.",
                hint="Compute it again, and keep it for longer: `value.keep(seconds=…)`.",
            )
        return entry.tensor

    def forget(self, handles: Iterable[bytes]) -> int:
        """Remove values; how many there were."""
        with self._lock:
            self._drop_expired()
            found = sum(map(self._drop, handles))
            if len(self._expiring) > 2 * len(self._entries):
                self._expiring = [(entry.expires, handle) for handle, entry in self._entries.items()]
                heapq.heapify(self._expiring)
            return found

    def _drop_expired(self) -> None:
        now = time.monotonic()
        while self._expiring and self._expiring[0][0] <= now:
            self._drop(heapq.heappop(self._expiring)[1])

    def _drop(self, handle: bytes) -> bool:
        entry = self._entries.pop(handle, None)
        self._bytes -= 0 if entry is None else entry.size
        return entry is not None
