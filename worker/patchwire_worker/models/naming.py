"""Naming: which canonical names a model has, and where in it each of them is.

The tables of families.py say where the parts of an architecture are; here these words become addresses, for the model
as it is. A part that the model does not have after all gets no name, and why is kept: `Named.missing`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nnsight.intervention.source import SourceNotAvailable
from torch import nn

from patchwire.sites import INPUT, MIXERS, OUTPUT, SOURCE, Address, Axis, Leaf, Module, Name, Parameter, Part
from patchwire_worker.models import layouts, texts
from patchwire_worker.models.families import ATTENTION, LAYER, MOE, Family
from patchwire_worker.models.places import FORMS, FORMULAS, Formula, Place
from patchwire_worker.models.sizes import sizes_of

_PART = re.compile(r"(?:layers\.\d+(?:\.(?P<kind>mixer|attn|ssm|mlp))?)?")
SIDES = (INPUT, OUTPUT)
_OF_EXPERTS = ("router", "chosen_experts")
EVERY = "[*]"
"""What follows an operation that runs once for each token: all of these times."""


@dataclass
class Named:
    """The canonical names of a model."""

    names: dict[str, Name] = field(default_factory=dict)
    """By canonical name."""
    missing: dict[str, str] = field(default_factory=dict)
    """What the tables name and the model lacks, with the reason."""


def names(
    model: nn.Module,
    modules: Mapping[str, Module],
    family: Family | None,
    *,
    exact: bool = True,
    detected: bool = False,
) -> Named:
    """The canonical names of a model.

    Args:
        model: The model.
        modules: Its modules, by raw path, with their tensors.
        family: Where the parts of its architecture are; None if that is not known.
        exact: Whether the model computes the same when it computes attention step by step.
        detected: Whether the family was detected: then all that was not found is missing.
    """
    found = Named()
    for name, path, role in _modules(modules, family, getattr(model, "config", None)):
        found.names[name] = Name(name, path, role=role)
    for leaf in modules[""].side(OUTPUT):
        if leaf.path == ("logits",):
            found.names["logits"] = Name("logits", "", leaf)
    found.missing |= _modules_missing(found.names, family)
    if family is not None:
        parts = _Parts(model, modules, family, found, exact)
        parts.add()
        if detected:
            parts.report()
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
            if known and LAYER not in known and f"{name}.{part}" not in names:
                yield f"{name}.{part}", f"it has no module called {' or '.join(known)}"


def _modules(modules: Mapping[str, Module], family: Family | None, config: Any) -> Iterator[tuple[str, str, str]]:
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
        mixers = list(_present(modules, layer, family.mixers))
        for position, (path, role) in enumerate(mixers):
            if position == 0:
                yield f"{name}.mixer", path, role
            yield f"{name}.{'attn' if role == ATTENTION else 'ssm'}", path, role
        mlps = list(_present(modules, layer, family.mlps))
        for path, role in mlps[:1]:
            yield f"{name}.mlp", path, MOE if f"{path}.experts" in modules else role
        before = {"mixer_norm": bool(mixers), "mlp_norm": bool(mlps) or LAYER in family.mlps}
        for part, of in family.norms.items():
            if not before[part]:
                continue
            words = [each.partition("?") for each in of.split("|")]
            said = [f"{layer}.{path}" for path, _, option in words if not option or getattr(config, option, False)]
            found = [each for each in said if each in modules]
            if found:
                yield f"{name}.{part}", found[0], ""
        index += 1
    for name in ("norm", "lm_head"):
        if ends[name] and ends[name] in modules:
            yield name, ends[name], ""


def _present(modules: Mapping[str, Module], layer: str, parts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Those parts of a layer that it has: raw path, role."""
    for part, role in parts.items():
        path, _, has = f"{layer}.{part}".partition("?")
        if path in modules and (not has or f"{path}.{has}" in modules):
            yield path, role


