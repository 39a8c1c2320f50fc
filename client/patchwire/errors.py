"""What can go wrong, one exception class for each kind.

Every error says what happened, at which line of your program, and what to write instead. Errors that a server finds
come back with the same class, line and words as those found on the laptop.

| class | raised when |
|---|---|
| `SiteError` | no such site, module or parameter, or this run never reaches it |
| `ShapeError` | a value's shape or dtype does not fit |
| `OrderError` | a write needs a value that exists only later in the forward pass |
| `BranchError` | Python code needs a value while the block is still being recorded |
| `OperationError` | an operation is not on the allow-list |
| `GraphError` | a graph does not follow the protocol, or a value is used where it does not exist |
| `LimitError` | a request, tensor or result is larger than the server allows |
| `ModelNotFoundError` | the server has no such model, or a model cannot be loaded |
| `InputError` | a prompt cannot be given to the model |
| `ExecutionError` | an operation, or the model itself, failed while running |
| `VersionError` | client and server speak different versions of the protocol |
| `MissingTensorsError` | the server no longer has tensors that the graph refers to (the client uploads them again) |
| `AuthenticationError` | the token is missing or wrong |
| `ConnectionFailedError` | no server answers at this address |
| `ConnectionLostError` | the server went away in the middle of a request |
| `BusyError` | the server's queue is full |
| `TimeoutError` | a request ran longer than the server or the deadline allows |
| `CancelledError` | the request was cancelled |
| `JobError` | the server has no such job, or no longer its results |
| `StoreError` | a store of activations is damaged, or of something else |
"""

from __future__ import annotations

import importlib.util
import linecache
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import FrameType


@dataclass(frozen=True)
class SourceLine:
    """A line of the user's program."""

    file: str
    line: int
    code: str = ""

    def __str__(self) -> str:
        name = os.path.basename(self.file)
        if name.startswith("<"):
            name = self.file
        return f"    {name}:{self.line}    {self.code}".rstrip()


class PatchwireError(Exception):
    """The base of every error of Patchwire.

    Attributes:
        message: What happened.
        hint: What to write or do instead; may be empty.
        lines: The lines of the user's program that took part, the one that caused it first.
    """

    def __init__(self, message: str, *, hint: str = "", lines: Sequence[SourceLine] = ()) -> None:
        self.message = message
        self.hint = hint
        self.lines = tuple(lines)
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = [self.message]
        if self.lines:
            parts.append("\n".join(str(line) for line in self.lines))
        if self.hint:
            parts.append(self.hint)
        return "\n\n".join(parts)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.hint, self.lines))


def _rebuild(kind: type[PatchwireError], message: str, hint: str, lines: Sequence[SourceLine]) -> PatchwireError:
    return kind(message, hint=hint, lines=lines)


class SiteError(PatchwireError):
    """No such site, module or parameter, or this run never reaches it."""


class ShapeError(PatchwireError):
    """A value's shape or dtype does not fit."""


class OrderError(PatchwireError):
    """A write needs a value that exists only later in the forward pass."""


class BranchError(PatchwireError):
    """Python code needs a value while the block is still being recorded."""


class OperationError(PatchwireError, AttributeError):
    """An operation is not on the allow-list."""


class GraphError(PatchwireError):
    """A graph does not follow the protocol, or a value is used where it does not exist."""


class LimitError(PatchwireError):
    """A request, tensor or result is larger than the server allows."""


class ModelNotFoundError(PatchwireError):
    """The server has no such model, or a model cannot be loaded."""


class InputError(PatchwireError):
    """A prompt cannot be given to the model."""


class ExecutionError(PatchwireError):
    """An operation, or the model itself, failed while running."""


class VersionError(PatchwireError):
    """Client and server speak different versions of the protocol."""


