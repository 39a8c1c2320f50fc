"""Bytes of saved values that wait on the disk, because whoever asked takes them more slowly than the model makes them.

The file of a request has no name: it goes with the request, or with the server, however that ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
from pathlib import Path
from typing import IO

from patchwire.errors import ExecutionError, LimitError

log = logging.getLogger(__name__)


class Disk:
    """How much of the disk the values of all requests may take. May be used from any thread."""

    def __init__(self, limit: int, directory: Path | None = None) -> None:
        """
        Args:
            limit: Bytes.
            directory: Where; None takes the system's directory for temporary files.
        """
        self.limit = limit
        self.directory = directory
        self._taken = 0
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """Bytes that are taken now."""
        return self._taken

    def take(self, length: int) -> None:
        """Count so many bytes more.

        Raises:
            LimitError: there is no room for them.
        """
        with self._lock:
            if self._taken + length > self.limit:
                raise LimitError(
                    f"Saved values that nobody has taken yet would have {self._taken + length:,} bytes; the server "
                    f"holds {self.limit:,}.",
                    hint="Save less in one request, or take what is saved faster.",
                )
            self._taken += length

    def give_back(self, length: int) -> None:
        """Count so many bytes less."""
        with self._lock:
            self._taken -= length


class OnDisk:
    """Bytes that are in a file."""

    def __init__(self, file: WaitingFile, start: int, length: int) -> None:
        self._file = file
        self._start = start
        self._length = length

    def __len__(self) -> int:
        return self._length

    def read(self) -> bytes:
        """The bytes; to be read once.

        Raises:
            ExecutionError: they cannot be read.
        """
        found = self._file.read(self._start, self._length)
        self._file.has_been_read()
        return found


class WaitingFile:
    """The file of one request. One thread may write while another reads."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._file: IO[bytes] | None = None
        self._length = 0
        self._unread = 0
        self._closed = False
        self._lock = threading.Lock()

    def put(self, data: bytes) -> OnDisk | None:
        """Write some bytes; None if nobody will read them any more.

        Raises:
            LimitError: the disk has no room that it may take.
            ExecutionError: it cannot be written.
        """
        with self._lock:
            if self._closed:
                return None
            self._disk.take(len(data))
            start, self._length = self._length, self._length + len(data)
            self._unread += 1
        try:
            with self._lock:
                if self._closed:
                    return None
                if self._file is None:
                    self._file = _nameless(self._disk.directory)
                file = self._file
            _write(file, memoryview(data), start)
        except OSError as error:
            log.error("a saved value could not be written to the disk: %s", error)
            raise ExecutionError(
                f"The server could not write a saved value to its disk: {error.strerror}.",
                hint="Whoever runs the server has to make room there; or save less in one request.",
            ) from None
        return OnDisk(self, start, len(data))

    def read(self, start: int, length: int) -> bytes:
        """Some bytes.

        Raises:
            ExecutionError: they cannot be read.
        """
        file = self._file
        with contextlib.suppress(OSError):
            found = os.pread(file.fileno(), length, start) if file is not None else b""
            if len(found) == length:
                return found
        raise ExecutionError("A saved value cannot be read back from the server's disk.", hint="Run it again.")

    def has_been_read(self) -> None:
        """Something that was written is not needed any more. When none is, the file begins anew."""
        with self._lock:
            self._unread -= 1
            if not self._unread and self._file is not None:
                self._file.truncate(0)
                self._disk.give_back(self._length)
                self._length = 0

    def close(self) -> None:
        """Nobody reads any more."""
        with self._lock:
            self._closed = True
            self._file = None  # closed when nobody reads or writes it any more
            self._disk.give_back(self._length)
            self._length = 0


def _nameless(directory: Path | None) -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="patchwire-", dir=directory, buffering=0)


def _write(file: IO[bytes], data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(file.fileno(), data, position)
        data, position = data[written:], position + written
