"""Finding an operation in the text of a function by what it does, not by its number there.

Tables name operations in forwards so that they hold for every version of transformers in which the code still does the
same: "softmax()" is the one call of a function of that name, "softmax()[1]" the second; "@ln_2" is what is assigned to
the variable that the call of `ln_2` is given, in whatever case; "x=" is the last assignment to x, "x=[0]" the first and
"x=[-2]" the last but one. nnsight's own names, which sites have, follow from that.

Forwards branch on how a model was configured (`if self.use_parallel_residual:`). What a module's own attributes decide
is decided here too, so that a token means an operation that runs in this model, or none. One such attribute can be
changed for a pass: how attention is computed. An operation that runs only where it is computed step by step is found as
well, and passes in which somebody waits there compute it so.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import operator
import re
import sys
import threading
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnsight.intervention.source import Instrument, SourceNotAvailable, decorator_chain, source_tree
from torch import nn
from transformers import PreTrainedConfig

from patchwire_worker.models.standins import STAND_INS

_TOKEN = re.compile(r"(?:(?P<call>\w+)\(\)|@(?P<given>\w+)|(?P<assigned>\w+)=)(?:\[(?P<index>-?\d+)\])?")
_SHAPING = frozenset({"reshape", "view", "flatten", "transpose", "permute", "contiguous"})
EAGER = "eager_attention_forward"
"""The name of the function that computes attention step by step, in every file of transformers that has one."""
INTERFACE = "attention_interface"
"""What forwards call the attention function that the configuration chooses."""


@dataclass(frozen=True)
class _Operation:
    label: str
    name: str
    node: ast.AST
    branches: frozenset[int]
    """The branches and loops that it is in."""
    conditions: tuple[tuple[int, bool], ...]
    """Which conditions, of those in the text, have to be true, or false, for it to run."""

    @property
    def is_call(self) -> bool:
        return isinstance(self.node, ast.Call)


class _Collected(Instrument):  # type: ignore[misc]
    """nnsight's way through a text, on which operations are collected."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self.branches: list[int] = []
        self.tests: list[ast.expr] = []
        self.conditions: list[tuple[int, bool]] = []

    def visit(self, node: ast.AST) -> Any:
        branches = isinstance(node, (ast.If, ast.For, ast.While, ast.Try, ast.With))
        self.branches += [id(node)] if branches else []
        found = super().visit(node)
        if branches:
            self.branches.pop()
        return found

    def visit_If(self, node: ast.If) -> ast.AST:
        """Both sides of a branch, in order."""
        test = len(self.tests)
        self.tests.append(copy.deepcopy(node.test))
        node.test = self.visit(node.test)
        for body, taken in ((node.body, True), (node.orelse, False)):
            self.conditions.append((test, taken))
            body[:] = [self.visit(each) for each in body]
            self.conditions.pop()
        return node

    def wrap(self, name: str, fn: Any, args: Any, keywords: Any, node: ast.AST) -> Any:
        call = super().wrap(name, fn, args, keywords, node)
        self.operations.append(_Operation(self.names[-1], name, node, frozenset(self.branches), tuple(self.conditions)))
        return call


_Truths = tuple[bool | None, ...]
"""What the conditions of a text come to; None where that is not known."""


@dataclass(frozen=True)
class _Text:
    operations: Sequence[_Operation]
    """In order."""
    tests: Sequence[ast.expr]
    """The conditions of its branches."""
    assigned: Mapping[str, ast.expr]
    """What the variables are that are assigned once."""

    def truths(self, module: nn.Module, *, eager: bool = False) -> _Truths:
        """What is known of the conditions, if attention is computed as it is configured, or step by step."""
        facts = _Facts(module, self.assigned, eager)
        return tuple(map(facts.of, self.tests))

    def running(self, truths: _Truths) -> list[_Operation]:
        """The operations that nothing that is known keeps from running."""
        return [each for each in self.operations if all(truths[at] in (taken, None) for at, taken in each.conditions)]

    def only_eager(self, module: nn.Module) -> list[_Operation]:
        """Those that surely run only if attention is computed step by step, and it is not."""
        now, then = self.truths(module), self.truths(module, eager=True)
        if now == then:
            return []
        return [
            each for each in self.running(then) if any(then[at] == taken != now[at] for at, taken in each.conditions)
        ]


