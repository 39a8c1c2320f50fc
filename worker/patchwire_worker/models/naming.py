"""Naming: which canonical names a model has, and where in it each of them is.

The tables of families.py say where the parts of an architecture are; here these words become addresses, for the model
as it is. A part that the model does not have after all gets no name, and why is kept: `Named.missing`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nnsight.intervention.source import SourceNotAvailable
from torch import nn

from patchwire.sites import INPUT, OUTPUT, SOURCE, Address, Axis, Leaf, Module, Name, Parameter, Part
from patchwire_worker.models import layouts, texts
from patchwire_worker.models.families import ATTENTION, Family
from patchwire_worker.models.places import FORMS, FORMULAS, Formula, Place
from patchwire_worker.models.sizes import sizes_of

_PART = re.compile(r"(?:layers\.\d+(?:\.(?P<kind>mixer|attn|ssm|mlp))?)?")
EVERY = "[*]"
"""What follows an operation that runs once for each token: all of these times."""


@dataclass
class Named:
    """The canonical names of a model."""

    names: dict[str, Name] = field(default_factory=dict)
    """By canonical name."""
    missing: dict[str, str] = field(default_factory=dict)
    """What the tables name and the model lacks, with the reason."""


def names(model: nn.Module, modules: Mapping[str, Module], family: Family | None) -> Named:
    """The canonical names of a model.

    Args:
        model: The model.
        modules: Its modules, by raw path, with their tensors.
        family: Where the parts of its architecture are; None if that is not known.
    """
    found = Named()
    for name, path, role in _modules(modules, family):
        found.names[name] = Name(name, path, role=role)
    for leaf in modules[""].side(OUTPUT):
        if leaf.path == ("logits",):
            found.names["logits"] = Name("logits", "", leaf)
    found.missing |= _modules_missing(found.names, family)
    if family is not None:
        _Parts(model, modules, family, found).add()
    return found


def _modules_missing(names: Mapping[str, Name], family: Family | None) -> Iterator[tuple[str, str]]:
    """The parts that every language model has and this one seems to lack, with the reason."""
    if family is None:
        yield "layers", "no list of layers was found"
        return
    for name, path in (("embed", family.embed), ("norm", family.norm), ("lm_head", family.lm_head)):
        if name not in names:
            yield name, f"`{path}` is not there" if path else "its structure does not show which module that is"
    for name in [each for each in names if re.fullmatch(r"layers\.\d+", each)]:
        for part, known in (("mixer", family.mixers), ("mlp", family.mlps)):
            if known and f"{name}.{part}" not in names:
                yield f"{name}.{part}", f"it has no module called {' or '.join(known)}"


def _modules(modules: Mapping[str, Module], family: Family | None) -> Iterator[tuple[str, str, str]]:
    """The names of modules: canonical name, raw path, role."""
    if family is None:
        return
    ends = {"embed": family.embed, "norm": family.norm, "lm_head": family.lm_head}
    if ends["embed"] in modules and family.embed:
        yield "embed", family.embed, ""
    index = 0
    while (layer := f"{family.layers}.{index}") in modules:
        name = f"layers.{index}"
        yield name, layer, ""
        mixers = [(part, role) for part, role in family.mixers.items() if f"{layer}.{part}" in modules]
        for position, (part, role) in enumerate(mixers):
            if position == 0:
                yield f"{name}.mixer", f"{layer}.{part}", role
            yield f"{name}.{'attn' if role == ATTENTION else 'ssm'}", f"{layer}.{part}", role
        for part, role in family.mlps.items():
            if f"{layer}.{part}" in modules:
                yield f"{name}.mlp", f"{layer}.{part}", role
                break
        for part, of in family.norms.items():
            if f"{layer}.{of}" in modules:
                yield f"{name}.{part}", f"{layer}.{of}", ""
        index += 1
    for name in ("norm", "lm_head"):
        if ends[name] and ends[name] in modules:
            yield name, ends[name], ""


class _Parts:
    """Adds the names of values and parameters."""

    def __init__(self, model: nn.Module, modules: Mapping[str, Module], family: Family, found: Named) -> None:
        self.model = model
        self.modules = modules
        self.family = family
        self.found = found
        self.labels: dict[tuple[Any, str], str] = {}

    def add(self) -> None:
        """Add them."""
        owners = {"": "", **{name: each.module for name, each in self.found.names.items() if each.is_module}}
        for owner, path in owners.items():
            part = _PART.fullmatch(owner)
            if part is None:
                continue
            kind = part["kind"] or ("layer" if owner else "model")
            for word, place in self.family.parts.items():
                of, _, short = word.partition(".")
                if of == kind:
                    self._add(f"{owner}.{short}".lstrip("."), path, word, place)
            for word, formula in FORMULAS.items():
                of, _, short = word.partition(".")
                name = f"{owner}.{short}"
                if of == kind and name not in self.found.names:
                    self._compute(name, path, formula, [f"{owner}.{each}" for each in formula.needs])

    def _add(self, name: str, owner: str, word: str, place: Place) -> None:
        form = FORMS[word]
        sizes = sizes_of(getattr(self.model, "config", None), self.model.get_submodule(owner))
        try:
            part = self._part(owner, place.at, place.layout, form, sizes)
            steps = place.in_steps and self._part(owner, place.in_steps, place.layout_in_steps, form, sizes)
            dims = layouts.dims(form, sizes)
        except (LookupError, AttributeError, ValueError, SourceNotAvailable) as error:
            self.found.missing[name] = str(error)
        else:
            self.found.names[name] = Name(name, owner, part=part, part_in_steps=steps or None, dims=dims)

    def _compute(self, name: str, owner: str, formula: Formula, needs: list[str]) -> None:
        known = [self.found.names.get(each) for each in needs]
        if all(each is not None for each in known):
            lengths = dict(each.split("=") for of in known if of is not None for each in of.dims.split() if "=" in each)
            dims = layouts.dims(formula.form, {key: int(value) for key, value in lengths.items()})
            self.found.names[name] = Name(name, owner, dims=dims, formula=formula.name)

    def _part(self, owner: str, at: str, layout: str, form: str, sizes: dict[str, int]) -> Part:
        """Where a value is; `sizes` learns what the tensor itself shows."""
        child, colon, inside = at.partition(":")
        if child.startswith("^"):
            owner, child = owner.rpartition(".")[0], child[1:]
        path = ".".join(each for each in (owner, child) if each)
        if EVERY in inside:  # the way to what it is after one token
            form = form.replace("seq ", "")
        if colon:
            return Part(self._in_source(path, inside), layouts.views(layout, form, sizes))
        parameter = self._parameter(path)
        if parameter is not None:
            _measure(layout, parameter.shape, sizes)
            return Part(path, layouts.views(layout, form, sizes), parameter=True)
        leaf = self._leaf(path)
        _measure(layout, [dim.size if dim.axis is Axis.CONSTANT else None for dim in leaf.shape], sizes)
        address = Address(f"{leaf.module}.{leaf.side}", leaf.path)
        return Part(str(address), layouts.views(layout, form, sizes))

    def _parameter(self, path: str) -> Parameter | None:
        owner, _, name = path.rpartition(".")
        known = self.modules[owner].parameters if owner in self.modules else ()
        return next((each for each in known if each.name == name), None)

    def _leaf(self, path: str) -> Leaf:
        address = Address.parse(path)
        owner, _, side = address.name.rpartition(".")
        leaves = self.modules[owner].side(side) if owner in self.modules and side in (INPUT, OUTPUT) else ()
        for leaf in leaves:
            if leaf.path == address.path or (side == INPUT and not address.path):
                return leaf
        raise LookupError(f"`{path}` is not there")

    def _in_source(self, path: str, inside: str) -> str:
        owner = type(self.model.get_submodule(path))
        *tokens, side = inside.split("/")
        function: Callable[..., Any] = owner.forward
        parts = [path]
        for position, token in enumerate(tokens):
            label = self._label(function, token.removesuffix(EVERY))
            parts += [SOURCE, label + (EVERY if token.endswith(EVERY) else "")]
            if position + 1 < len(tokens):
                function = texts.called(owner, label)
        return ".".join([*parts, side])

    def _label(self, function: Callable[..., Any], token: str) -> str:
        key = function, token
        if key not in self.labels:
            self.labels[key] = texts.find(function, token)
        return self.labels[key]


def _measure(layout: str, shape: Sequence[int | None], sizes: dict[str, int]) -> None:
    """Compare a tensor with a layout, and learn the lengths that it shows.

    Raises:
        ValueError: the tensor does not have the layout.
    """
    tokens = layouts.tokens(layout)
    if len(tokens) != len(shape):
        raise ValueError(f"a tensor of {len(shape)} dimensions is not laid out as {layout!r}")
    for token, length in zip(tokens, shape, strict=True):
        if length is None:
            continue
        if token.isidentifier() and token not in sizes and token not in layouts.SYMBOLIC:
            sizes[token] = length
        elif layouts.total(token, sizes) != length:
            raise ValueError(f"a dimension of {length} is not {token!r}")
