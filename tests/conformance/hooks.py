"""The reference: what plain PyTorch hooks on the Hugging Face model see and change.

Nothing here knows anything of Patchwire. A place is a module's path, its side ("input" or "output"), and the steps to
one tensor in what is there; an input is the pair of positional and named arguments.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Place = tuple[str, str, tuple[Any, ...]]
Change = Callable[[Tensor], Tensor]
Visit = Callable[[str, str, Any], Any]
"""Takes a module's path, the side and the value there; gives the value to go on with."""

_CALL = ("args", "kwargs")


@contextlib.contextmanager
def hooked(model: nn.Module, visit: Visit) -> Iterator[None]:
    """Hooks on both sides of every module."""
    handles = []
    for path, module in model.named_modules():

        def before(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> tuple[Any, Any] | None:
            return visit(path, "input", (args, kwargs))

        def after(module: nn.Module, args: Any, output: Any, path: str = path) -> Any:
            return visit(path, "output", output)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors_in(value: Any, side: str) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Every tensor in what is at a side, with the steps to it."""
    if side == "input":
        for name, part in zip(_CALL, value, strict=True):
            yield from (((name, *steps), tensor) for steps, tensor in _inside(part))
    else:
        yield from _inside(value)


def _inside(value: Any) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield (), value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from (((key, *steps), tensor) for steps, tensor in _inside(each))
    elif isinstance(value, (tuple, list)):
        for index, each in enumerate(value):
            yield from (((index, *steps), tensor) for steps, tensor in _inside(each))


def with_change(value: Any, side: str, steps: tuple[Any, ...], change: Change) -> Any:
    """What is at a side, with one of its tensors changed; the old one keeps its numbers."""
    if side == "input":
        position = _CALL.index(steps[0])
        return tuple(
            _changed(part, steps[1:], change) if index == position else part for index, part in enumerate(value)
        )
    return _changed(value, steps, change)


def _changed(value: Any, steps: tuple[Any, ...], change: Change) -> Any:
    if not steps:
        return change(value.clone())
    inner = _changed(value[steps[0]], steps[1:], change)
    if isinstance(value, tuple):
        return tuple(inner if index == steps[0] else each for index, each in enumerate(value))
    outer = copy.copy(value)
    outer[steps[0]] = inner
    return outer


def forward(model: nn.Module, ids: Sequence[int]) -> Any:
    """What the model gives for one prompt."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)]), **options)


def visits(model: nn.Module, ids: Sequence[int]) -> list[tuple[str, str, Any]]:
    """Every visit of a hook in one prompt's forward pass."""
    found: list[tuple[str, str, Any]] = []

    def visit(path: str, side: str, value: Any) -> Any:
        found.append((path, side, value))
        return value

    with hooked(model, visit):
        forward(model, ids)
    return found


def record(model: nn.Module, ids: Sequence[int], changes: Mapping[Place, Change] | None = None) -> dict[Place, Tensor]:
    """Every tensor at every place of one prompt's forward pass, in the order in which they come into being.

    Modules that are called several times are left out: their places have several tensors.

    Args:
        model: The model.
        ids: The prompt.
        changes: Changes to make at some places; the tensors there are the changed ones.
    """
    found: dict[Place, Tensor] = {}
    calls: Counter[str] = Counter()

    def visit(path: str, side: str, value: Any) -> Any:
        calls[path] += side == "output"
        value = _with_changes(path, side, value, changes or {})
        for steps, tensor in tensors_in(value, side):
            found[path, side, steps] = tensor.clone()
        return value

    with hooked(model, visit):
        forward(model, ids)
    return {place: tensor for place, tensor in found.items() if calls[place[0]] == 1}


def changed_logits(model: nn.Module, ids: Sequence[int], changes: Mapping[Place, Change]) -> Tensor:
    """The logits of one prompt with the tensors at some places changed."""
    with hooked(model, lambda path, side, value: _with_changes(path, side, value, changes)):
        return forward(model, ids).logits


def _with_changes(path: str, side: str, value: Any, changes: Mapping[Place, Change]) -> Any:
    for place, change in changes.items():
        if place[:2] == (path, side):
            value = with_change(value, side, place[2], change)
    return value


def assert_same(actual: Tensor, expected: Tensor, what: Any = "", *, tolerance: float = 1e-5) -> None:
    """Both are the same tensor: in dtype, in shape, and in value up to rounding, relative to the largest value."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)} instead of {list(expected.shape)}"
    if torch.equal(actual, expected):
        return
    assert expected.is_floating_point(), f"{what}: other integers"
    actual, expected = actual.double(), expected.double()
    assert torch.equal(actual.isfinite(), expected.isfinite()), f"{what}: not finite in other places"
    finite = expected.isfinite()
    scale = max(float(expected[finite].abs().max()), 1e-3) if finite.any() else 1.0
    error = float((actual - expected)[finite].abs().max()) / scale if finite.any() else 0.0
    assert error <= tolerance, f"{what}: off by {error:.2e} of its scale"
    assert torch.equal(actual.nan_to_num(0, 1, -1)[~finite], expected.nan_to_num(0, 1, -1)[~finite]), what