class MissingTensorsError(PatchwireError):
    """The server no longer has tensors that the graph refers to.

    Attributes:
        missing: The SHA-256 of each.
    """

    missing: tuple[bytes, ...] = ()

    def __reduce__(self) -> tuple[object, ...]:
        return (*super().__reduce__(), {"missing": self.missing})


class AuthenticationError(PatchwireError):
    """The token is missing or wrong."""


class ConnectionFailedError(PatchwireError):
    """No server answers at this address."""


class ConnectionLostError(PatchwireError):
    """The server went away in the middle of a request."""


class BusyError(PatchwireError):
    """The server's queue is full."""


class TimeoutError(PatchwireError):
    """A request ran longer than the server or the deadline allows."""


class CancelledError(PatchwireError):
    """The request was cancelled."""


class JobError(PatchwireError):
    """The server has no such job, or no longer its results."""


class StoreError(PatchwireError):
    """A store of activations is damaged, or of something else."""


class PatchwireWarning(UserWarning):
    """Something that is legal and may not be what was meant."""


for _class in [each for each in globals().values() if isinstance(each, type) and issubclass(each, Exception)]:
    if _class.__module__ == __name__:
        _class.__module__ = "patchwire"  # where users find it, so that a traceback says `patchwire.SiteError`


def _folder(module: str) -> str:
    spec = importlib.util.find_spec(module)  # does not import it
    return "" if spec is None or spec.origin is None else os.path.dirname(spec.origin) + os.sep


_NOT_THE_USER = (os.path.dirname(os.path.abspath(__file__)) + os.sep, _folder("torch"))
_STANDARD_LIBRARY = os.path.dirname(os.path.abspath(linecache.__file__)) + os.sep + "contextlib"


_LONGEST_NAME = 200


def user_frame() -> FrameType | None:
    """The innermost frame that belongs neither to this package nor to torch."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _OURS[frame.f_code.co_filename]:
        frame = frame.f_back
    return frame


def trim(error: PatchwireError) -> None:
    """Cut from an error's traceback what lies below the user's own lines."""
    last, entry = None, error.__traceback__
    while entry is not None:
        if not _OURS[entry.tb_frame.f_code.co_filename]:
            last = entry
        entry = entry.tb_next
    if last is not None:
        last.tb_next = None


class _Ours(dict[str, bool]):
    """Whether a file is not the user's, found out once for each: every node that is recorded asks for many frames."""

    def __missing__(self, file: str) -> bool:
        self[file] = file.startswith(_NOT_THE_USER) or file.startswith(_STANDARD_LIBRARY)
        return self[file]


_OURS = _Ours()


def user_line() -> SourceLine | None:
    """The line of the user's program that is running now; its text is read later, by `with_code`."""
    frame = user_frame()
    return None if frame is None else _line(frame.f_code.co_filename, frame.f_lineno)


@lru_cache(1 << 10)
def _line(file: str, number: int) -> SourceLine:
    return SourceLine(file, number)


def with_code(line: SourceLine) -> SourceLine:
    """The same line, with its text."""
    return line if line.code else SourceLine(line.file, line.line, linecache.getline(line.file, line.line).strip())


def here(*others: SourceLine | None) -> tuple[SourceLine, ...]:
    """The running line of the user's program, and after it `others`, for an error's `lines`."""
    lines = (user_line(), *others)
    return tuple(with_code(line) for line in lines if line is not None)


def warn(message: str, line: SourceLine | None = None) -> None:
    """Warn of something at a line of the user's program: at the one that is running, if none is given."""
    line = line or user_line()
    where = ("<block>", 1) if line is None else (line.file, line.line)
    warnings.warn_explicit(PatchwireWarning(message), None, *where)


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its class if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(name: str, names: Iterable[str], count: int = 3, *, likeness: float = 0.4) -> list[str]:
    """The `count` names most like `name`, best first, of those that are at least so much like it (1 is the same)."""
    import difflib

    return difflib.get_close_matches(name[:_LONGEST_NAME], list(names), n=count, cutoff=likeness)