@functools.lru_cache(1 << 10)
def _read(function: Callable[..., Any]) -> _Text:
    tree, _, _ = source_tree(decorator_chain(function)[0].__code__)
    tree.body[0].decorator_list = []
    stored = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    stored += [node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)]
    once = {
        node.targets[0].id: copy.deepcopy(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and stored.count(node.targets[0].id) == 1
    }
    collected = _Collected()
    collected.visit(tree)
    return _Text(collected.operations, collected.tests, once)


class _Facts:
    """What conditions come to that only attributes of a module decide."""

    _UNKNOWN = object()
    _COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
        ast.Eq: operator.eq,
        ast.NotEq: operator.ne,
        ast.Is: operator.is_,
        ast.IsNot: operator.is_not,
        ast.In: lambda one, of: one in of,
        ast.NotIn: lambda one, of: one not in of,
    }

    def __init__(self, module: nn.Module, assigned: Mapping[str, ast.expr], eager: bool) -> None:
        self._module = module
        self._assigned = assigned
        self._eager = eager

    def of(self, test: ast.expr) -> bool | None:
        """Whether it is true; None if that is not known."""
        value = self._value(test)
        return bool(value) if isinstance(value, (bool, int, float, str, type(None))) else None

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id="self"):
                return self._module
            case ast.Name(id=name) if name in self._assigned:
                others = {other: value for other, value in self._assigned.items() if other != name}
                return _Facts(self._module, others, self._eager)._value(self._assigned[name])
            case ast.Attribute(value=owner, attr=name):
                found = self._value(owner)
                if found is self._UNKNOWN:
                    return found
                return "eager" if self._eager and name == _CHOICE else getattr(found, name, self._UNKNOWN)
            case ast.Tuple(elts=each) | ast.List(elts=each):
                values = [self._value(one) for one in each]
                return self._UNKNOWN if any(one is self._UNKNOWN for one in values) else values
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                known = self.of(inner)
                return self._UNKNOWN if known is None else not known
            case ast.BoolOp(op=op, values=parts):
                decides = isinstance(op, ast.Or)
                truths = [self.of(part) for part in parts]
                return decides if decides in truths else self._UNKNOWN if None in truths else not decides
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in self._COMPARISONS:
                sides = self._value(left), self._value(right)
                if any(side is self._UNKNOWN for side in sides):
                    return self._UNKNOWN
                with contextlib.suppress(TypeError):  # of things that cannot be compared: the model does not come by
                    return self._COMPARISONS[type(op)](*sides)
        return self._UNKNOWN


def find(function: Callable[..., Any], token: str, module: nn.Module, *, eager: bool = False) -> str:
    """nnsight's name of an operation.

    Args:
        function: In which function.
        token: What it does.
        module: The module whose attributes decide what runs.
        eager: Whether attention is computed step by step.

    Raises:
        LookupError: there is none that runs, or several and no number says which.
        SourceNotAvailable: the text is not to be had.
    """
    return _find(function, token, _read(function).truths(module, eager=eager))


@functools.lru_cache(1 << 12)
def _find(function: Callable[..., Any], token: str, truths: _Truths) -> str:
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise LookupError(f"{token!r} names no operation")
    known = _read(function).running(truths)
    if match["given"]:
        return _given(known, match["given"]).label
    calls = match["call"] is not None
    wanted = match["call"] or match["assigned"]
    found = [each for each in known if each.is_call == calls and re.search(rf"(^|_){wanted}$", each.name)]
    exact = [each for each in found if each.name == wanted]
    found = exact or found
    index = int(match["index"] or -1)
    if not -len(found) <= index < len(found) or (calls and len(found) > 1 and not match["index"]):
        raise LookupError(f"{token!r} is there {len(found)} times")
    return found[index].label


def _given(known: list[_Operation], name: str) -> _Operation:
    for position, each in enumerate(known):
        if each.is_call and re.search(rf"(^|_){name}$", each.name):
            assert isinstance(each.node, ast.Call)
            argument = each.node.args[0] if each.node.args else None
            if isinstance(argument, ast.Name):
                before = [
                    other
                    for other in known[:position]
                    if not other.is_call and other.name == argument.id and other.branches <= each.branches
                ]
                if before:
                    return before[-1]
            break
    raise LookupError(f"what {name!r} is given is not assigned before")


def called(owner: type, label: str) -> Callable[..., Any]:
    """The function that an operation in the forward of a class, or in a function beside it, calls.

    Raises:
        LookupError: the text does not say which.
    """
    name = label.rpartition("_")[0]
    module = sys.modules[owner.__module__]
    if name == INTERFACE:
        name = EAGER
    own = getattr(owner, name.removeprefix("self_"), None) if name.startswith("self_") else None
    function = own if own is not None else getattr(module, name, None)
    if not callable(function):
        raise LookupError(f"{name!r} is not a function of {module.__name__}")
    return transparent(function)


