"""Does a graph fit its models? Sites exist, shapes fit, every write has its value in time, nothing is too large.

Every node is run on tensors without memory ("fakes", PyTorch's meta device) before anything runs for real: a site's
fake has the shape that the catalogue states for the call's rows and tokens. The client does this while it records, so
that an error surfaces at the line that caused it; the worker does it again with the same code, for it trusts nobody.

A node's `meta["fake"]` is its fake, or None where the shape depends on data; `meta["after"]` says when in the forward
pass its value exists: the latest site it depends on.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from patchwire import graph as g
from patchwire import ops
from patchwire.alike import Asked
from patchwire.errors import (
    GraphError,
    LimitError,
    OperationError,
    OrderError,
    PatchwireError,
    ShapeError,
    SiteError,
    SourceLine,
    first_line,
    with_code,
)
from patchwire.sites import Axis, Catalogue, Leaf, Module, Parameter

_ELEMENTWISE = frozenset(name for name in ops.OPERATIONS if name.startswith("operator.")) - {"operator.matmul"}
"""Operations that make nothing but their result."""
_LOOK = "The shape of a value is known inside the block: `print(value.shape)`."
_MAX_PIECES = 1 << 12
_MAX_ALL_PIECES = 1 << 18
_MAX_JOINED = 64
_MAX_POWER = 1024
_MAX_WORK = 8192**3
_PRODUCTS = {"mm": (0, -1), "bmm": (0, -1), "addmm": (1, -1), "baddbmm": (1, -1), "addbmm": (1, -1)}
"""Products of matrices, as PyTorch's dispatcher calls them: where the first matrix is, and which dimension of the
second is not summed over."""
_PRODUCTS |= {"_cdist_forward": (0, -2), "_euclidean_dist": (0, -2)}
_MAX_PRODUCTS = 1 << 43
_FEW = 1024
_DRAWN_ITEMSIZE = 8
_CUBIC = """
    cholesky cond det eig eigh eigvals eigvalsh inv inverse logdet matrix_exp matrix_power matrix_rank pinv pinverse qr
    slogdet solve svd svdvals
"""
"""Operations on matrices whose time grows with the third power of their size."""
_OF_ONE_DTYPE = frozenset(["matmul", "mm", "mv", "addmm", "addmv", "addbmm", "linear", "cdist", "cross"])
"""Operations that convert nothing, and whose tensors may differ in dtype as long as they have no memory."""


@dataclass(frozen=True)
class After:
    """When a value exists."""

    order: tuple[Any, ...]
    """The trace of the latest site it depends on, its step, and when in a pass the site exists at the earliest."""
    site: g.Site | str
    """That site, or what else of the trace."""
    line: SourceLine | None
    """The line that read it."""


def fake_of(node: torch.fx.Node) -> Any:
    """What a node's value looks like: a tensor without memory, a tuple of them, or None if that is not known."""
    return node.meta.get("fake")


def leaf_of(node: torch.fx.Node) -> Leaf:
    """What a read or write that was checked is of."""
    leaf: Leaf = node.meta["leaf"]
    return leaf


def describe(fake: Any) -> str:
    """A value's shape and dtype as text: "[1, 10, 768] float32"."""
    if isinstance(fake, Tensor):
        return f"{list(fake.shape)} {str(fake.dtype).removeprefix('torch.')}"
    if isinstance(fake, tuple):
        return f"a tuple of {len(fake)}"
    return "a value of unknown shape"


class TookLongError(Exception):
    """A graph could not be checked in the time that there was for it."""


