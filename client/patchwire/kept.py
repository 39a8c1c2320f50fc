"""Values that stay on the server when their block has ended, and the handles by which later blocks use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchwire.checking import describe
from patchwire.errors import GraphError, here
from patchwire.graph import KeptTensor
from patchwire.subscripts import in_subscript

if TYPE_CHECKING:
    from patchwire.connection import Connection
    from patchwire.proxy import Value
    from patchwire.recording import Recorder

RECORDER: ContextVar[Recorder | None] = ContextVar("patchwire_recorder", default=None)
"""The recording that user code is in."""


class Kept:
    """A value that a server keeps: `kept = value.keep(seconds=3600)`.

    In every later block on that server it is a value: it can be computed with, written to sites, saved and
    differentiated by. Its bytes do not travel. An in-place edit changes the block's own copy of it.

    Attributes:
        expires: When the server drops it, by this machine's clock; None until its block has ended.

    Example:
        >>> with model.trace("The Eiffel Tower is in the city of"):
        ...     clean = model.layers[3].output.keep(seconds=600)
        >>> clean.shape
        torch.Size([1, 10, 768])
        >>> with model.trace("The Colosseum is in the city of"):
        ...     model.layers[3].output[:, -1] = clean[:, -1]
        ...     logits = model.logits.save()
        >>> clean.forget()
    """

    def __init__(self, source: Value) -> None:
        self._source = source
        self._fake: Tensor | None = None
        self._handle: bytes | None = None
        self._connection: Connection | None = None
        self.expires: datetime | None = None

    def arrived(self, handle: bytes, fake: Tensor, expires: datetime, connection: Connection) -> None:
        """The server has kept it."""
        self._handle, self._fake, self.expires, self._connection = handle, fake, expires, connection

    @property
    def tensor(self) -> KeptTensor:
        """What stands for it in a graph.

        Raises:
            GraphError: it is not on the server.
        """
        if self._handle is None:
            raise GraphError(
                "The value was not kept: its block has not ended, or not ended well.",
                hint="Use it after the block in which `.keep()` stands.",
                lines=here(),
            )
        return KeptTensor(self._handle, self._fake)

    @property
    def source(self) -> Value:
        """The value that is kept, for use in its own block."""
        return self._source

    @property
    def shape(self) -> torch.Size:
        """The lengths of its dimensions."""
        return self._source.shape if self._fake is None else self._fake.shape

    @property
    def dtype(self) -> torch.dtype:
        """Its element type."""
        return self._source.dtype if self._fake is None else self._fake.dtype

    def forget(self) -> None:
        """Have the server drop it now."""
        handle = self.tensor.handle
        assert self._connection is not None
        self._connection.forget([handle])

    def save(self, *args: Any, **kwargs: Any) -> Any:
        """Have it here when the block has ended, as `Value.save`.

        It is written out because nnsight, where it is in the same program, gives every object a `save` of its own.
        """
        return self._value().save(*args, **kwargs)

    def _value(self) -> Value:
        """The value that it is in the block that user code is in.

        Raises:
            GraphError: it is in none.
        """
        recorder = RECORDER.get()
        if recorder is None or not recorder.open:
            raise GraphError(
                "A kept value is on the server, and can be used in a block only.",
                hint="Write `with model.trace(…):` around it; `.save()` it there to have it here.",
                lines=here(),
            )
        return recorder.of_kept(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._value(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = _values(args), _values(kwargs or {})
        recorder = RECORDER.get()
        assert recorder is not None  # or there would be no values
        return recorder.function(function, args, kwargs)

    def __len__(self) -> int:
        if in_subscript():
            raise TypeError("A value is one index, and no list of them.")
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._value())

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        if self._fake is None:
            return "<kept value, its block has not ended>"
        return f"<kept value, {describe(self._fake)}, until {self.expires:%Y-%m-%d %H:%M:%S}>"


def _values(argument: Any) -> Any:
    match argument:
        case Kept():
            return argument._value()
        case tuple():
            return tuple([_values(each) for each in argument])
        case list():
            return [_values(each) for each in argument]
        case dict():
            return {name: _values(each) for name, each in argument.items()}
    return argument


def _operator(name: str) -> Callable[..., Any]:
    def method(self: Kept, *args: Any) -> Any:
        return getattr(self._value(), name)(*args)

    return method


_BINARY = "add sub mul truediv floordiv mod pow matmul and or xor"
_OTHERS = "getitem setitem neg abs invert pos eq ne lt le gt ge bool float int"
for _name in (
    *(f"{prefix}{name}" for name in _BINARY.split() for prefix in ("", "r", "i") if prefix + name != "imatmul"),
    *_OTHERS.split(),
):
    setattr(Kept, f"__{_name}__", _operator(f"__{_name}__"))