def transparent(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function to look into in the place of one: the text of what a kernel computes otherwise, step by step."""
    wrapper = getattr(function, "__code__", None)
    if wrapper is not None and wrapper.co_qualname.startswith(_DISPATCHER) and hasattr(function, "__wrapped__"):
        return STAND_INS.get(function.__name__, function.__wrapped__)
    stand_in = STAND_INS.get(getattr(function, "__qualname__", ""))
    if stand_in is None:
        return function
    receiver = getattr(function, "__self__", None)
    return stand_in if receiver is None else types.MethodType(stand_in, receiver)


def is_interface(label: str) -> bool:
    """Whether an operation is the call of the attention function that the configuration chooses."""
    return label.rpartition("_")[0] == INTERFACE


def only_eager(module: nn.Module) -> Collection[str]:
    """The operations in a module's forward that run only if attention is computed step by step, and it is not."""
    try:
        return frozenset(each.label for each in _read(type(module).forward).only_eager(module))
    except (SourceNotAvailable, SyntaxError):
        return frozenset()


def needs_steps(module: nn.Module, operations: Sequence[str]) -> bool:
    """Whether the way to an operation exists only if attention is computed step by step, and it is not.

    Args:
        module: The module in whose forward the way starts.
        operations: The operations on it, each inside the one before.
    """
    if not operations:
        return False
    return any(map(is_interface, operations[:-1])) or operations[0] in only_eager(module)


def goes_straight(module: nn.Module, output: str) -> bool:
    """Whether its output projection is given what attention's function returns, in another shape at most.

    Some models gate it before, or normalize it. True if the text has no call of such a function.

    Args:
        module: An attention module.
        output: What it calls its output projection.
    """
    try:
        tree, _, _ = source_tree(decorator_chain(type(module).forward)[0].__code__)
    except (SourceNotAvailable, SyntaxError):
        return True
    same: set[str] | None = None
    steps = [node for node in ast.walk(tree) if isinstance(node, (ast.Assign, ast.AugAssign, ast.Call))]
    # Of one statement, what is called comes before what that is assigned to.
    for node in sorted(steps, key=lambda each: (each.end_lineno, not isinstance(each, ast.Call))):
        if isinstance(node, ast.Call):
            if same is not None and ast.unparse(node.func) == f"self.{output}":
                return bool(node.args) and _shaped(node.args[0]) in same
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        value = node.value if isinstance(node, ast.Assign) else None
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == INTERFACE:
            first = target.elts[0] if isinstance(target, ast.Tuple) else target
            same = {ast.unparse(first)}
        elif same is not None:
            (same.add if _shaped(value) in same else same.discard)(ast.unparse(target))
    return same is None


def _shaped(node: ast.expr | None) -> str:
    """The variable that an expression only gives another shape; empty if it does more."""
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Subscript):
            node = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _SHAPING:
            node = node.func.value
        else:
            return ""
    return node.id


def choosing_attention(model: nn.Module) -> list[str]:
    """The paths of the modules that would compute attention step by step, and usually do not."""
    if all(getattr(each, _CHOICE, "eager") == "eager" for each in _configs(model).values()):
        return []
    return [path for path, each in model.named_modules() if _calls_interface(type(each)) or only_eager(each)]


def _calls_interface(kind: type[nn.Module]) -> bool:
    try:
        return any(is_interface(each.label) for each in _read(kind.forward).operations)
    except (SourceNotAvailable, SyntaxError):
        return False


def _configs(model: nn.Module) -> dict[int, Any]:
    return {id(each.config): each.config for each in model.modules() if hasattr(each, "config")}


@contextlib.contextmanager
def step_by_step(model: nn.Module) -> Iterator[None]:
    """Have a model compute attention step by step, so that scores and probabilities exist, instead of in one kernel.

    It does so on this thread alone. The model, or its configuration, may be in use on another, by the program that a
    server is embedded in or by another model of the server: there a forward pass that has made its mask for the kernel
    must not meet code that wants another mask, for that would see what comes later.
    """
    before = _THREAD.eager
    _THREAD.eager = before | _with_parts(_configs(model).values())
    try:
        yield
    finally:
        _THREAD.eager = before


def _with_parts(configs: Iterable[Any]) -> frozenset[int]:
    """The ids of configurations, and of those that are parts of them."""
    found, rest = set[int](), list(configs)
    while rest:
        each = rest.pop()
        if each is not None and id(each) not in found:
            found.add(id(each))
            rest += [getattr(each, part, None) for part in getattr(each, "sub_configs", ())]
    return frozenset(found)


class _Thread(threading.local):
    eager: frozenset[int] = frozenset()
    """The ids of the configurations that say, on this thread, that attention is computed step by step."""


_THREAD = _Thread()
_CHOICE = "_attn_implementation"
_CHOSEN: Any = PreTrainedConfig.__dict__[_CHOICE]
# Attributes of objects are the same on all threads; what a property says need not be.
setattr(
    PreTrainedConfig,
    _CHOICE,
    property(lambda config: "eager" if id(config) in _THREAD.eager else _CHOSEN.fget(config), _CHOSEN.fset),
)
_DISPATCHER = "use_kernel_func_from_hub_with_fallback."
