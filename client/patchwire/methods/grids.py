"""Grids: the cells of a sweep, along named axes, each of which slices a site.

A site of a layer is a tensor whose dimensions have names: those of `attn.z` are batch, seq, head and d_head. An axis of
a sweep goes along one of them, or along the layers, and has some of its indices at each step: one, a block of them, or
any others. A cell is a step along every axis; along what no axis goes, it has all. So `over=("layer", "head")` at
`attn.z` is one head at a time, at all tokens, and `over=()` is everything at once.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from patchwire.errors import InputError, here
from patchwire.methods.measured import LAYER, TOKEN
from patchwire.methods.places import PLACES
from patchwire.methods.prompts import Prompt
from patchwire.methods.result import Axis
from patchwire.model import Model, Module
from patchwire.proxy import Value

DIMENSIONS: Mapping[str, tuple[str, ...]] = {
    TOKEN: ("seq", "query"),
    "key": ("key",),
    "head": ("head", "kv_head"),
    "neuron": ("d_mlp",),
    "channel": ("d_inner", "d_model"),
}
"""What an axis goes along: the first of these dimensions (docs/sites.md) that the site has."""
_SITE_WITH = {"head": "attn.z", "neuron": "mlp.neurons", "key": "attn.pattern"}
"""A site that has the axis, for those that most have not."""
_UNNAMED = {3: ("batch", "seq", "d_model"), 4: ("batch", "seq", "head", "d_head")}
"""What the dimensions of a site are that has no canonical name."""


@dataclass(frozen=True)
class Blocks:
    """All indices of an axis, some at a time: `Blocks(64)`; the last block has the rest."""

    size: int


Indices = Blocks | Sequence[int | Sequence[int]] | None
"""What an axis has at each of its steps: an index, or several; None for each index in turn."""
Over = Sequence[str] | Mapping[str, Indices]
"""The axes of a sweep: their names, and perhaps their indices."""
At = str | Callable[[Module], Any]
"""A site of every layer: one of `patchwire.methods.PLACES`, the name of one in a layer ("attn.z", "mlp.neurons",
"mixer.output"), or a function of a layer."""
Cell = tuple[int, ...]
"""A step along each axis."""


@dataclass(frozen=True)
class Along:
    """An axis of a sweep."""

    axis: Axis
    dim: int | None
    """The dimension of the site that it goes along; None for the layers."""
    steps: tuple[tuple[int, ...], ...]
    """The indices at each step, in order."""

    @property
    def is_whole(self) -> bool:
        """Whether it has each index in turn, given that it has all."""
        return self.steps == tuple((index,) for index in range(len(self.steps)))


@dataclass(frozen=True)
class Grid:
    """The cells of a sweep at a site."""

    model: Model
    at: At
    along: tuple[Along, ...]
    layers: tuple[int, ...]
    """All layers that some cell is in."""
    ndim: int
    """How many dimensions the site has."""

    @classmethod
    def of(cls, model: Model, prompt: Prompt, at: At, over: Over, *, marked: Sequence[int] = ()) -> Grid:
        """The grid of a sweep over a prompt's run.

        Raises:
            InputError: there is no such axis or index, or the site is none of a run's values.
            SiteError: the model has no such site in one of the layers.
        """
        wanted: dict[str, Indices] = dict(over) if isinstance(over, Mapping) else dict.fromkeys(over)
        layers = _along(Axis(LAYER, tuple(map(str, range(model.num_layers)))), None, wanted.get(LAYER))
        named = tuple(sorted({layer for step in layers.steps for layer in step}))
        with model.scan(prompt.rows):
            shapes = [_shape(value_at(model, layer, at), at) for layer in named]
        if len(set(shapes)) != 1:
            raise InputError(
                "What is patched has not the same shape in all layers.",
                hint='Name layers that are alike: `over={"layer": [0, 2], …}`.',
                lines=here(),
            )
        names = _dimensions(model, named[0], at, len(shapes[0]))
        found = []
        for name, indices in wanted.items():
            if name == LAYER:
                found.append(layers)
                continue
            dim = next((names.index(each) for each in DIMENSIONS.get(name, ()) if each in names), None)
            if dim is None:
                there = [each for each, meant in DIMENSIONS.items() if set(meant) & set(names)]
                site = _SITE_WITH.get(name, "")
                raise InputError(
                    f"There is no axis “{name}” at “{at}”; there are {', '.join([LAYER, *there])}.",
                    hint=f'`at="{site}"` has it.' if f"layers.{named[0]}.{site}" in model.catalogue.names else "",
                    lines=here(),
                )
            size = shapes[0][dim]
            labels = prompt.tokens if name in (TOKEN, "key") else tuple(map(str, range(size)))
            found.append(_along(Axis(name, labels, tuple(marked) if name == TOKEN else ()), dim, indices))
        return cls(model, at, tuple(found), named, len(names))

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Its axes, as those of a result."""
        return tuple(each.axis for each in self.along)

    @property
    def cells(self) -> list[Cell]:
        """Every cell, the last axis fastest."""
        return list(itertools.product(*(range(len(each.steps)) for each in self.along)))

    @property
    def writes(self) -> int:
        """How many slices a cell is, at most."""
        layers = 1 if any(each.dim is None for each in self.along) else len(self.layers)
        return layers * math.prod(
            max(len(step) if each.dim is None else len(_runs(step)) for step in each.steps) for each in self.along
        )

    def windows(self, size: int) -> Grid:
        """With this many layers around each: `[l - size // 2, l + (size + 1) // 2)`, clipped.

        Raises:
            InputError: that is no window.
        """
        if size < 1:
            raise InputError(f"A window has at least one layer, not {size}.", lines=here())
        last = self.model.num_layers

        def wider(step: tuple[int, ...]) -> tuple[int, ...]:
            near = (range(max(0, each - size // 2), min(last, each + (size + 1) // 2)) for each in step)
            return tuple(sorted(set(itertools.chain.from_iterable(near))))

        along = tuple(
            replace(each, steps=tuple(map(wider, each.steps))) if each.dim is None else each for each in self.along
        )
        return replace(self, along=along, layers=wider(self.layers))

    def layers_of(self, cell: Cell) -> tuple[int, ...]:
        """The layers that a cell is in."""
        steps = (each.steps[index] for each, index in zip(self.along, cell, strict=True) if each.dim is None)
        return next(steps, self.layers)

    def slices(self, cell: Cell) -> Iterator[tuple[slice, ...]]:
        """What a cell has of the site in each of its layers: slices of all dimensions, of which it is the union."""
        runs = [[slice(None)]] * self.ndim
        for each, index in zip(self.along, cell, strict=True):
            if each.dim is not None:
                runs[each.dim] = [slice(first, last) for first, last in _runs(each.steps[index])]
        return itertools.product(*runs)

    def values(self) -> dict[int, Any]:
        """The site in each layer, in the invoke that is being recorded."""
        return {layer: value_at(self.model, layer, self.at) for layer in self.layers}

    def patch(self, cell: Cell, states: Mapping[int, Any]) -> None:
        """Write what a cell has of other states, by layer, into the invoke that is being recorded."""
        for layer in self.layers_of(cell):
            site = value_at(self.model, layer, self.at)
            for where in self.slices(cell):
                site[where] = states[layer][where]


def value_at(model: Model, layer: int, at: At) -> Any:
    """The value of a site of a layer, in the invoke that is being recorded."""
    module = model.layers[layer]
    if callable(at):
        return at(module)
    return PLACES[at](module) if at in PLACES else functools.reduce(getattr, at.split("."), module)


def _shape(value: Any, at: At) -> tuple[int, ...]:
    if not isinstance(value, Value):
        raise InputError(
            f"“{at}” is no value of a layer.",
            hint='Name one: "attn.z", "mlp.output", or `lambda layer: layer.mlp.output`.',
            lines=here(),
        )
    return tuple(value.shape)


def _dimensions(model: Model, layer: int, at: At, ndim: int) -> tuple[str, ...]:
    """The names of a site's dimensions."""
    named = None if callable(at) else model.catalogue.named(f"layers.{layer}.{at}")
    known = tuple(each.partition("=")[0] for each in named.dims.split()) if named is not None and named.dims else ()
    names = known or _UNNAMED.get(ndim, ())
    if names[:1] != ("batch",):
        raise InputError(
            f"“{at}” is no value of a run, with a dimension for its rows.",
            hint="docs/sites.md has the names of those that there are, and their dimensions.",
            lines=here(),
        )
    return names


def _along(axis: Axis, dim: int | None, indices: Indices) -> Along:
    """An axis with some of its indices, whose labels are those of all."""
    size = len(axis)
    steps: list[tuple[int, ...]]
    match indices:
        case None:
            steps = [(each,) for each in range(size)]
        case Blocks(size=length) if length > 0:
            steps = [tuple(range(first, min(first + length, size))) for first in range(0, size, length)]
        case Blocks():
            raise InputError(f"A block has at least one index, not {indices.size}.", lines=here())
        case _:
            steps = [(each,) if isinstance(each, int) else tuple(sorted(set(each))) for each in indices]
    wrong = [each for step in steps for each in step if not 0 <= each < size]
    if wrong or not steps or not all(steps):
        found = f"has no {wrong[0]}" if wrong else "needs some of them at each step"
        raise InputError(f"The axis “{axis.name}” has the indices 0 to {size - 1}, and {found}.", lines=here())
    labels = tuple(_label(axis, step) for step in steps)
    marked = tuple(index for index, step in enumerate(steps) if set(step) & set(axis.marked))
    return Along(Axis(axis.name, labels, marked), dim, tuple(steps))


def _label(axis: Axis, step: Sequence[int]) -> str:
    if axis.name in (TOKEN, "key"):
        return "".join(axis.labels[each] for each in step)
    return ",".join(str(first) if last - first == 1 else f"{first}–{last - 1}" for first, last in _runs(step))


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted indices as ranges of those that follow each other: first, and one after the last."""
    starts = [at for at, each in enumerate(indices) if at == 0 or each != indices[at - 1] + 1]
    return [(indices[at], indices[end - 1] + 1) for at, end in itertools.pairwise([*starts, len(indices)])]
