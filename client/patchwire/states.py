"""States: the values that an operation has one after the other, once for each token, seen as one tensor.

`model.layers[3].ssm.state` is `[batch, seq, …]`: the recurrent state after every token. In the model there is never
such a tensor; each state is a site of its own, and the next is computed from it. So reading all of it stacks the sites,
and writing to a position writes that site: the tokens after it go on from what was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Number
from typing import Any

import torch
import torch.fx
from torch import Tensor

from patchwire import ops
from patchwire.errors import GraphError, ShapeError, here
from patchwire.proxy import Value

_GETITEM = ops.OPERATIONS["operator.getitem"]
_STACK = ops.OPERATIONS["torch.stack"]
_AT_A_POSITION = "States are written token by token: `state[:, t] = …`, or `state[:, a:b] = …`."
_SEQ = 1


class States(Value):
    """A value for each token, as one tensor `[batch, seq, …]`."""

    def __new__(cls, *_: Any, **__: Any) -> States:
        return object.__new__(cls)

    def __init__(self, tokens: Sequence[Value]) -> None:
        """
        Args:
            tokens: The value after each token, `[batch, …]`.
        """
        self._tokens = list(tokens)
        self._versions = self._now()
        super().__init__(tokens[0].recorder, _stacked(tokens).node)
        self._made_of = self._tokens, _stacked
        self.memory.constant = _AT_A_POSITION

    def _now(self) -> list[int]:
        return [each.memory.version for each in self._tokens]

    @property
    def node(self) -> torch.fx.Node:
        """The node of the newest version: with what has been written to single positions."""
        if self._versions != (now := self._now()):
            self._versions, self._node = now, _stacked(self._tokens).node
        node: torch.fx.Node = self._node
        return node

    @node.setter
    def node(self, node: torch.fx.Node) -> None:
        self._node = node

    def __getitem__(self, index: Any) -> Any:
        found = self._positions(index)
        if self._tensor is None and found is not None and isinstance(index[_SEQ], int):
            (token,), rest = found
            return self.recorder.call(_GETITEM, (token, rest), {})
        if self._tensor is not None:
            return self._tensor[index]
        if found is not None and found[0] and isinstance(index[0], slice) and all(map(_is_basic, index)):
            tokens, rest = found
            # As states, so that each may be written where it was taken from: all of them exist only after the last.
            whole = all(each == slice(None) for each in rest)
            return States(tokens if whole else [self.recorder.call(_GETITEM, (token, rest), {}) for token in tokens])
        return self.recorder.call(_GETITEM, (self, index), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        if self._tensor is not None:
            super().__setitem__(index, value)
            return
        if index is Ellipsis or (isinstance(index, slice) and index == slice(None)):
            index = (slice(None), slice(None))
        found = self._positions(index)
        if found is None:
            raise GraphError("This does not say which positions of the states are written.", hint=_AT_A_POSITION,
                             lines=here())  # fmt: skip
        tokens, rest = found
        given: list[Any]
        single = isinstance(index[_SEQ], int)
        if not single and not all(map(_is_basic, rest)) and sum(not isinstance(each, slice) for each in rest) > 1:
            # PyTorch puts the dimensions of such an index first.
            raise GraphError("Several states are not written at lists and numbers in several dimensions.",
                             hint=_AT_A_POSITION, lines=here())  # fmt: skip
        place = self[index]
        if isinstance(value, Value) and not single and value.memory is place.memory:
            raise GraphError("Several states cannot be edited in place at once.", hint=_AT_A_POSITION, lines=here())
        if isinstance(value, States) and not value.ready and isinstance(place, States) and value.shape == place.shape:
            # Each as it is now, before the first is written: they may be the same ones.
            given = [Value(each.recorder, each.node) for each in value._tokens]
        elif isinstance(value, (Tensor, Value)) and not single:
            try:
                value = torch.broadcast_to(value, place.shape)  # type: ignore[arg-type]
            except (RuntimeError, ShapeError):
                raise ShapeError(
                    f"These states are {list(place.shape)}; a value of shape {list(value.shape)} does not fit.",
                    hint=_AT_A_POSITION,
                    lines=here(),
                ) from None
            dim = 0 if isinstance(index[0], int) else _SEQ
            given = [value.select(dim, at) for at in range(len(tokens))]
        elif isinstance(value, (Tensor, Value, Number)):
            given = [value] * len(tokens)
        else:
            raise ShapeError(f"A state cannot become a {type(value).__name__}.", hint="Write a tensor or a number.",
                             lines=here())  # fmt: skip
        for token, new in zip(tokens, given, strict=True):
            token[rest] = new

    def _positions(self, index: Any) -> tuple[list[Value], tuple[Any, ...]] | None:
        """The values that an index is of, and the index in each of them; None if it does not say so plainly."""
        if not isinstance(index, tuple) or len(index) <= _SEQ:
            return None
        first, position, *rest = index
        if not (_is_basic(first) and _is_basic(position)):
            return None
        if isinstance(position, slice) and not (position.step is None or position.step > 0):
            return None  # PyTorch says what is wrong with that
        if not isinstance(position, slice) and not -len(self._tokens) <= position < len(self._tokens):
            raise IndexError(f"there is no state {position}: there are {len(self._tokens)} tokens")
        found = self._tokens[position] if isinstance(position, slice) else [self._tokens[position]]
        return found, (first, *rest)


def _is_basic(index: Any) -> bool:
    """Whether an index is a number or a slice, which leaves the dimensions in their order."""
    return isinstance(index, (int, slice)) and not isinstance(index, bool)


def _stacked(tokens: Sequence[Value]) -> Value:
    found: Value = tokens[0].recorder.call(_STACK, (list(tokens), _SEQ), {})
    return found