class _Parts:
    """Adds the names of values and parameters."""

    def __init__(
        self, model: nn.Module, modules: Mapping[str, Module], family: Family, found: Named, exact: bool
    ) -> None:
        self.model = model
        self.modules = modules
        self.family = family
        self.found = found
        self.exact = exact

    def add(self) -> None:
        """Add them."""
        owners = {"": "", **{name: each.module for name, each in self.found.names.items() if each.is_module}}
        if LAYER in self.family.mlps:  # what an MLP does is in the layer itself
            owners |= {f"{name}.mlp": path for name, path in owners.items() if re.fullmatch(r"layers\.\d+", name)}
        for owner, path in owners.items():
            part = _PART.fullmatch(owner)
            if part is None:
                continue
            kind = part["kind"] or ("layer" if owner else "model")
            for word, places in self.family.parts.items():
                of, _, short = word.partition(".")
                if of == kind:
                    self._add(f"{owner}.{short}".lstrip("."), path, word, places)
        for owner, path in owners.items():
            part = _PART.fullmatch(owner)
            kind = "" if part is None else part["kind"]
            for word, formula in FORMULAS.items():
                of, _, short = word.partition(".")
                name = f"{owner}.{short}"
                if of == kind and name not in self.found.names:
                    self._compute(name, path, formula, [_relative(owner, each) for each in formula.needs])
        for owner, path in owners.items():
            layer, _, kind = owner.rpartition(".")
            update = self.found.names.get(f"{layer}.mixer.update")
            if kind in MIXERS and update is not None and update.module == path:
                self.found.names.setdefault(f"{owner}.update", replace(update, name=f"{owner}.update"))

    def report(self) -> None:
        """Say of every value of the vocabulary that has no name here that it has none."""
        for owner, named in [each for each in self.found.names.items() if each[1].is_module]:
            part = _PART.fullmatch(owner)
            if part is None or not owner:
                continue
            for word in FORMS:
                of, _, short = word.partition(".")
                other = of == "mlp" and (short in _OF_EXPERTS) != (named.role == MOE)
                if of != (part["kind"] or "layer") or short.startswith("b_") or short in SIDES or other:
                    continue
                if f"{owner}.{short}" not in self.found.names:
                    self.found.missing.setdefault(f"{owner}.{short}", "its structure does not tell where it is")

    def _add(self, name: str, owner: str, word: str, places: Place | tuple[Place, ...]) -> None:
        """Add the first of some places that this model has."""
        config, why = getattr(self.model, "config", None), []
        for place in places if isinstance(places, tuple) else (places,):
            if not place.suits(config):
                continue
            form = place.form or FORMS[word]
            sizes = sizes_of(config, self.model.get_submodule(owner))
            try:
                part = self._part(owner, place.at, place.layout, form, sizes)
                steps = place.in_steps and self._part(owner, place.in_steps, place.layout_in_steps, form, sizes)
                dims = layouts.dims(form, sizes)
            except (LookupError, AttributeError, ValueError, SourceNotAvailable) as error:
                why.append(str(error))
            else:
                self.found.names[name] = Name(name, owner, part=part, part_in_steps=steps or None, dims=dims)
                return
        self.found.missing[name] = "; ".join(dict.fromkeys(why)) or "not in a model of this configuration"

    def _compute(self, name: str, owner: str, formula: Formula, needs: list[str]) -> None:
        known = [self.found.names.get(each) for each in needs]
        if all(each is not None for each in known):
            lengths = dict(each.split("=") for of in known if of is not None for each in of.dims.split() if "=" in each)
            first = {word: each.dims.partition("=")[0] for word, each in zip(formula.needs, known, strict=True) if each}
            form = formula.form.format_map(first)
            dims = layouts.dims(form, {key: int(value) for key, value in lengths.items()})
            self.found.names[name] = Name(name, owner, dims=dims, formula=formula.name)
            self.found.missing.pop(name, None)
        else:
            lacking = [f"`{each}`" for each, of in zip(needs, known, strict=True) if of is None]
            self.found.missing.setdefault(name, f"it is computed from {' and '.join(lacking)}, not there")

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
        module = self.model.get_submodule(path)
        owner = type(module)
        *tokens, side = inside.split("/")
        function: Callable[..., Any] = owner.forward
        parts, way = [path], list[str]()
        for position, token in enumerate(tokens):
            label = self._label(function, token.removesuffix(EVERY), module, last=position + 1 == len(tokens))
            way.append(label)
            parts += [SOURCE, label + (EVERY if token.endswith(EVERY) else "")]
            if position + 1 < len(tokens):
                function = texts.called(owner, label)
        if not self.exact and texts.needs_steps(module, way):
            raise LookupError("computed step by step, this model's attention gives other numbers than its kernel")
        return ".".join([*parts, side])

    @staticmethod
    def _label(function: Callable[..., Any], token: str, module: nn.Module, *, last: bool) -> str:
        if texts.is_interface(token.replace("()", "_0")) and not last:
            return texts.find(function, token, module, eager=True)
        try:
            return texts.find(function, token, module)
        except LookupError:
            return texts.find(function, token, module, eager=True)


def _relative(owner: str, need: str) -> str:
    """The canonical name of what a part needs: of its own, or of the layer, after "^"."""
    return f"{owner.rpartition('.')[0]}.{need[1:]}" if need.startswith("^") else f"{owner}.{need}"


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
        sizes |= layouts.learnt(token, length, sizes)
        if layouts.total(token, sizes) != length:
            raise ValueError(f"a dimension of {length} is not {token!r}")
