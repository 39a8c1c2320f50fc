"""Choices between computations, made where the values are: `patchwire.cond`.

Both branches are recorded and both are computed; the worker takes the results of one, element for element, so that no
number of the other reaches them, be it NaN. For the same reason a branch only computes: a write in it would happen
whatever the predicate says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from patchwire import ops
from patchwire.checking import describe
from patchwire.errors import GraphError, ShapeError, here
from patchwire.proxy import Structure, Value
from patchwire.recording import Recorder

_WHERE = ops.OPERATIONS["torch.where"]
_RESULTS = "A branch returns a value, or a tuple, list or dict of values; a number is `torch.tensor(1.0)`."


def cond(predicate: Any, when_true: Callable[..., Any], when_false: Callable[..., Any], *operands: Any) -> Any:
    """What `when_true(*operands)` gives where the predicate holds on the worker, and `when_false(*operands)` elsewhere.

    Args:
        predicate: A value of one element; like Python's `if`, any number but 0 counts as true. What is known while the
            block is recorded, or outside of a block, is simply Python's choice: only one function is called.
        when_true: A function of the operands. It may read sites and compute, and edit what it has made itself.
        when_false: The same, for the other case.
        operands: What the functions are given.

    Returns:
        What the branches return: a value, or a tuple, list or dict of values (or of such), of the same structure, and
        of the same shapes and dtypes, in both.

    Both branches are computed: one that fails, fails the run. Writes follow the choice:

        hidden[:] = patchwire.cond(hidden.norm() > 100, lambda h: h / 2, lambda h: h, hidden)

    Raises:
        ShapeError: the predicate has several elements, or the branches return different things.
        GraphError: a branch writes to a site, or edits, saves or logs a value.
    """
    if isinstance(predicate, Structure):
        raise predicate.not_one_tensor()
    if not isinstance(predicate, Value) or predicate.ready or not predicate.recorder.open:
        return (when_true if bool(predicate) else when_false)(*operands)
    if predicate.numel() != 1:
        raise ShapeError(
            f"A predicate has one element; this one is {describe(predicate.fake)}.",
            hint="Write `.any()` or `.all()`; for a choice element by element `torch.where(condition, a, b)`.",
            lines=here(),
        )
    recorder = predicate.recorder.active
    condition = predicate.reshape(()) != 0
    with recorder.branch():
        one = when_true(*operands)
    with recorder.branch():
        other = when_false(*operands)
    return _chosen(recorder, condition, one, other)


def _chosen(recorder: Recorder, condition: Value, one: Any, other: Any, where: str = "") -> Any:
    """The results of one branch or the other; `where` says which part of them this is."""
    values = (Value, Tensor)
    if isinstance(one, values) and isinstance(other, values):
        fakes = [each.fake if isinstance(each, Value) else each for each in (one, other)]
        looks = [(tuple(each.shape), each.dtype) for each in fakes]
        if looks[0] != looks[1]:
            raise _different(where, *map(describe, fakes))
        return recorder.call(_WHERE, (condition, one, other), {})
    if any(isinstance(one, kind) and isinstance(other, kind) for kind in (tuple, list)):
        if len(one) != len(other):
            raise _different(where, f"{len(one)} items", f"{len(other)} items")
        pairs = enumerate(zip(one, other, strict=True))
        items = [_chosen(recorder, condition, *pair, f"{where}[{index}]") for index, pair in pairs]
        return items if isinstance(one, list) else tuple(items)
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            raise _different(where, f"a dict of {list(one)}", f"a dict of {list(other)}")
        return {key: _chosen(recorder, condition, one[key], other[key], f"{where}[{key!r}]") for key in one}
    if type(one) is type(other):
        raise GraphError(f"{_what(where)} is a {type(one).__name__}, not a value.", hint=_RESULTS, lines=here())
    raise _different(where, f"a {type(one).__name__}", f"a {type(other).__name__}")


def _what(where: str) -> str:
    return f"Item {where} of what the branches return" if where else "What the branches return"


def _different(where: str, one: str, other: str) -> ShapeError:
    return ShapeError(
        f"{_what(where)} differs: {one} if the predicate holds, {other} if not.",
        hint=f"Both return the same structure, shapes and dtypes. {_RESULTS}",
        lines=here(),
    )
