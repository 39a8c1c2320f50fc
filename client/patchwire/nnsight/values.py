"""Values that are tensors: for `isinstance` while the block is recorded, and altogether after it.

A `TensorValue` is a `Value` whose class is also a `torch.Tensor`: of an empty one on the meta device, which no
operation ever reaches. When its numbers arrive, the object itself becomes the tensor that holds them, so that every
name, list and attribute that referred to the value refers to a tensor.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.fx
from torch import Tensor

from patchwire.connection import Connection
from patchwire.errors import BranchError, GraphError, here
from patchwire.graph import Graph
from patchwire.proxy import Backward, Value, values_in
from patchwire.recording import Recorder
from patchwire.results import Results

_AlsoTensor: Any = Tensor
"""As `Any`, because a value and a tensor do not agree on the types of what they have in common."""


class TensorValue(Value, _AlsoTensor):  # type: ignore[misc]
    """A value that passes for a tensor, and becomes one."""

    def __getattribute__(self, name: str) -> Any:
        # Of `torch.Tensor` only the class is wanted: what it has beyond a value is an operation to record.
        if name in _OF_TENSORS_ONLY:
            return Value.__getattr__(self, name)
        return super().__getattribute__(name)

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any, **__: Any) -> NoReturn:
        raise BranchError(
            "The value exists only when the block has ended; a tensor cannot be made of it while it is recorded.",
            hint="Use the value itself, or `.save()` it and make the tensor after the block.",
            lines=here(),
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    # --- gradients ----------------------------------------------------------------------------------------------------

    @property
    def requires_grad(self) -> bool:
        """Always: what is differentiated is decided when the block has ended."""
        return self.dtype.is_floating_point

    def requires_grad_(self, requires_grad: bool = True) -> TensorValue:
        """This value; gradients need no preparation.

        Raises:
            GraphError: they are to be turned off.
        """
        if not requires_grad:
            raise GraphError(
                "Gradients cannot be turned off for a value.",
                hint="Write `value = value.detach()`, and assign it to the module's output if the model is to use it.",
                lines=here(),
            )
        return self

    def retain_grad(self) -> None:
        """Have `.grad` on the saved tensor after the block, if `loss.backward()` is called in it."""
        self._of_tensors.retained.append(self)

    def backward(
        self, gradient: Any = None, retain_graph: bool | None = None, create_graph: bool = False, inputs: Any = None
    ) -> Backward:
        """As `Value.backward`; the graph is always retained.

        Raises:
            GraphError: `create_graph` or `inputs` is given.
        """
        if create_graph or inputs is not None:
            raise GraphError(
                "`backward` takes `gradient` and `retain_graph` here.",
                hint="Write `patchwire.grad(loss, value)`; its result can be computed with, and differentiated again.",
                lines=here(),
            )
        return _Backward(self, gradient)

    @property
    def grad(self) -> Any:
        """The gradient with respect to this value; None if nothing was differentiated."""
        return self._of_tensors.gradient(self)

    @grad.setter
    def grad(self, value: Any) -> None:
        self._of_tensors.replace_gradient(self, value)

    @property
    def _of_tensors(self) -> TensorRecorder:
        recorder = self.recorder
        assert isinstance(recorder, TensorRecorder)
        return recorder


def _names_before(last: type) -> set[str]:
    mro = TensorValue.__mro__
    return {name for each in mro[: mro.index(last)] for name in vars(each)}


_OF_TENSORS_ONLY = frozenset(
    name for name in set(dir(Tensor)) - _names_before(Tensor) if not (name.startswith("__") and name.endswith("__"))
)


class _Backward(Backward):
    """`with loss.backward():`, in which a gradient may be edited."""

    def __enter__(self) -> Backward:
        assert isinstance(self._recorder, TensorRecorder)
        self._recorder.served = []
        return super().__enter__()

    def __exit__(self, *raised: object) -> None:
        assert isinstance(self._recorder, TensorRecorder)
        self._recorder.served = None
        super().__exit__(*raised)


class TensorRecorder(Recorder):
    """A recording whose values are tensors.

    Attributes:
        retained: Values whose saved tensors are to have a `.grad`.
        containers: Lists, tuples, dicts and sets in which everything is to be saved.
        served: The gradients given out in the running `with loss.backward():`, with the values that they are of; None
            outside of one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.retained: list[TensorValue] = []
        self.containers: list[Any] = []
        self.served: list[tuple[Value, Value]] | None = None
        self._replaced: dict[tuple[torch.fx.Node, ...], Value] = {}
        self._kept: list[tuple[TensorValue, Value]] = []

    def new_value(self) -> Value:
        """An empty value that is also a tensor."""
        value: Value = Tensor._make_wrapper_subclass(TensorValue, (0,), device=torch.device("meta"))
        return value

    # --- gradients ----------------------------------------------------------------------------------------------------

    def _asked(self, value: Value) -> tuple[torch.fx.Node, ...]:
        return (*([] if self.loss is None else [self.loss.node]), value.node)

    def gradient(self, value: TensorValue) -> Any:
        """The gradient with respect to a value, as it was left if it was edited."""
        if not self.open:
            value._not_there("its gradient")
        if (replaced := self._replaced.get(self._asked(value))) is not None:
            return replaced
        if self.served is not None:
            self._check_unedited(value)
        found = super(TensorValue, value).grad
        if self.served is not None:
            self.served.append((value, found))
        return found

    def replace_gradient(self, value: TensorValue, gradient: Any) -> None:
        """Make something the gradient with respect to a value, from here on in this block."""
        if self.served is None:
            raise GraphError(
                "A gradient is assigned in `with loss.backward():`.",
                hint="Write the block, or go on with the new tensor under a name of its own.",
                lines=here(),
            )
        former = self.gradient(value)
        if not isinstance(gradient, Value):
            gradient = former * 0 + gradient
        if tuple(gradient.shape) != tuple(value.shape):
            raise GraphError(
                f"The gradient of a value {list(value.shape)} cannot become {list(gradient.shape)}.",
                hint="Assign a tensor of the value's shape.",
                lines=here(),
            )
        self._replaced[self._asked(value)] = gradient

    def _check_unedited(self, value: Value) -> None:
        assert self.served is not None
        for of, gradient in self.served:
            edited = gradient.memory.version > 0 or self._asked(of) in self._replaced
            if edited and of.node is not value.node:
                raise GraphError(
                    "A gradient was edited above, and that of another value would have to follow from the edit.",
                    hint=(
                        "Write `patchwire.grad(h, other, weights=edited)` for the gradient that flows on through `h`, "
                        "whose gradient was edited; or read this one first, for the gradient without the edit."
                    ),
                    lines=here(),
                )

    def left_out(self, trace: int, invoke: int | None, step: int, path: str) -> bool:
        """Whether a module, by its raw path, is in one that is skipped."""
        return any(
            (site.trace, site.invoke, site.step) == (trace, invoke, step) and path.startswith(f"{skipped}.")
            for site, skipped in self._skipped.get(trace, ())
        )

    # --- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> Graph:
        """End the recording, having saved what saved containers hold, and the gradients that are to stay."""
        for container in self.containers:
            for value in values_in(_items(container)):
                if value.recorder is self and not value.ready:
                    value.save()
        if self.loss is not None:
            for value in self.retained:
                gradient = self.gradient(value)
                gradient.save()
                self._kept.append((value, gradient))
        return super().finish()

    def resolve(self, results: Results, connection: Connection) -> None:
        """Have every saved value become its tensor, and containers lose what never existed."""
        super().resolve(results, connection)
        for value, *_ in self.saved:
            if isinstance(value, TensorValue) and value._tensor is not None:
                _become(value, value._tensor)
        for value, gradient in self._kept:
            if not isinstance(value, TensorValue):  # it was saved, and is a tensor now
                Tensor.grad.__set__(value, gradient)
        for container in self.containers:
            if isinstance(container, list):
                container[:] = [each for each in container if not (isinstance(each, TensorValue) and each._absent)]


def _items(container: Any) -> Any:
    """A container as one of those that a graph's values are looked for in; sets have no order to keep."""
    return list(container) if isinstance(container, (set, frozenset)) else container


def _become(value: TensorValue, tensor: Tensor) -> None:
    """Make an object that was a value the tensor itself."""
    other = tensor.detach()  # an object of its own: two values may have been saved as one tensor
    for name in ("__class__", "__dict__"):
        mine, its = object.__getattribute__(value, name), object.__getattribute__(other, name)
        object.__setattr__(value, name, its)
        object.__setattr__(other, name, mine)
    torch._C._swap_tensor_impl(value, other)
