"""Layouts: how a tensor in a model is laid out, in words, and the views from it to its canonical form.

A layout names the dimensions in order; what stands in parentheses is flattened into one. `name=0` takes one index of a
dimension; `q!|k|v` is parts of unequal length side by side, of which the one marked with `!` is taken, and split if
parentheses follow:

    batch seq (head d_head)                 a projection's output, heads side by side
    batch seq (qkv=0 head d_head)           GPT-2: the queries of one fused projection
    batch seq (head qkv=1 d_head)           GPT-NeoX: the keys, head by head
    batch seq q!|k|v(head d_head)           Phi-3: queries, and keys and values of fewer heads
    batch head seq d_head                   inside attention

The canonical form is a sequence of dimensions ("batch seq head d_head"); the views take parts, split dimensions and
permute them, so that the result shares memory with the tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from patchwire.views import View

_TOKEN = re.compile(r"[^\s()]*\([^()]*\)|\S+")
SYMBOLIC = frozenset({"batch", "seq", "query", "key"})
"""Dimensions whose length depends on the call."""


def views(layout: str, canonical: str, sizes: Mapping[str, int]) -> tuple[View, ...]:
    """The way from a tensor to its canonical form.

    Args:
        layout: How the tensor is laid out.
        canonical: The dimensions that are wanted, in order.
        sizes: The length of each dimension, but those that depend on the call.

    Raises:
        ValueError: the canonical form has other dimensions than the layout, or a length is not known.
    """
    found: list[View] = []
    names: list[str] = []
    for token in tokens(layout):
        parts, bracket, inside = token.partition("(")
        if "|" in parts:
            found += _narrow(len(names), parts, sizes)
        inner = inside.rstrip(")").split() if bracket else [_taken(parts)]
        if len(inner) > 1:
            lengths = [_length(each.partition("=")[0], sizes) for each in inner]
            found.append(View("unflatten", (len(names), *lengths)))
        for each in inner:
            name, _, index = each.partition("=")
            if index:
                found.append(View("select", (len(names), int(index))))
            else:
                names.append(name)
    wanted = canonical.split()
    if "seq" in wanted and "seq" not in names:  # one token, as in the steps of a generation
        found.append(View("unsqueeze", (len(names),)))
        names.append("seq")
    if sorted(wanted) != sorted(names):
        raise ValueError(f"the layout {layout!r} has {names}, and {canonical!r} is wanted")
    if names != wanted:
        found.append(View("permute", tuple(names.index(name) for name in wanted)))
    return tuple(found)


def tokens(layout: str) -> list[str]:
    """The dimensions of the tensor itself."""
    return _TOKEN.findall(layout)


def total(token: str, sizes: Mapping[str, int]) -> int:
    """The length of one dimension of the tensor itself.

    Raises:
        ValueError: that of a part of it is not known.
    """
    parts, bracket, inside = token.partition("(")
    if "|" in parts:
        return sum(_length(each.rstrip("!"), sizes) for each in parts.split("|"))
    inner = inside.rstrip(")").split() if bracket else [parts]
    return math.prod(_length(each.partition("=")[0], sizes) for each in inner)


def dims(canonical: str, sizes: Mapping[str, int]) -> str:
    """The canonical form with the lengths that are known: "batch seq head=12 d_head=64"."""
    return " ".join(each if each in SYMBOLIC else f"{each}={_length(each, sizes)}" for each in canonical.split())


def _narrow(dim: int, parts: str, sizes: Mapping[str, int]) -> list[View]:
    start = 0
    for each in parts.split("|"):
        length = _length(each.rstrip("!"), sizes)
        if each.endswith("!"):
            return [View("narrow", (dim, start, length))]
        start += length
    raise ValueError(f"none of {parts!r} is marked with !")


def _taken(parts: str) -> str:
    return next((each.rstrip("!") for each in parts.split("|") if each.endswith("!")), parts)


def _length(name: str, sizes: Mapping[str, int]) -> int:
    length = 1
    for each in name.split("*"):
        if not each.isdigit() and each not in sizes:
            raise ValueError(f"the length of {each!r} is not known")
        length *= int(each) if each.isdigit() else sizes[each]
    return length