class Checker:
    """Checks the nodes of one graph, in order."""

    def __init__(
        self,
        graph: g.Graph,
        catalogue: Callable[[str], Catalogue],
        *,
        value_bytes: int | None = None,
        until: float = math.inf,
    ) -> None:
        """
        Args:
            graph: The graph; its constants are tensors by now.
            catalogue: The catalogue of a model, by the model's name.
            value_bytes: How large the value of one node may be.
            until: When to give up with `TookLongError`, as `time.monotonic` tells it.
        """
        self.graph = graph
        self.catalogue = catalogue
        self.value_bytes = value_bytes
        self.until = until
        self._pieces = 0
        self._rules = {
            g.read: self._read,
            g.write: self._write,
            g.edit: self._edit,
            g.apply: self._apply,
            g.constant: self._constant,
            g.parameter: self._parameter,
            g.assign: self._assign,
            g.grad: self._grad,
            g.generated: self._generated,
            g.token_ids: self._token_ids,
            g.loop: self._loop,
            g.outside: self._outside,
            g.carry: self._carry,
            g.keep: self._save,
            g.save: self._save,
            g.log: self._log,
        }

    def all(self) -> None:
        """Check every node.

        Raises:
            SiteError, ShapeError, OrderError, OperationError, LimitError, GraphError: at the line of the first node
                that does not fit.
        """
        for node in self.graph.fx.nodes:
            self.node(node)

    def node(self, node: torch.fx.Node) -> None:
        """Check one node whose inputs have been checked."""
        latest: After | None = None
        for each in node.all_input_nodes:
            after = each.meta["after"]
            if after is not None and after is not latest and (latest is None or after.order > latest.order):
                latest = after
        node.meta["after"] = latest
        try:
            fake = self._rules.get(node.target, self._call)(node)  # type: ignore[arg-type]
            self.check_size(fake)
        except PatchwireError as error:
            line = g.line_of(node)
            if error.lines or line is None:
                raise
            raise type(error)(error.message, hint=error.hint, lines=[with_code(line)]) from None
        node.meta["fake"] = fake

    def leaf(self, site: g.Site) -> Leaf:
        """The catalogue's entry of a site."""
        trace = self.graph.traces[site.trace]
        return self.catalogue(trace.model).leaf(site.address, site.step)

    def fake_site(self, site: g.Site) -> Tensor | None:
        """What the value of a site looks like."""
        leaf = self.leaf(site)
        return leaf.fake(*self._rows_of(site, leaf))

    def _rows_of(self, site: g.Site, leaf: Leaf) -> tuple[int, int]:
        """How many rows a site's value has, and how many tokens each.

        Raises:
            SiteError: it does not exist in these.
        """
        lengths = self.graph.traces[site.trace].invokes[site.invoke].lengths
        longest = max(lengths)
        if site.step:
            longest = longest + site.step - 1 if leaf.in_steps else 1
        times = leaf.runs.length(len(lengths), longest) if leaf.operations else 1
        if times is not None and leaf.occurrence >= times:
            raise SiteError(
                f"`{site}` never exists: with this prompt the operation runs {times} times.",
                hint=f"The first time is [0], the last [{times - 1}].",
            )
        if len(set(lengths)) > 1 and not leaf.aligns:
            raise SiteError(
                f"`{site}` {leaf.symbolic} cannot be told apart for prompts of different lengths.",
                hint="Give it prompts of one length, or one trace for each prompt.",
            )
        return len(lengths), longest

    # --- one rule for each kind of node -----------------------------------------------------------------------------

    def _read(self, node: torch.fx.Node) -> Tensor | None:
        (site,) = node.args
        assert isinstance(site, g.Site)
        leaf = node.meta["leaf"] = self.leaf(site)
        node.meta["after"] = After((site.trace, site.step, leaf.order), site, g.line_of(node))
        return leaf.fake(*self._rows_of(site, leaf))

    def _write(self, node: torch.fx.Node) -> None:
        site, value = node.args
        assert isinstance(site, g.Site)
        assert isinstance(value, torch.fx.Node)
        leaf = node.meta["leaf"] = self.leaf(site)
        if leaf.unused:
            raise SiteError(
                f"`{site}` cannot be changed: the model does nothing with what this call returns.",
                hint="Change what it is given, or what it has changed where that is used next.",
            )
        rows = self._rows_of(site, leaf)
        shape, fake = leaf.lengths(*rows), fake_of(value)
        if isinstance(fake, tuple):
            raise ShapeError(f"`{site}` is a tensor and cannot become a tuple.")
        if fake is not None and (fake.dtype != leaf.dtype or (shape is not None and fake.shape != shape)):
            hint = "Assign a value of the same shape, or part of it: `value[:, -1] = ...`."
            if shape is None or fake.shape == shape:
                hint = f"Convert it: `.to({leaf.dtype})`."
            raise ShapeError(
                f"`{site}` is {describe(leaf.fake(*rows))} ({leaf.symbolic}) and cannot become {describe(fake)}.",
                hint=hint,
            )
        after: After | None = node.meta["after"]
        if after is not None and after.order > (site.trace, site.step, leaf.latest):
            lines = [with_code(line) for line in (g.line_of(node), after.line) if line is not None]
            raise OrderError(
                f"`{site}` cannot be changed with a value of `{after.site}`, which comes later in the forward pass.",
                hint="Save the later value, and write it in a second trace.",
                lines=lines,
            )

    def _call(self, node: torch.fx.Node) -> Any:
        operation = g.operation_of(node)
        assert operation is not None
        if operation.kind != "draw" and not node.all_input_nodes:
            # Without a tensor it would be Python that computes, at any length and size: `9 ** 10**9`.
            raise GraphError(f"`{operation.name}` is given no tensor.")
        return self._once(
            operation.name, node, lambda: self.run(operation.name, operation.function, node.args, node.kwargs)
        )

    def _once(self, name: str, node: torch.fx.Node, check: Callable[[], Any]) -> Any:
        """What the result of a node looks like; it is checked only if no node was that is given what looks the same."""
        asked = Asked.of((name, self.value_bytes), node)
        found = None if asked is None else asked.known()
        if found is not None:
            self._check_time()
            return found
        pieces = self._pieces
        result = check()
        if asked is not None and self._pieces == pieces:  # those are counted for each node
            asked.remember(result)
        return result

    def _edit(self, node: torch.fx.Node) -> Any:
        return self._once("edit", node, lambda: self._edited(node))

    def _edited(self, node: torch.fx.Node) -> Any:
        base = node.args[0]
        assert isinstance(base, torch.fx.Node)
        args, _ = _fakes(node.args, {})
        if _has_unknown(args):
            node.meta["unchecked"] = True
            return fake_of(base)
        try:
            edited = self.check_edit(*args)
        except ShapeError as error:
            what = f"`{base.args[0]}`" if base.target is g.read else "The value"
            given = ", ".join(describe(fake_of(each)) for each in _nodes(node.args[2])) or "this"
            raise ShapeError(
                f"{what} is {describe(fake_of(base))}; the part that is changed does not take {given}:"
                f"{error.message.partition(':')[2]}",
                hint=_LOOK,
            ) from None
        return fake_of(base) if edited is None else edited

    def check_edit(self, base: Any, views: Sequence[g.Change], change: g.Change) -> Any:
        """What an edit of a fake looks like, every step on the way checked; None if a step depends on data.

        Args:
            base: The fake of the value that is edited.
            views: The way to the place that is changed, with fakes for tensors.
            change: What changes it, with fakes for tensors.

        Raises:
            ShapeError, OperationError, LimitError: a step that does not fit.
        """

        def step(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            result = self._result(name, ops.OPERATIONS[name].function, args, kwargs)
            self.check_size(result)
            return result

        try:
            return g.edit(base, views, change, step)
        except (PatchwireError, TookLongError):
            raise
        except NotImplementedError:
            return None
        except Exception as error:  # a way that leads nowhere
            raise ShapeError(f"`{change[0]}` cannot be done: {first_line(error)}", hint=_LOOK) from None

    def run(self, name: str, function: Any, args: Any, kwargs: Any) -> Any:
        """What the result of a function on nodes or fakes looks like; None if that depends on data.

        Raises:
            ShapeError, OperationError, LimitError: it cannot be done with these.
        """
        args, kwargs = _fakes(args, kwargs)
        if _has_unknown((args, kwargs)):
            _check_arguments(name, args, kwargs)
            return None
        try:
            return _results(name, self._result(name, function, args, kwargs))
        except NotImplementedError:
            if name in ops.DATA_DEPENDENT:
                return None
            raise OperationError(
                f"The size of `{name}` depends on values here.",
                hint="Save what it is given, and compute this after the block.",
            ) from None

    def _result(self, name: str, function: Any, args: Any, kwargs: Any) -> Any:
        """What a function makes of fakes.

        Raises:
            NotImplementedError: that depends on data.
        """
        self._check_time()
        _check_arguments(name, args, kwargs)
        _check_dtypes(name, args, kwargs)
        _check_pieces(name, args, kwargs)
        _check_work(name, args, kwargs)
        try:
            self._check_bytes(name, _scratch(name, args, kwargs))
            with nullcontext() if name in _ELEMENTWISE or self.value_bytes is None else _Sizes(name, self._check_bytes):
                place = {"device": "meta"} if ops.OPERATIONS[name].kind == "draw" else {}
                result = function(*_any_places(name, args), **kwargs, **place)
        except (NotImplementedError, PatchwireError):
            raise
        except Exception as error:  # PyTorch and Python raise what they like
            tensors = ", ".join(describe(each) for each in _tensors((args, kwargs)))
            raise ShapeError(
                f"`{name.rsplit('.', 1)[-1]}` cannot be done with {tensors}: {first_line(error)}", hint=_LOOK
            ) from None
        if isinstance(result, (tuple, list)):
            self._pieces += len(result)
            if self._pieces > _MAX_ALL_PIECES:
                raise LimitError(
                    f"The graph takes values apart into more than {_MAX_ALL_PIECES:,} pieces.",
                    hint="Split it into several traces, or index the values that are needed.",
                )
        return result

    def _check_time(self) -> None:
        if time.monotonic() > self.until:
            raise TookLongError

    def _apply(self, node: torch.fx.Node) -> Any:
        trace, name, args, kwargs, weights = node.args
        catalogue = self.catalogue(self.graph.traces[trace].model)  # type: ignore[index]
        module = catalogue.module(name)  # type: ignore[arg-type]
        for path, weight in weights.items():  # type: ignore[union-attr]
            self._fits(path, catalogue.parameter(path), weight)  # type: ignore[arg-type]
        values = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.fx.Node)]  # type: ignore[misc, union-attr]
        if not module.leaves or not values:
            return None
        return applied(module, fake_of(values[0]))

    def _constant(self, node: torch.fx.Node) -> Tensor:
        tensor = self.graph.constants[node.args[0]]  # type: ignore[index]
        if isinstance(tensor, g.KeptTensor) and tensor.fake is not None:
            return tensor.fake
        if not isinstance(tensor, Tensor):
            raise GraphError("A constant was not looked up.")
        return tensor.to("meta")

    def _parameter(self, node: torch.fx.Node) -> Tensor:
        trace, path = node.args
        found = self.catalogue(self.graph.traces[trace].model).parameter(path)  # type: ignore[index, arg-type]
        return torch.empty(found.shape, dtype=found.dtype, device="meta")

    def _grad(self, node: torch.fx.Node) -> tuple[Any, ...]:
        loss, values, weights = node.args
        assert isinstance(loss, torch.fx.Node)
        fake = fake_of(loss)
        if isinstance(fake, Tensor):
            if not fake.dtype.is_floating_point:
                raise ShapeError(
                    f"A gradient is of a floating-point value, not of {describe(fake)}.",
                    hint="Take it of what the whole numbers were computed from.",
                )
            if weights is None and fake.numel() != 1:
                raise ShapeError(
                    f"A gradient is of one number, and this is {describe(fake)}.",
                    hint="Write `.sum()` or `.mean()`, or take one element; or give `weights` of its shape.",
                )
            weigh = fake if weights is None else fake_of(weights)  # type: ignore[arg-type]
            if isinstance(weigh, Tensor) and weigh.shape != fake.shape:
                raise ShapeError(f"`weights` has the shape of the value, {list(fake.shape)}, not {list(weigh.shape)}.")
        self._refuse_loops_between(loss, values)  # type: ignore[arg-type]
        for each in values:  # type: ignore[union-attr]
            self._differentiable(each, loss)  # type: ignore[arg-type]
        return tuple(fake_of(each) for each in values)  # type: ignore[union-attr, arg-type]

    def _refuse_loops_between(self, loss: torch.fx.Node, values: Sequence[torch.fx.Node]) -> None:
        if not self.graph.loops:
            return
        writes: dict[int, list[torch.fx.Node]] = defaultdict(list)
        for node in self.graph.fx.nodes:
            if node.target is g.write:
                writes[node.args[0].trace].append(node)
            elif node.target is g.assign:
                writes[node.args[0]].append(node)
        for each in behind(loss, writes):
            if each.target is g.loop and not set(values).isdisjoint(behind(each, writes)):
                raise OperationError(
                    "There are no gradients through a loop: each iteration starts anew.",
                    hint="Take the gradient in its body, or with respect to a value that comes after it.",
                )

    def _differentiable(self, value: torch.fx.Node, loss: torch.fx.Node) -> None:
        fake, mine, its = fake_of(value), value.meta["after"], loss.meta["after"]
        if not isinstance(fake, Tensor) or not fake.dtype.is_floating_point:
            raise ShapeError(
                f"A gradient is with respect to a floating-point value, not {describe(fake)}.",
                hint="Take it with respect to what is computed from that: `model.embed.output`, or `value.float()`.",
            )
        if mine is not None and (its is None or mine.order > its.order):
            raise OrderError(
                f"The value that is differentiated does not depend on `{mine.site}`, which comes later.",
                hint="Take the gradient with respect to a value before it.",
                lines=[with_code(line) for line in (its and its.line, mine.line) if line is not None],
            )

        first, last = (0 if each is None else int(each.order[0]) for each in (mine, its))
        if its is not None and any(each.generation is not None for each in self.graph.traces[first : last + 1]):
            # Hugging Face's loop remembers no way back: a part of the gradient would be missing without a word.
            raise OperationError(
                "There are no gradients through a generation, and one lies between the value and the loss.",
                hint="Generate in a request of its own, and trace the generated tokens: `model.trace(ids)`.",
            )

    def _generated(self, node: torch.fx.Node) -> Tensor | None:
        trace = node.args[0]
        assert isinstance(trace, int)
        if self.graph.traces[trace].generation is None:
            raise GraphError("This trace generates no tokens.", hint="Write `model.generate(…)`.")
        # How many tokens there will be depends on what they are.
        node.meta["after"] = After((trace, math.inf), "the generated tokens", g.line_of(node))
        return None

    def _token_ids(self, node: torch.fx.Node) -> Tensor:
        trace, invoke = node.args
        lengths = self.graph.traces[trace].invokes[invoke].lengths  # type: ignore[index]
        return torch.empty((len(lengths), max(lengths)), dtype=torch.int64, device="meta")

    def _loop(self, node: torch.fx.Node) -> tuple[Any, ...] | None:
        trace, inputs = node.args
        assert isinstance(trace, int)
        before: After | None = node.meta["after"]
        if before is not None and before.order[0] >= trace:
            raise OrderError(
                f"A loop needs a value of `{before.site}`, which comes later.",
                hint="Write the trace that the value is of before the loop.",
            )
        node.meta["after"] = After((trace, math.inf), "the loop", g.line_of(node))
        loop = self.graph.traces[trace].loop
        assert loop is not None
        fakes = tuple(fake_of(inputs[each.args[0]]) for each in loop.carries)  # type: ignore[index, arg-type]
        return None if None in fakes else fakes

    def _outside(self, node: torch.fx.Node) -> Tensor | None:
        found = self.graph.outside[node.args[0]]  # type: ignore[index]
        return None if found is None else found.to("meta")

    def _carry(self, node: torch.fx.Node) -> None:
        index, value = node.args
        before, after = self.graph.outside[index], fake_of(value)  # type: ignore[index, arg-type]
        if isinstance(after, tuple):
            raise ShapeError("A tuple cannot be carried as one value.", hint="Carry each of its items: `value[0]`.")
        if before is not None and after is not None and (before.shape, before.dtype) != (after.shape, after.dtype):
            raise ShapeError(
                f"The value that is carried is {describe(before)} and cannot become {describe(after)}.",
                hint="It has the same shape and dtype in every iteration: start it as what it becomes.",
            )

    def _assign(self, node: torch.fx.Node) -> None:
        trace, path, value = node.args
        assert isinstance(trace, int)
        assert isinstance(path, str)
        assert isinstance(value, torch.fx.Node)
        self._fits(path, self.catalogue(self.graph.traces[trace].model).parameter(path), value)
        after: After | None = value.meta["after"]
        if after is not None and after.order >= (trace,):
            raise OrderError(
                f"`{path}` cannot become a value of `{after.site}`, which exists only when the model runs with it.",
                hint="Read the value in an earlier trace of a session.",
                lines=[with_code(line) for line in (g.line_of(node), after.line) if line is not None],
            )

    @staticmethod
    def _fits(path: str, parameter: Parameter, value: torch.fx.Node) -> None:
        fake = fake_of(value)
        own = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        if isinstance(fake, Tensor) and (fake.shape != own.shape or fake.dtype != own.dtype):
            hint = "Assign a value of the same shape, or change part of it in place: `weight[:, 0] = …`."
            if fake.shape == own.shape:
                hint = f"Convert it: `.to({own.dtype})`."
            raise ShapeError(f"`{path}` is {describe(own)} and cannot become {describe(fake)}.", hint=hint)

    def _save(self, node: torch.fx.Node) -> None:
        if isinstance(fake_of(node.args[0]), tuple):  # type: ignore[arg-type]
            raise GraphError("A tuple cannot be saved as one value.", hint="Take one of its items: `value[0]`.")

    def _log(self, node: torch.fx.Node) -> None:
        for part in node.args[0]:  # type: ignore[union-attr]
            fine = not isinstance(fake_of(part), tuple) if isinstance(part, torch.fx.Node) else isinstance(part, str)
            if not fine:
                raise GraphError(
                    "A log is of texts and of values that are one tensor each.",
                    hint="Take one of its items: `value[0]`.",
                )

    def check_size(self, fake: Any) -> None:
        """Refuse a value that is too large."""
        if self.value_bytes is None:
            return
        for tensor in [fake] if isinstance(fake, Tensor) else _tensors(fake):
            if tensor.numel() * tensor.itemsize > self.value_bytes:
                raise LimitError(
                    f"A value of shape {list(tensor.shape)} has {tensor.numel() * tensor.itemsize:,} bytes; "
                    f"the server allows {self.value_bytes:,}.",
                    hint="Compute it in smaller parts, or take the part that is needed first.",
                )

    def _check_bytes(self, name: str, size: int) -> None:
        if self.value_bytes is not None and size > self.value_bytes:
            raise LimitError(
                f"`{name.rsplit('.', 1)[-1]}` needs {size:,} bytes on its way; the server allows {self.value_bytes:,}.",
                hint="Compute it in smaller parts, or take the part that is needed first.",
            )


