"""Layouts: how a tensor in a model is laid out, in words, and the views from it to its canonical form.

A layout names the dimensions in order; what stands in parentheses is flattened into one. `name=0` takes one index of a
dimension; `q!|k|v` is parts of unequal length side by side, of which the one marked with `!` is taken, and split if
parentheses follow:

    batch seq (head d_head)                 a projection's output, heads side by side
    batch seq (qkv=0 head d_head)           GPT-2: the queries of one fused projection
    batch seq (head qkv=1 d_head)           GPT-NeoX: the keys, head by head
    batch seq q!|k|v(head d_head)           Phi-3: queries, and keys and values of fewer heads
    batch seq (kv_head q_per_kv+2=-2 d_head)   Falcon: the keys, each after the queries that share it
    (kv_head q_per_kv+2<q_per_kv d_head) d_model   and these queries: the first so many of that dimension
    batch head seq d_head                   inside attention
    (batch seq) expert                      where all tokens are in one row

The canonical form is a sequence of dimensions ("batch seq head d_head"); the views take parts, split dimensions and
permute them, so that the result shares memory with the tensor. Only where the canonical form has `head`, and the tensor
has the heads that share a key apart, they are put together, which is a copy: then it cannot be written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from patchwire.views import View

_TOKEN = re.compile(r"[^\s()]*\([^()]*\)|\S+")
_WORD = re.compile(r"[=<]")
SYMBOLIC = frozenset({"batch", "seq", "query", "key"})
"""Dimensions whose length depends on the call."""
_TOGETHER: Mapping[str, tuple[str, str]] = {"head": ("kv_head", "q_per_kv")}
"""Dimensions that may be two in a tensor."""


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
        if inner == ["batch", "seq"]:
            found.append(View("rows", (len(names),)))
        elif len(inner) > 1:
            lengths = [_length(_WORD.split(each)[0], sizes) for each in inner]
            found.append(View("unflatten", (len(names), *lengths)))
        for each in inner:
            _, index, first = _split(each)
            if index:
                found.append(View("select", (len(names), int(index))))
                continue
            if first != each:
                found.append(View("narrow", (len(names), 0, _length(first, sizes))))
            names.append(first)
    wanted = canonical.split()
    for whole, parts_of in _TOGETHER.items():
        if whole in wanted and whole not in names and all(each in names for each in parts_of):
            start = names.index(parts_of[0])
            single = [_length(each, sizes) == 1 for each in parts_of]
            one = View("select", (start + single.index(True), 0)) if any(single) else None
            found.append(one or View("flatten", (start, start + 1)))
            names[start : start + 2] = [whole]
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
    return math.prod(_length(_WORD.split(each)[0], sizes) for each in inner)


def learnt(token: str, length: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """The length of the one part of a dimension that is not known yet, from the length of all of it.

    Raises:
        ValueError: several are not known, or it has no such part.
    """
    inner = token.partition("(")[2].rstrip(")").split() if "(" in token else [token]
    words = [_WORD.split(each)[0] for each in inner]
    unknown = [each for each in words if each not in sizes and not each.isdigit() and each.isidentifier()]
    if "|" in token or len(unknown) != 1:
        return {}
    rest = math.prod(_length(each, sizes) for each in words if each != unknown[0])
    if length % rest:
        raise ValueError(f"a dimension of {length} is not {token!r}")
    return {unknown[0]: length // rest}


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


def _split(word: str) -> tuple[str, str, str]:
    """A part of a dimension: its length, the one index of it that is taken, and the name of what is left."""
    length, _, index = word.partition("=")
    length, _, first = length.partition("<")
    return length, index, first or length


def _taken(parts: str) -> str:
    return next((each.rstrip("!") for each in parts.split("|") if each.endswith("!")), parts)


def _length(name: str, sizes: Mapping[str, int]) -> int:
    if "+" in name:
        return sum(_length(each, sizes) for each in name.split("+"))
    length = 1
    for each in name.split("*"):
        if not each.isdigit() and each not in sizes:
            raise ValueError(f"the length of {each!r} is not known")
        length *= int(each) if each.isdigit() else sizes[each]
    return length
