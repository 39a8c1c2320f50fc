"""Finding an operation in the text of a function by what it does, not by its number there.

Tables name operations in forwards so that they hold for every version of transformers in which the code still does the
same: "softmax()" is the one call of a function of that name, "softmax()[1]" the second; "@ln_2" is what is assigned to
the variable that the call of `ln_2` is given, in whatever case; "x=" is the last assignment to x, "x=[0]" the first and
"x=[-2]" the last but one. nnsight's own names, which sites have, follow from that.
"""

from __future__ import annotations

import ast
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nnsight.intervention.source import Instrument, decorator_chain, source_tree
from torch import nn

from patchwire_worker.models.standins import STAND_INS

_TOKEN = re.compile(r"(?:(?P<call>\w+)\(\)|@(?P<given>\w+)|(?P<assigned>\w+)=)(?:\[(?P<index>-?\d+)\])?")
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

    @property
    def is_call(self) -> bool:
        return isinstance(self.node, ast.Call)


class _Collected(Instrument):  # type: ignore[misc]
    """nnsight's way through a text, on which operations are collected."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self.branches: list[int] = []

    def visit(self, node: ast.AST) -> Any:
        branches = isinstance(node, (ast.If, ast.For, ast.While, ast.Try, ast.With))
        self.branches += [id(node)] if branches else []
        found = super().visit(node)
        if branches:
            self.branches.pop()
        return found

    def wrap(self, name: str, fn: Any, args: Any, keywords: Any, node: ast.AST) -> Any:
        call = super().wrap(name, fn, args, keywords, node)
        self.operations.append(_Operation(self.names[-1], name, node, frozenset(self.branches)))
        return call


def operations(function: Callable[..., Any]) -> list[_Operation]:
    """The operations of a function, in order.

    Raises:
        SourceNotAvailable: its text is not to be had.
    """
    tree, _, _ = source_tree(decorator_chain(function)[0].__code__)
    tree.body[0].decorator_list = []
    collected = _Collected()
    collected.visit(tree)
    return collected.operations


def find(function: Callable[..., Any], token: str) -> str:
    """nnsight's name of an operation.

    Raises:
        LookupError: there is none, or several and no number says which.
        SourceNotAvailable: the text is not to be had.
    """
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise LookupError(f"{token!r} names no operation")
    known = operations(function)
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
    return function


def is_interface(label: str) -> bool:
    """Whether an operation is the call of the attention function that the configuration chooses."""
    return label.rpartition("_")[0] == INTERFACE


@contextlib.contextmanager
def step_by_step(model: nn.Module) -> Iterator[None]:
    """Have a model compute attention step by step, so that scores and probabilities exist, instead of in one kernel."""
    configs: dict[int, Any] = {id(each.config): each.config for each in model.modules() if hasattr(each, "config")}
    before = {key: config._attn_implementation for key, config in configs.items() if hasattr(config, _CHOICE)}
    try:
        for key in before:
            configs[key]._attn_implementation = "eager"
        yield
    finally:
        for key, choice in before.items():
            configs[key]._attn_implementation = choice


_CHOICE = "_attn_implementation"
_DISPATCHER = "use_kernel_func_from_hub_with_fallback."