class _Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Checks the size of every tensor that an operation makes on the way to its result, and the work of its products.

    Many operations are made of others, and these are seen as PyTorch's dispatcher sees them: the products of an
    `einsum`, the copies that a `matmul` of broadcast batches makes. Views are not counted, for they take no memory.
    """

    def __init__(self, name: str, check: Callable[[str, int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.name = name
        self.check = check

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = _tensors((args, kwargs))
        _check_products(self.name, func._schema.name.removeprefix("aten::"), given)
        for tensor in _tensors(result):
            if not any(g.same_storage(tensor, each) for each in given):
                self.check(self.name, tensor.numel() * tensor.itemsize)
        return result


def applied(module: Module, fake: Any) -> Tensor | None:
    """What a module of the model returns for a value, or None if that is not known.

    Dimensions that a module's input and output have in common (rows, tokens) pass through whatever their length;
    the others must be those of the model's own call.

    Raises:
        ShapeError: the value cannot be given to the module.
    """
    source, result = module.main("input"), module.main("output")
    if source is None or result is None or result.path or not isinstance(fake, Tensor):
        return None
    common = 0
    for one, other in zip(source.shape, result.shape, strict=False):
        if one != other or one.axis is Axis.CONSTANT:
            break
        common += 1
    wanted, given = source.shape[common:], result.shape[common:]
    if any(dim.axis is not Axis.CONSTANT for dim in (*wanted, *given)):
        return None
    split = fake.ndim - len(wanted)
    trailing = tuple(dim.size for dim in wanted)
    if split < 0 or tuple(fake.shape[split:]) != trailing:
        ending = ", ".join(str(length) for length in trailing)
        raise ShapeError(f"`{module.path}` takes values of shape [..., {ending}], not {describe(fake)}.", hint=_LOOK)
    return torch.empty((*fake.shape[:split], *(dim.size for dim in given)), dtype=result.dtype, device="meta")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for each in value for tensor in _tensors(each)]
    return []


def _results(name: str, result: Any) -> Any:
    if isinstance(result, Tensor):
        return result
    if hasattr(result, "n_fields"):  # a named result, such as topk's
        return result
    if isinstance(result, (tuple, list)):
        return tuple(_results(name, each) for each in result)
    raise OperationError(
        f"`{name}` gives a {type(result).__name__}, which is not a tensor.",
        hint="Give it tensors: the items of a tuple, `value[0]`.",
    )


def _any_places(name: str, args: Any) -> Any:
    """The same arguments, with 0 for every index that is a tensor of one integer: any number gives the same shape."""
    if name in ("operator.getitem", "operator.setitem") and len(args) > 1:
        return (args[0], _any_place(args[1]), *args[2:])
    return args


def _any_place(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_any_place(each) for each in index)
    if isinstance(index, Tensor) and not index.ndim and not index.is_floating_point() and index.dtype is not torch.bool:
        return 0
    return index


class _Unknown:
    """Stands for a value of unknown shape."""


_UNKNOWN = _Unknown()


def _fakes(args: Any, kwargs: Any) -> Any:
    """The same arguments, with fakes for nodes."""

    def fake(node: torch.fx.Node) -> Any:
        value = fake_of(node)
        return _UNKNOWN if value is None else value

    return map_arg(args, fake), map_arg(kwargs, fake)


def _has_unknown(argument: Any) -> bool:
    if isinstance(argument, dict):
        return any(map(_has_unknown, argument.values()))
    if isinstance(argument, slice):
        return any(map(_has_unknown, (argument.start, argument.stop, argument.step)))
    if isinstance(argument, (tuple, list)):
        return any(map(_has_unknown, argument))
    return argument is _UNKNOWN


def _is_tensor(value: Any) -> bool:
    return value is _UNKNOWN or isinstance(value, Tensor)


def _is_tensors(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and bool(value) and all(map(_is_tensor, value))


def _has_tensor(value: Any) -> bool:
    return _is_tensor(value) or (isinstance(value, (tuple, list)) and any(map(_has_tensor, value)))


def _check_lengths(argument: Any) -> None:
    if isinstance(argument, (tuple, list)):
        if len(argument) > g.MAX_ITEMS:
            raise g.too_long(argument)
        for each in argument:
            _check_lengths(each)


def _check_arguments(name: str, args: Any, kwargs: Any) -> None:
    """Refuse arguments on which Python would compute instead of PyTorch, at any length and size: `[x] * 10**9`."""
    owner, _, short = name.rpartition(".")
    values = (*args, *kwargs.values())
    _check_lengths(values)
    first = wrong = args[0] if args else None
    if name in ("operator.getitem", "operator.setitem"):
        # An item of a tuple is how a graph takes one of several results.
        item = name == "operator.getitem" and isinstance(first, tuple) and isinstance(args[-1], (int, slice))
        fine = _is_tensor(first) or item
    elif owner == ops.DRAWS:
        fine = not any(map(_has_tensor, values))
    elif owner == "operator":
        odd = [each for each in values if not _is_tensor(each) and not isinstance(each, (bool, int, float))]
        fine, wrong = not odd, odd[0] if odd else None
    elif owner == "torch.Tensor":
        fine = _is_tensor(first)
    elif not args or isinstance(first, (bool, int, float)) or name == "torch.einsum":
        fine = any(_is_tensor(each) or _is_tensors(each) for each in values)
    else:
        fine = _is_tensor(first) or _is_tensors(first)
    if not fine and owner == ops.DRAWS:
        raise OperationError(
            f"`{name}` takes numbers that are known inside the block, not a value.",
            hint="Give a value's shape, and compute with what is drawn: `patchwire.random.uniform(p, seed=0) < p`.",
        )
    if not fine:
        takes = "tensors and numbers" if owner == "operator" else "tensors"
        raise OperationError(
            f"`{short}` takes {takes}, not a {type(wrong).__name__.removeprefix('immutable_')}.",
            hint="Make one tensor of several numbers with `torch.tensor`, and of several tensors with `torch.stack`.",
        )


def _check_dtypes(name: str, args: Any, kwargs: Any) -> None:
    """Refuse tensors of several dtypes where PyTorch finds them only once they have numbers."""
    short = name.rpartition(".")[2]
    given = _tensors((args, kwargs)) if short in _OF_ONE_DTYPE else []
    if len({each.dtype for each in given}) > 1:
        raise ShapeError(
            f"`{short}` takes values of one dtype, not {', '.join(describe(each) for each in given)}.",
            hint=f"Convert the others: `.to({given[0].dtype})`.",
        )


def _given(args: Any, kwargs: Any, position: int, *names: str) -> Any:
    """An argument, given by position or by one of its names."""
    if len(args) > position:
        return args[position]
    return next((kwargs[name] for name in names if name in kwargs), None)


def _check_pieces(name: str, args: Any, kwargs: Any) -> None:
    """Refuse what makes or joins so many tensors that their number, not their size, is the work."""
    short, tensors = name.rsplit(".", 1)[-1], _tensors((args, kwargs))
    numbers = [each for each in (*args[1:], *kwargs.values()) if isinstance(each, int)]
    pieces, limit = 0, _MAX_PIECES
    match short:
        case "unbind":
            pieces = _longest(tensors, _given(args, kwargs, 1, "dim"))
        case "split":
            size = _given(args, kwargs, 1, "split_size", "split_size_or_sections")
            if isinstance(size, int):
                pieces = _longest(tensors, _given(args, kwargs, 2, "dim")) // max(size, 1)
        case "chunk" | "tensor_split" | "hsplit" | "vsplit" | "dsplit":
            pieces = max(numbers, default=0)
        case "meshgrid" | "cartesian_prod" | "chain_matmul" | "multi_dot":
            pieces, limit = len(tensors), _MAX_JOINED
        case "tensordot":
            pieces, limit = max(numbers, default=0), _MAX_JOINED
        case "diff":  # so many times, one after the other
            pieces, limit = _given(args, kwargs, 1, "n") or 1, _MAX_JOINED
        case "matrix_power":
            pieces, limit = abs(_given(args, kwargs, 1, "n") or 1), _MAX_POWER
    if isinstance(pieces, int) and pieces > limit:
        raise LimitError(
            f"`{short}` of {pieces:,} is too many; at most {limit:,} are allowed.", hint="Do it in smaller parts."
        )


def _longest(tensors: list[Tensor], dim: Any) -> int:
    """How long the longest of some tensors is along a dimension."""
    dim = 0 if dim is None else dim
    if not isinstance(dim, int):
        return 0  # not for this operation
    return max((each.shape[dim] for each in tensors if -each.ndim <= dim < each.ndim), default=0)


def _check_work(name: str, args: Any, kwargs: Any) -> None:
    """Refuse decompositions and inverses of matrices whose size allows them, and whose time does not."""
    owner, _, short = name.rpartition(".")
    norm = short in ("norm", "matrix_norm")
    if norm:
        order, dim = _given(args, kwargs, 1, "ord", "p"), _given(args, kwargs, 2, "dim")
        if order != "nuc" and not (order in (2, -2) and owner == "torch.linalg" and not isinstance(dim, int)):
            return
    elif short not in _CUBIC.split():
        return
    for tensor in _tensors((args, kwargs)):
        # A norm may be of any two dimensions.
        sides = sorted(tensor.shape)[-2:] if norm else tensor.shape[-2:]
        work = tensor.numel() * min(sides) if len(sides) == 2 else 0
        if work > _MAX_WORK:
            raise LimitError(
                f"`{short}` of {describe(tensor)} takes too long; one matrix of 8192 by 8192 is the most.",
                hint="Give it smaller matrices, or fewer at once.",
            )


def _check_products(name: str, kind: str, tensors: list[Tensor]) -> None:
    """Refuse products of matrices that fit, and whose time does not: nothing ends an operation before it is done."""
    if kind not in _PRODUCTS:
        return
    first, dim = _PRODUCTS[kind]
    one, other = tensors[first : first + 2]
    if one.numel() * other.shape[dim] > _MAX_PRODUCTS:
        raise LimitError(
            f"`{name.rsplit('.', 1)[-1]}` of {describe(one)} and {describe(other)} takes too long.",
            hint="Give it smaller matrices, or fewer at once.",
        )


def _broadcast(tensors: list[Tensor]) -> int:
    """How many elements tensors have after they are broadcast, if they can be."""
    shapes = [reversed(each.shape) for each in tensors]
    return math.prod(0 if 0 in each else max(each) for each in zip_longest(*shapes, fillvalue=1))


def _scratch(name: str, args: Any, kwargs: Any) -> int:
    """How many bytes an operation needs on its way that neither its result nor PyTorch's dispatcher show."""
    short, tensors = name.rsplit(".", 1)[-1], _tensors((args, kwargs))
    widest = max((each.itemsize for each in tensors), default=0)
    if ops.OPERATIONS[name].kind == "draw":  # before it is converted
        size = _given(args, kwargs, 0, "size", "n")
        lengths = [each for each in (size if isinstance(size, (tuple, list)) else [size]) if isinstance(each, int)]
        return math.prod(lengths) * _DRAWN_ITEMSIZE
    match short:
        case "dist" | "l1_loss" | "mse_loss" | "smooth_l1_loss" | "huber_loss":
            return _broadcast(tensors) * widest
        case "cdist" | "solve":
            largest = max((math.prod(each.shape[-2:]) for each in tensors), default=0)
            batches = [torch.empty(each.shape[:-2], device="meta") for each in tensors]
            return _broadcast(batches) * largest * widest
        case "isin":
            elements, tests = (
                _tensors(_given(args, kwargs, *each)) for each in ((0, "elements"), (1, "test_elements"))
            )
            few = _broadcast(tests) < _FEW  # these are compared with every element, many are sorted
            return _broadcast(elements) * _broadcast(tests) if few else 0
        case "nonzero" | "argwhere":
            return sum(_positions(each) for each in tensors)
        case "where" if len(tensors) == 1:
            return _positions(tensors[0])
        case "index_fill" | "index_fill_" if len(tensors) > 1:
            length = _longest(tensors[:1], _given(args, kwargs, 1, "dim"))
            return tensors[0].nbytes // max(length, 1) * max(each.numel() for each in tensors[1:])
        case "getitem" | "setitem" | "index_put" | "index_put_":
            index = _given(args, kwargs, 1, "indices")
            masks = [each for each in _tensors(index) if each.dtype in (torch.bool, torch.uint8)]
            if masks or short == "getitem" or not _tensors(index):
                return sum(_positions(each) for each in masks)
            # What an index picks is changed as often as it is picked.
            return int(tensors[0][tuple(index) if short.startswith("index_put") else _any_place(index)].nbytes)
    return 0


def _positions(mask: Tensor) -> int:
    """How many bytes the positions of all elements have."""
    return mask.numel() * max(mask.ndim, 1) * 8


def behind(node: torch.fx.Node, writes: Mapping[int, Sequence[torch.fx.Node]] | None = None) -> set[torch.fx.Node]:
    """Everything that a node depends on through the graph, itself included.

    With the writes of each trace, also what it may depend on through the model.
    """
    found, stack = {node}, [node]
    while stack:
        each = stack.pop()
        site = each.args[0] if writes and each.target is g.read else None
        through = writes.get(site.trace, ()) if writes and isinstance(site, g.Site) else ()
        new = {*each.all_input_nodes, *through} - found
        found |= new
        stack += new
    return found


def _nodes(argument: Any) -> list[torch.fx.Node]:
    found: list[torch.fx.Node] = []
    map_arg(argument, found.append)
    return found
