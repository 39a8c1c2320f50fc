"""Values that do not exist yet: what user code holds while a block is being recorded.

A `Value` stands for one tensor. Inside the block every operator, method and `torch.*` function on it adds a node to the
graph; after the block a saved value behaves as its tensor. It keeps PyTorch's rules of memory: a view shares what it
views, and an in-place edit is seen through every alias. Underneath there is no memory but a chain of edited copies: the
aliases share a `Memory`, which knows the newest one. A site's value is contiguous, whatever strides the model's own
tensor has, so that `flatten` and `reshape` of it are views and never copies.

A `Structure` stands for a tuple or mapping of tensors, such as the output of an attention module.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.fx
from torch import Tensor

from patchwire import ops
from patchwire.checking import describe, fake_of
from patchwire.errors import (
    BranchError,
    GraphError,
    OperationError,
    ShapeError,
    SiteError,
    SourceLine,
    here,
    nearest,
)
from patchwire.graph import Change, Site
from patchwire.kept import Kept
from patchwire.sites import Address, Leaf, Path, Step
from patchwire.subscripts import in_subscript

if TYPE_CHECKING:
    from patchwire.recording import Recorder
    from patchwire.results import To


class Memory:
    """What the aliases of one tensor share: its newest version, and the sites and weights whose value it is."""

    def __init__(self, node: torch.fx.Node, *, constant: str = "") -> None:
        self.node = node
        self.version = 0
        self.sites: list[tuple[Site, Value]] = []
        self.weights: list[tuple[int, str, Value]] = []
        self.edits: list[tuple[Value, SourceLine | None]] = []
        self.born: int = node.meta.get("number", 0)
        self.constant = constant
        """Why it must not be edited, if it must not."""
        self.taken: set[Hashable] = set()
        """What it is or was the value of: places of sites, weights, and what else is not to change with a site."""
        self.given: list[Site] = []
        """The sites that have become what it was."""


class Value(torch.fx.Proxy):
    """A tensor that will exist on the worker.

    Inside the block it can be computed with, edited in place, written to sites and saved; its `shape`, `dtype` and
    length are known, its numbers are not. After the block, if it was saved, it behaves as its tensor, which is
    `value.value`.
    """

    memory: Memory
    views: tuple[Change, ...]
    parent: Value | None
    _seen: int
    _tensor: Tensor | None
    _saved: bool
    _absent: bool
    _to: To | None
    _made_of: tuple[Sequence[Value], Callable[[Sequence[Value]], Value]] | None
    """The values of sites that this is a named part of, or all of, and the way from them to it."""

    def __new__(cls, recorder: Recorder, *_: Any, **__: Any) -> Value:
        return recorder.new_value()

    def __init__(
        self,
        recorder: Recorder,
        node: torch.fx.Node,
        memory: Memory | None = None,
        views: tuple[Change, ...] = (),
        parent: Value | None = None,
    ) -> None:
        memory = memory or Memory(node)
        # Past `__setattr__`, which asks of every name what it may mean to the user; this is all that a `Proxy` is, too.
        vars(self).update(
            tracer=recorder,
            memory=memory,
            views=views,
            parent=parent,
            _node=node,
            _seen=memory.version,
            _tensor=None,
            _saved=False,
            _absent=False,
            _to=None,
            _made_of=None,
        )

    __array_priority__ = 1000  # as tensors': `np.float64(2) * value` asks the value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ATTRIBUTES or name.startswith("_") or _is_settable(getattr(type(self), name, None)):
            object.__setattr__(self, name, value)
        elif self._tensor is not None:
            setattr(self._tensor, name, value)
        elif name != "requires_grad" or value is not True:  # there are gradients of every value
            raise GraphError(
                f"`.{name}` of a value cannot be assigned: nothing would come of it.",
                hint="Edit the value in place, `value[:] = …`, or assign the site: `model.layers[0].output = …`.",
                lines=here(),
            )

    @property
    def node(self) -> torch.fx.Node:
        """The node of the newest version of this value."""
        if self._seen != self.memory.version:
            self._node = self.tracer.derived(self)  # type: ignore[attr-defined]
            self._seen = self.memory.version
        node: torch.fx.Node = self._node
        return node

    @node.setter
    def node(self, node: torch.fx.Node) -> None:
        self._node = node

    @property
    def recorder(self) -> Recorder:
        """The recording that this value belongs to."""
        recorder: Recorder = self.tracer  # type: ignore[assignment]
        return recorder

    # --- saving ------------------------------------------------------------------------------------------------------

    def save(self, *, dtype: torch.dtype | None = None, to: To | None = None) -> Value:
        """Ask for the tensor: after the block, this value behaves as it.

        Args:
            dtype: Send it in this element type, for example `torch.bfloat16` to halve the bytes of a float32.
            to: What to do with the tensor when it comes, while the rest of the request goes on: a function that is
                given it, and after which it is not kept here; or a contiguous tensor on the CPU that it is received
                in. In the body of a loop, the function is called for each iteration, in order, and the tensor has a
                dimension for the iterations in front.

        Returns:
            This value; another one of the same tensor if `dtype` or `to` is given.

        Raises:
            GraphError: `dtype` is no dtype, or `to` neither a function nor such a tensor.
            ShapeError: the value does not fit into the tensor.
        """
        if self._tensor is not None:
            return self
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise GraphError(
                f"{dtype!r} is not a dtype.", hint="Write for example `dtype=torch.bfloat16`.", lines=here()
            )
        if dtype is None and to is None:
            value = self
        else:
            value = Value(self.recorder, self.node, self.memory, self.views, self)
            if to is not None:
                _check_to(self, to, dtype)
                value._to = to
        self.recorder.save(value, dtype)
        return value

    def keep(self, *, seconds: float = 3600.0) -> Kept:
        """Have the server keep the tensor beyond the request, so that later blocks can use it without sending it.

        Args:
            seconds: For how long.

        Returns:
            A handle, which in every later block on this server is a value.

        Raises:
            GraphError: the block has ended, or this is the body of a loop.
        """
        return self.recorder.active.keep(self, seconds)

    @property
    def value(self) -> Any:
        """The tensor, on the CPU.

        What was saved in the body of a loop is one tensor, with a dimension for the iterations in front; a list of
        tensors, if they differ in shape from iteration to iteration.

        Raises:
            BranchError: the block has not ended.
            GraphError: the value was not saved, the run failed, or it was detached and has not been fetched.
        """
        if self._tensor is None:
            self._not_there("its tensor")
        return self._tensor

    @property
    def ready(self) -> bool:
        """Whether the tensor is here."""
        return self._tensor is not None

    def _not_there(self, what: str) -> NoReturn:
        if self.recorder.pending:
            raise BranchError(
                f"The value exists only when the block has ended; {what} is not known while it is recorded.",
                hint=(
                    "Write `torch.where(condition, a, b)` for a choice between values, or "
                    "`patchwire.cond(condition, f, g)` for one between computations; `trace.log(value)` to print it; "
                    "for anything else, `.save()` the value and go on after the block."
                ),
                lines=here(),
            )
        if self._absent:
            raise GraphError(
                "The generation ended before this value's step.",
                hint="Look at the generated tokens: `gen.output`.",
                lines=here(),
            )
        if self._to is not None and self.recorder.resolved:
            raise GraphError(
                "The value was given to a function when it came, and is not kept here.",
                hint="Have the function keep what you need of it, or write `.save()` without `to`.",
                lines=here(),
            )
        if self._saved and self.recorder.detached:
            raise GraphError(
                "The value is not here yet: its trace was detached.",
                hint="Write `trace.job.fetch()`, which waits until the job is done.",
                lines=here(),
            )
        if self.recorder.scanned:
            raise GraphError(
                "This was a scan: nothing ran, so the value has a shape and a dtype and no numbers.",
                hint="Write `with model.trace(…)` in the place of `model.scan(…)` to run it.",
                lines=here(),
            )
        if self._saved:
            raise GraphError(
                "The value was saved, but its run did not end well.",
                hint="The error that ended it says why; run the trace again.",
                lines=here(),
            )
        raise GraphError(
            "The value was not saved, so it stayed on the server.",
            hint="Write `.save()` inside the block.",
            lines=here(),
        )

    # --- gradients ---------------------------------------------------------------------------------------------------

    def backward(self, gradient: Any = None) -> Backward:
        """Ask for gradients of this value: from here on, `other.grad` is the gradient with respect to `other`.

        Args:
            gradient: The vector that the Jacobian is multiplied with, of this value's shape; one element needs none.

        Returns:
            A context: in a block under it, `.grad` is of this value only. Without one, gradients of all values on which
            this was called add up, as they do in PyTorch.
        """
        return Backward(self, gradient)

    @property
    def grad(self) -> Any:
        """The gradient with respect to this value of what `backward()` was called on.

        Raises:
            GraphError: it was called on nothing.
        """
        if self._tensor is not None:
            return self._tensor.grad
        recorder = self.recorder.active
        if recorder.loss is None:
            raise GraphError(
                "There is no gradient yet.",
                hint="Write `loss.backward()` first, or `patchwire.grad(loss, value)`.",
                lines=here(),
            )
        return recorder.accumulated(self)

    # --- what is known while recording -------------------------------------------------------------------------------

    @property
    def fake(self) -> Tensor:
        """A tensor without memory of this value's shape and dtype."""
        if self._tensor is not None:
            return self._tensor
        fake = (self.node if self.recorder.open else self._node).meta.get("fake")
        if not isinstance(fake, Tensor):
            self._not_there("its shape (it depends on data)")
        return fake

    @property
    def shape(self) -> torch.Size:
        """The lengths of its dimensions."""
        return self.recorder.shape(self)

    @property
    def dtype(self) -> torch.dtype:
        """Its element type."""
        return self.fake.dtype

    @property
    def ndim(self) -> int:
        """How many dimensions it has."""
        return self.fake.ndim

    @property
    def device(self) -> torch.device:
        """The CPU, where a saved value arrives; where the model runs is the worker's business."""
        return torch.device("cpu")

    def size(self, dim: int | None = None) -> Any:
        """The lengths of its dimensions, or of one."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """How many dimensions it has."""
        return self.ndim

    def numel(self) -> int:
        """How many elements it has."""
        return int(math.prod(self.shape))

    def __len__(self) -> int:
        if not self.ndim or in_subscript():
            raise TypeError("len() of a 0-d tensor" if not self.ndim else "A value is one index, and no list of them.")
        return int(self.shape[0])

    def __iter__(self) -> Iterator[Any]:
        if self._tensor is not None:
            return iter(self._tensor)
        return iter([self[index] for index in range(len(self))])  # type: ignore[index]

    # --- operations --------------------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls,
        orig_method: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, kwargs = args or (), kwargs or {}
        values = list(values_in((args, kwargs)))
        recorder = next((value.recorder for value in values if value._tensor is None), values[0].recorder)
        return recorder.function(orig_method, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "_tensor" not in self.__dict__:
            raise AttributeError(name)
        if self._tensor is not None:
            return getattr(self._tensor, name)
        if name in _NUMBERS:
            self._not_there(f"`.{name}()`")
        if name in _PLACES:
            return lambda *args, **kwargs: self
        operation = ops.of_method(name)
        if operation is None:
            if not self.recorder.open:
                self._not_there(f"`.{name}`")
            near = nearest(
                name, [each.rsplit(".", 1)[-1] for each in ops.OPERATIONS if each.startswith("torch.Tensor")]
            )
            meant = f"Did you mean {' or '.join(f'`.{each}`' for each in near)}?" if near else ""
            raise OperationError(
                f"`.{name}` is not an operation that a graph may contain.",
                hint=ops.INSTEAD.get(name, meant),
                lines=here(),
            )
        if isinstance(operation.function, ops.Property):
            return self.recorder.call(operation, (self,), {})
        return functools.partial(self.recorder.method, operation, self)

    def __setitem__(self, index: Any, value: Any) -> None:
        if self._tensor is not None:
            self._tensor[index] = value.value if isinstance(value, Value) else value
            return
        self.recorder.call(ops.OPERATIONS["operator.setitem"], (self, index, value), {})

    def __bool__(self) -> bool:
        if self._tensor is None:
            self._not_there("whether it is true")
        return bool(self._tensor)

    def __float__(self) -> float:
        return float(self.value)

    def __int__(self) -> int:
        return int(self.value)

    def __index__(self) -> int:
        return int(self.value.__index__())

    def __contains__(self, item: Any) -> bool:
        return item in self.value

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.value.__array__(*args, **kwargs)

    def __format__(self, spec: str) -> str:
        if self._tensor is None and spec:
            self._not_there("its text")
        return format(repr(self)) if self._tensor is None else format(self._tensor, spec)

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.value.item(), digits)

    def __repr__(self) -> str:
        if self._tensor is not None:
            return repr(self._tensor)
        if not self.recorder.open:
            state = "its run did not end well" if self._saved else "not saved: it stayed on the server"
            state = "not fetched yet" if self._saved and self.recorder.detached else state
            state = "scanned: it has no numbers" if self.recorder.scanned else state
            return f"<value, {describe(self._node.meta.get('fake'))}, {state}>"
        return f"<value, {describe(self.node.meta.get('fake'))}>"

    def __hash__(self) -> int:
        return id(self)

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise GraphError(
            "A value is a tensor and cannot be called.",
            hint="Call the module itself: `model.lm_head(value)`.",
            lines=here(),
        )

    def __reduce__(self) -> Any:
        return (_same, (self.value,))

    def __deepcopy__(self, memo: Any) -> Any:
        return self.value.clone()


def _in_place(operation: ops.Operation) -> Callable[[Value, Any], Value]:
    """`value += other` and its kin: without them Python would make a new value and leave the site as it is."""

    def method(self: Value, other: Any) -> Value:
        if self._tensor is not None:
            operation.function(self._tensor, other.value if isinstance(other, Value) else other)
            return self
        edited: Value = self.recorder.call(operation, (self, other), {})
        return edited

    return method


for _name in ops.AUGMENTED_ASSIGNMENTS:
    setattr(Value, f"__{_name}__", _in_place(ops.OPERATIONS[f"operator.{_name}"]))

_ATTRIBUTES = frozenset({"memory", "views", "parent", "tracer", "node"})
_NUMBERS = frozenset({"item", "tolist", "numpy"})
_PLACES = frozenset({"cpu", "cuda"})


def _is_settable(attribute: Any) -> bool:
    return isinstance(attribute, property) and attribute.fset is not None


def _same(saved: Any) -> Any:
    return saved


def values_in(argument: Any) -> Iterator[Value]:
    """Every value inside an argument."""
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, dict):
        for each in argument.values():
            yield from values_in(each)
    elif isinstance(argument, (tuple, list)):
        for each in argument:
            yield from values_in(each)
    elif isinstance(argument, slice):
        yield from values_in((argument.start, argument.stop, argument.step))


def _structures(argument: Any) -> Iterator[Structure]:
    if isinstance(argument, Structure):
        yield argument
    elif isinstance(argument, dict):
        yield from _structures(tuple(argument.values()))
    elif isinstance(argument, (tuple, list)):
        for each in argument:
            yield from _structures(each)


class Backward:
    """What `loss.backward()` returns: `with loss.backward():` limits what follows to gradients of `loss`."""

    def __init__(self, loss: Value, weights: Any) -> None:
        self._recorder = loss.recorder.active
        self._before = self._recorder.loss
        self._mine = _scalar(loss, weights)
        # One loss that is the sum of all: what does not depend on some of them still has its part of the others.
        self._recorder.loss = self._mine if self._before is None else self._before + self._mine

    def __enter__(self) -> Backward:
        self._recorder.loss = self._mine
        return self

    def __exit__(self, *_: object) -> None:
        self._recorder.loss = self._before


def _scalar(loss: Any, weights: Any) -> Any:
    """The number whose gradient is the product of the weights and the Jacobian of a value."""
    if loss.ready:
        raise GraphError(
            "A gradient is of a value inside the block.",
            hint="After the block there are only tensors, and the way to them has stayed on the server.",
            lines=here(),
        )
    if weights is None:
        if loss.numel() != 1:
            raise ShapeError(
                f"A gradient is of one number, and this is {describe(loss.fake)}.",
                hint="Write `.sum()` or `.mean()`, or take one element; or give `gradient`, of its shape.",
                lines=here(),
            )
        return loss.sum() if loss.ndim else loss
    if not isinstance(weights, (Value, Tensor)) or weights.shape != loss.shape:
        raise ShapeError(f"`gradient` is a tensor or value of the loss's shape, {list(loss.shape)}.", lines=here())
    return (loss * weights).sum()


def grad(loss: Value, values: Any, weights: Any = None) -> Any:
    """The gradient of a value with respect to others, as `torch.autograd.grad` gives it.

    Args:
        loss: A value of one element, or of any shape if `weights` are given.
        values: A value, or a list or tuple of values: of sites, parameters, constants, or what was computed from them,
            as long as `loss` was computed from it in turn, through the model or in the block.
        weights: The vector that the Jacobian is multiplied with, of the shape of `loss`.

    Returns:
        A value of the shape and dtype of `values`; for a list or tuple, one of each.

    With respect to a site's value it is the effect of what a write at this site would change, and of nothing else: a
    model that holds the same tensor elsewhere, as a residual stream that is also a norm's input, goes on with its own.
    Rows of different lengths have NaN before their first token here too. A gradient is a constant: a second gradient
    does not go through it.

    Raises:
        ShapeError: `loss` has more than one element, or something is not of a floating-point type.
        OrderError: a value comes later in the forward pass than `loss`.
        OperationError: there is a generation on the way from a value to `loss`.
    """
    if not isinstance(loss, Value) or loss.ready:
        raise GraphError(
            "A gradient is of a value inside the block.",
            hint="After the block there are only tensors, and the way to them has stayed on the server.",
            lines=here(),
        )
    several = isinstance(values, (tuple, list))
    found = loss.recorder.grad(loss, weights, list(values) if several else [values])
    return type(values)(found) if several else found[0]


def _check_to(value: Value, to: Any, dtype: torch.dtype | None) -> None:
    """Check what `save` was given as `to`.

    Raises:
        GraphError: it is neither a function nor a contiguous tensor on the CPU.
        ShapeError: it is a tensor of another shape or dtype than what comes.
    """
    is_tensor = isinstance(to, Tensor) and not isinstance(to, Value)
    if is_tensor and to.device.type == "cpu" and to.is_contiguous():
        fake = fake_of(value.node)
        if isinstance(fake, Tensor):
            in_loop = value.recorder.parent is not None
            comes = [str(each) for each in value.recorder.shape(value)], dtype or fake.dtype
            fits = [str(each) for each in to.shape[1 if in_loop else 0 :]], to.dtype
            if comes != fits:
                raise ShapeError(
                    f"{describe(fake)} does not fit into {describe(to)}.",
                    hint="In a loop, the tensor has a dimension for the iterations in front." if in_loop else "",
                    lines=here(),
                )
    elif is_tensor or isinstance(to, Value) or not callable(to):
        raise GraphError(
            f"A value cannot be saved to a {type(to).__name__}{' like this' if is_tensor else ''}.",
            hint="Give a function that takes the tensor, or a contiguous tensor on the CPU to receive it in.",
            lines=here(),
        )


def save_all(values: Any) -> Any:
    """What `patchwire.save` does."""
    for each in values_in(values):
        each.save()
    return values


class Values(tuple[Value, ...]):
    """What an operation gives that gives several values: a tuple, whose items also have the names that PyTorch gives
    them, as in `logits.topk(3).indices`.
    """

    _kind: type[tuple[Any, ...]]

    def __new__(cls, items: Iterable[Value], kind: type[tuple[Any, ...]] = tuple) -> Values:
        """
        Args:
            items: The values.
            kind: What PyTorch gives in their place.
        """
        values = super().__new__(cls, items)
        values._kind = kind
        return values

    def save(self) -> Values:
        """Ask for the tensors: after the block, the values behave as them.

        It is written out because nnsight, where it is in the same program, gives every object a `save` of its own.
        """
        for each in self:
            each.save()
        return self

    @property
    def value(self) -> Any:
        """The tensors, as PyTorch gives them.

        Raises:
            BranchError: the block has not ended.
            GraphError: one was not saved, the run failed, or it was detached and has not been fetched.
        """
        return self._kind([each.value for each in self])

    def __getattr__(self, name: str) -> Value:
        names = getattr(self._kind, "__match_args__", ()) if name != "_kind" else ()
        if name not in names:
            raise AttributeError(f"A tuple of values has no “{name}”.")
        return self[names.index(name)]

    def __reduce__(self) -> Any:
        return (_same, (self.value,))


class Structure:
    """A tuple or mapping of tensors at a site: `attn.output[0]`, `block.inputs[1]["attention_mask"]`.

    Its items can be read, edited and assigned one by one; `save` asks for all of them.
    """

    def __init__(
        self, recorder: Recorder, site: Site, leaves: tuple[Leaf, ...], items: dict[Path, Value] | None = None
    ) -> None:
        self._recorder = recorder
        self._site = site
        self._leaves = leaves
        self._items = {} if items is None else items

    def _path(self, key: Any) -> Path:
        path = self._site.address.path
        if not path and isinstance(key, int) and all(leaf.path[0] in ("args", "kwargs") for leaf in self._leaves):
            key = ("args", "kwargs")[key] if key in (0, 1) else key
        return (*path, key)

    def _at(self, path: Path) -> Site:
        return replace(self._site, address=Address(self._site.address.name, path))

    def _check(self, path: Path) -> tuple[Leaf, ...]:
        below = tuple(leaf for leaf in self._leaves if leaf.path[: len(path)] == path)
        if not below:
            known = ", ".join(
                f"`{Address(self._site.address.name, leaf.path).spelled}` {leaf.symbolic}" for leaf in self._leaves
            )
            raise SiteError(
                f"`{Address(self._site.address.name, path).spelled}` is not a tensor here.",
                hint=f"The tensors there are {known}.",
                lines=here(),
            )
        return below

    def __getitem__(self, key: Step) -> Value | Structure:
        if not isinstance(key, (int, str)):
            known = " or ".join(f"`{Address(self._site.address.name, leaf.path).spelled}`" for leaf in self._leaves)
            raise SiteError(
                f"`{self._site}` is a tuple or mapping, not a tensor.", hint=f"Write {known} first.", lines=here()
            )
        path = self._path(key)
        below = self._check(path)
        if below[0].path == path:
            if self._recorder.open:
                return self._recorder.read(self._at(path))
            if path in self._items:
                return self._items[path]
            message = "The value was not saved, so it stayed on the server."
            raise GraphError(message, hint="Write `.save()` inside the block.", lines=here())
        return Structure(self._recorder, self._at(path), below, self._items)

    def __setitem__(self, key: Step, value: Any) -> None:
        if not self._recorder.open:
            raise GraphError(
                f"`{self._site}` cannot be assigned: the block has ended.", hint="Write it inside it.", lines=here()
            )
        path = self._path(key)
        if self._check(path)[0].path != path:
            raise self.not_one_tensor(path)
        self._recorder.assign(self._at(path), value)

    def __getattr__(self, name: str) -> Value | Structure:
        if name.startswith("_"):
            raise AttributeError(name)
        if not any(self._path(name) == leaf.path[: len(self._site.address.path) + 1] for leaf in self._leaves):
            known = " or ".join(f"`{Address(self._site.address.name, leaf.path).spelled}`" for leaf in self._leaves)
            raise SiteError(
                f"`{self._site}` is a tuple or mapping, not a tensor: it has no `{name}`.",
                hint=f"Write {known}.",
                lines=here(),
            )
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:  # `model.output.logits = value`
            self[name] = value

    def not_one_tensor(self, path: Path | None = None) -> SiteError:
        """The error of using this, or what is at a path in it, as a tensor."""
        address = Address(self._site.address.name, self._site.address.path if path is None else path)
        below = [leaf for leaf in self._leaves if leaf.path[: len(address.path)] == address.path]
        items = " or ".join(f"`{Address(address.name, leaf.path).spelled}`" for leaf in below)
        return SiteError(
            f"`{address.spelled}` is a tuple or mapping, not one tensor.", hint=f"Write {items}.", lines=here()
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise next(each.not_one_tensor() for each in _structures((args, kwargs)))

    def _operator(self, *_: Any) -> NoReturn:
        raise self.not_one_tensor()

    __add__ = __radd__ = __iadd__ = __sub__ = __rsub__ = __isub__ = __mul__ = __rmul__ = __imul__ = _operator
    __truediv__ = __rtruediv__ = __itruediv__ = __pow__ = __rpow__ = __matmul__ = __rmatmul__ = _operator
    __neg__ = __abs__ = __lt__ = __le__ = __gt__ = __ge__ = __float__ = __int__ = __array__ = _operator

    @property
    def recorded(self) -> bool:
        """Whether its block is still being recorded."""
        return self._recorder.open

    def keys(self) -> list[Step]:
        """What it can be indexed with: positions or names; of all inputs, "args" and "kwargs"."""
        depth = len(self._site.address.path)
        return list(dict.fromkeys(leaf.path[depth] for leaf in self._leaves))

    def save(self) -> Structure:
        """Ask for all tensors; after the block, index this to get them."""
        for leaf in self._leaves:
            self._items[leaf.path] = self._recorder.read(self._at(leaf.path)).save()
        return self

    @property
    def value(self) -> dict[str, Tensor]:
        """The tensors, by what follows the site's name: {"[0]": …}."""
        own = self._site.address.path
        saved = {path: item for path, item in self._items.items() if path[: len(own)] == own}
        return {_steps(path[len(own) :]): item.value for path, item in saved.items()}

    def __repr__(self) -> str:
        return f"<{self._site}: {', '.join(f'{_steps(leaf.path)} {leaf.symbolic}' for leaf in self._leaves)}>"


def _steps(path: Path) -> str:
    return str(Address("x", path))[1:]
