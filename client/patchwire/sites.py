"""Sites: the addresses of values inside a model, and the catalogue of those that a model has.

An address names a module, by its canonical name ("layers.5.mixer") or by its raw path ("transformer.h.5.attn"), a side
of it ("input" or "output"), and, where that side is a tuple or a mapping, which tensor of it. It has one string form
that round-trips: "layers.5.mixer.output", "transformer.h.5.attn.output[1]", 'transformer.h.5.input["kwargs"]["mask"]'.
A few canonical names are of a value rather than of a module: "logits".

Inside the forward of a module, every call and every assignment is a site too, after the word "source":
"layers.5.mixer.source.attention_interface_1.output". A function that is called there has a source of its own:
"….source.attention_interface_1.source.torch_matmul_0.output". Where an operation runs several times, as in a loop, a
number says which time is meant, from 0: "….source.ssm_state_1[3].output".

The catalogue is learnt by the worker once per model and sent to clients, so both sides resolve an address with the code
below, and a wrong one is found on the laptop. What is inside a forward is learnt when somebody first asks for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

from patchwire.errors import SiteError, nearest
from patchwire.tensors import dtype_from_proto, dtype_to_proto
from patchwire.v1 import graph_pb2, model_pb2
from patchwire.views import View, views_from_proto, views_to_proto

Step = int | str
Path = tuple[Step, ...]

INPUT = "input"
OUTPUT = "output"
SOURCE = "source"
"""What stands between a module, or an operation, and the operations inside it."""
MAX_DEPTH = 8
"""How many functions one inside the other an address may lead into."""
CALL = ("args", "kwargs")
"""The first step of the path of an input: a positional argument, or a named one."""
MIXERS = ("attn", "ssm")
"""What the mixer of a layer is called where it is clear which kind it is."""
_IN_MIXER = re.compile(r"(layers\.\d+)\.mixer\.(.+)")
_READ = (OUTPUT, INPUT)
"""What is read at every module that a forward pass calls."""
_A_SLIP = 0.7
"""How much a name is like the one that was meant, if only a letter or two are wrong."""
_SIDES = {INPUT: model_pb2.SIDE_INPUT, OUTPUT: model_pb2.SIDE_OUTPUT}
_REMEMBERED = 1 << 16
_LONGEST_NAME = 200
_EITHER_MIXER = "The mixer of `{layer}` is {role}: write `{layer}.mixer`, which works for either."
_LAYER_HINTS = {
    "attn": _EITHER_MIXER,
    "ssm": _EITHER_MIXER,
    "mlp": "`{layer}` has no MLP of its own.",
    "resid_post": "The residual stream after a layer is `{layer}.output`.",
    "resid_pre": "The residual stream before a layer is `{layer}.input`.",
}
_SIDE_NAMES = {wire: name for name, wire in _SIDES.items()}


@lru_cache(1 << 13)
def spell(name: str) -> str:
    """A name as it is typed: "layers.5.mixer" is `model.layers[5].mixer`."""
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split(".") if part)


@dataclass(frozen=True)
class Address:
    """The address of a value in a model."""

    name: str
    """What and which side: "layers.5.mixer.output", "logits"."""
    path: Path = ()
    """Which tensor, where the value there is a tuple or a mapping."""

    def __str__(self) -> str:
        return self.name + "".join(
            f"[{step}]" if isinstance(step, int) else f"[{json.dumps(step)}]" for step in self.path
        )

    @property
    def spelled(self) -> str:
        """How it is typed: "model.layers[5].mixer.output"."""
        name, path = spell(self.name), self.path
        if not path:
            return name
        if name.endswith(f".{INPUT}") and path and path[0] in CALL:
            name, path = f"{name}s", (CALL.index(str(path[0])), *path[1:])
        return name + "".join(f"[{json.dumps(step)}]" for step in path)

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address of a string form.

        Raises:
            SiteError: the text is not an address.
        """
        match = re.fullmatch(
            r'([A-Za-z_][\w.]*(?:\[\d+\]\.(?:input|output))?)((?:\[(?:\d+|"(?:[^"\\]|\\.)*")\])*)', text
        )
        if match is None:
            raise SiteError(f"`{text}` is not the address of a site.", hint="One looks like `layers.5.mixer.output`.")
        steps = re.findall(r'\[(\d+|"(?:[^"\\]|\\.)*")\]', match[2])
        return cls(match[1], tuple(json.loads(step) for step in steps))


def path_to_proto(path: Path) -> list[graph_pb2.Item]:
    """The steps of a path as messages."""
    return [graph_pb2.Item(index=step) if isinstance(step, int) else graph_pb2.Item(key=step) for step in path]


def path_from_proto(items: Iterable[graph_pb2.Item]) -> Path:
    """The steps of a path from messages."""
    return tuple(item.index if item.WhichOneof("step") == "index" else item.key for item in items)


class Axis(Enum):
    """What the length of a dimension grows with."""

    CONSTANT = model_pb2.AXIS_UNSPECIFIED
    BATCH = model_pb2.AXIS_BATCH
    SEQ = model_pb2.AXIS_SEQ
    BATCH_SEQ = model_pb2.AXIS_BATCH_SEQ
    UNKNOWN = model_pb2.AXIS_UNKNOWN


_AXIS_NAMES = {Axis.BATCH: "batch", Axis.SEQ: "seq", Axis.BATCH_SEQ: "batch*seq"}


@dataclass(frozen=True)
class Dim:
    """The length of one dimension: `size` more than what `axis` stands for."""

    axis: Axis
    size: int = 0
    limit: int = 0
    """The most that it grows to; 0 if there is no end."""

    def __str__(self) -> str:
        if self.axis is Axis.CONSTANT:
            return str(self.size)
        if self.axis is Axis.UNKNOWN:
            return "?"
        grown = _AXIS_NAMES[self.axis] + (f"{self.size:+d}" if self.size else "")
        return f"min({grown}, {self.limit})" if self.limit else grown

    @classmethod
    def from_proto(cls, message: model_pb2.Dim) -> Dim:
        """The dimension of a message."""
        return cls(Axis(message.axis), message.size, message.limit)

    def to_proto(self) -> model_pb2.Dim:
        """This dimension as a message."""
        return model_pb2.Dim(axis=self.axis.value, size=self.size, limit=self.limit)

    def length(self, batch: int, seq: int) -> int | None:
        """The length in a call with this many rows of this many tokens; None if unknown."""
        match self.axis:
            case Axis.CONSTANT:
                return self.size
            case Axis.UNKNOWN:
                return None
            case _:
                grown = {Axis.BATCH: batch, Axis.SEQ: seq, Axis.BATCH_SEQ: batch * seq}[self.axis] + self.size
                return min(grown, self.limit) if self.limit else grown


_ONCE = Dim(Axis.CONSTANT, 1)

Order = tuple[int, ...]
"""A moment in a forward pass. Compared as tuples are: (3,) < (3, 0, 2) < (3, 0, 2, 1) < (4,).

A side of a module is at (n,). Operations after it, and before the next, are at (n, visits, k): modules may be visited
again in between, which counts as visits. Operations in a function that the operation at (n, visits, k) calls are at
(n, visits, k, j), and so on.
"""


class Location(NamedTuple):
    """A place in a forward pass: all leaves there are parts of one value."""

    module: str
    """The raw path of a module."""
    side: str
    """`INPUT` or `OUTPUT`."""
    operations: tuple[str, ...] = ()
    """Empty for the module itself; else an operation in its forward, or the way to one through functions."""
    occurrence: int = 0
    """Which time the operation runs in the pass, from 0."""


@dataclass(frozen=True)
class Leaf:
    """One tensor that a module, or an operation in its forward, is called with or returns."""

    module: str
    """The raw path of the module; empty for the model itself."""
    side: str
    """`INPUT` or `OUTPUT`."""
    path: Path
    """Where in that side it is. Inputs start with "args" or "kwargs"."""
    shape: tuple[Dim, ...]
    """Its symbolic shape."""
    dtype: torch.dtype
    """Its element type."""
    order: Order
    """When in a forward pass it exists: not before this."""
    independent: bool = True
    """Whether a row's part of it is the same whatever other rows, and whatever padding, share the pass."""
    last: Order = ()
    """Not after this, if the operation runs several times; else empty."""
    operations: tuple[str, ...] = ()
    """The operation, or the way to it; empty if it is the module's own."""
    runs: Dim = _ONCE
    """How often the operation runs in a forward pass."""
    occurrence: int = 0
    """Which time is meant."""
    unused: bool = False
    """Whether nothing is done with it, so that to write it would change nothing."""
    in_steps: bool = False
    """Whether this is of the steps of a generation after the first: then what grows with tokens grows with those before
    the one that the pass is over."""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Computed once: leaves are looked up for every node, and have many parts."""
        return hash((self.module, self.side, self.path, self.operations, self.occurrence, self.order, self.in_steps))

    @cached_property
    def location(self) -> Location:
        """The place in a forward pass, which all leaves of one value share."""
        return Location(self.module, self.side, self.operations, self.occurrence)

    @property
    def latest(self) -> Order:
        """The moment after which it surely does not come."""
        return self.last or self.order

    @property
    def symbolic(self) -> str:
        """The shape as text: "[batch, seq, 768]"."""
        return f"[{', '.join(str(dim) for dim in self.shape)}]"

    @cached_property
    def packs(self) -> bool:
        """Whether rows of different lengths may share a pass in which it is read or written."""
        return (
            self.independent
            and self.runs.axis in (Axis.CONSTANT, Axis.SEQ)  # else an occurrence is of a row, or of nobody knows what
            and all(
                dim.axis is Axis.CONSTANT or (dim.axis is not Axis.UNKNOWN and dim.size == 0)
                for dim in (*self.shape, self.runs)
            )
        )

    @property
    def aligns(self) -> bool:
        """Whether rows of different lengths can be shown side by side, ending together: not if they share it."""
        axes = {dim.axis for dim in self.shape}
        each_for_a_token = self.runs.axis is Axis.SEQ  # then an occurrence is another token of each row, or none
        return self.packs and not each_for_a_token and (Axis.SEQ not in axes or Axis.BATCH in axes)

    @lru_cache(_REMEMBERED)  # noqa: B019 - of leaves there are as many as a model has
    def lengths(self, batch: int, seq: int) -> tuple[int, ...] | None:
        """The shape in a call with this many rows of this many tokens; None if it is not known beforehand."""
        lengths = [dim.length(batch, seq) for dim in self.shape]
        return None if None in lengths else tuple(length for length in lengths if length is not None)

    def fake(self, batch: int, seq: int) -> torch.Tensor | None:
        """A tensor without memory of that shape and dtype; None if the shape is not known beforehand."""
        lengths = self.lengths(batch, seq)
        return None if lengths is None else torch.empty(lengths, dtype=self.dtype, device="meta")

    def at_step(self, step: int) -> Leaf:
        """What it is in a step of a generation: after the first, a pass has one token, and those before it are cached.

        Which of several lengths still grow with all tokens is not known; such a shape is not known beforehand.
        """
        sequences = sum(dim.axis in (Axis.SEQ, Axis.BATCH_SEQ) for dim in self.shape)
        if step == 0 or sequences <= 1 or self.in_steps:
            return self
        return replace(
            self,
            shape=tuple(Dim(Axis.UNKNOWN) if dim.axis in (Axis.SEQ, Axis.BATCH_SEQ) else dim for dim in self.shape),
        )

    def to_proto(self) -> model_pb2.Leaf:
        """This leaf as a message."""
        return model_pb2.Leaf(
            side=_SIDES[self.side],
            path=path_to_proto(self.path),
            shape=[dim.to_proto() for dim in self.shape],
            dtype=dtype_to_proto(self.dtype),
            order=self.order,
            independent=self.independent,
            last=self.last,
            unused=self.unused,
        )

    @classmethod
    def from_proto(
        cls,
        module: str,
        message: model_pb2.Leaf,
        operations: tuple[str, ...] = (),
        runs: Dim = _ONCE,
        in_steps: bool = False,
    ) -> Leaf:
        """The leaf of a message."""
        return cls(
            module,
            _SIDE_NAMES[message.side],
            path_from_proto(message.path),
            tuple(map(Dim.from_proto, message.shape)),
            dtype_from_proto(message.dtype),
            tuple(message.order),
            message.independent,
            tuple(message.last),
            operations,
            runs,
            unused=message.unused,
            in_steps=in_steps,
        )


@dataclass(frozen=True)
class Parameter:
    """A parameter or buffer of a module."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tied: str = ""
    """The raw path of the same tensor in an earlier module; empty if it is in none."""


@dataclass(frozen=True)
class Module:
    """A module of the model, as the catalogue knows it."""

    path: str
    """Its raw path; empty for the model itself."""
    class_name: str
    """Its class."""
    parameters: tuple[Parameter, ...] = ()
    """Its parameters and buffers, its children's not included."""
    leaves: tuple[Leaf, ...] = ()
    """The tensors that it is called with and returns; empty if a forward pass does not call it."""
    calls: int = 0
    """How often one forward pass calls it."""
    items: int = 0
    """How many items the tuple has that it returns, tensors and others; 0 if it returns no tuple."""

    @cached_property
    def _sides(self) -> dict[str, tuple[Leaf, ...]]:
        return {side: tuple(leaf for leaf in self.leaves if leaf.side == side) for side in _SIDES}

    def side(self, side: str) -> tuple[Leaf, ...]:
        """The tensors of one side."""
        return self._sides[side]

    def main(self, side: str) -> Leaf | None:
        """The tensor that is meant when a side is named and nothing else: the first."""
        return next(iter(self.side(side)), None)


@dataclass(frozen=True)
class Operation:
    """A call or an assignment in the text of a function."""

    name: str
    """What it is called: the function or the variable, and a number: "torch_matmul_0"."""
    line: int
    """Its line in the text, from 1."""
    runs: Dim
    """How often one forward pass runs it."""
    leaves: tuple[Leaf, ...] = ()
    """The tensors that it is called with and returns; an assignment is given a value and returns it."""
    callee: str = ""
    """What it calls; empty for an assignment, and where it never runs."""
    closed: str = ""
    """Why what it calls has no source of its own; empty if it has."""
    runs_in_steps: Dim | None = None
    """How often it runs in a step of a generation after the first; None if that is not known."""
    leaves_in_steps: tuple[Leaf, ...] = ()
    """The tensors there."""

    def at_step(self, step: int) -> Operation:
        """What it is in a step of a generation."""
        if step == 0:
            return self
        if self.runs_in_steps is None:
            return replace(self, leaves=tuple(leaf.at_step(step) for leaf in self.leaves))
        return replace(self, runs=self.runs_in_steps, leaves=self.leaves_in_steps)

    def side(self, side: str) -> tuple[Leaf, ...]:
        """The tensors of one side."""
        return tuple(leaf for leaf in self.leaves if leaf.side == side)

    @property
    def repeated(self) -> bool:
        """Whether a forward pass may run it several times, so that an address has to say which time."""
        return self.runs.axis is not Axis.CONSTANT or self.runs.size > 1


@dataclass(frozen=True)
class Source:
    """The text of a function, and what happens in it: the forward of a module, or a function that is called there."""

    module: str
    """The raw path of the module."""
    path: tuple[str, ...]
    """The operations that lead to the function; empty for the module's forward."""
    function: str
    """The function's name: "GPT2Attention.forward"."""
    text: str
    """Its text."""
    operations: Mapping[str, Operation]
    """By name, in the order of the text."""

    def to_proto(self) -> model_pb2.Source:
        """This source as a message."""
        return model_pb2.Source(
            module=self.module,
            path=self.path,
            function=self.function,
            text=self.text,
            operations=[
                model_pb2.Operation(
                    name=each.name,
                    line=each.line,
                    runs=each.runs.to_proto(),
                    leaves=[leaf.to_proto() for leaf in each.leaves],
                    callee=each.callee,
                    closed=each.closed,
                    runs_in_steps=None if each.runs_in_steps is None else each.runs_in_steps.to_proto(),
                    leaves_in_steps=[leaf.to_proto() for leaf in each.leaves_in_steps],
                )
                for each in self.operations.values()
            ],
        )

    @classmethod
    def from_proto(cls, message: model_pb2.Source) -> Source:
        """The source of a message."""
        module, path = message.module, tuple(message.path)
        operations = {}
        for each in message.operations:
            runs = Dim.from_proto(each.runs)
            leaves = tuple(Leaf.from_proto(module, leaf, (*path, each.name), runs) for leaf in each.leaves)
            found = Operation(each.name, each.line, runs, leaves, each.callee, each.closed)
            if each.HasField("runs_in_steps"):
                runs = Dim.from_proto(each.runs_in_steps)
                leaves = tuple(
                    Leaf.from_proto(module, leaf, (*path, each.name), runs, in_steps=True)
                    for leaf in each.leaves_in_steps
                )
                found = replace(found, runs_in_steps=runs, leaves_in_steps=leaves)
            operations[each.name] = found
        return cls(module, path, message.function, message.text, operations)


Inside = tuple[str, tuple[str, ...]]
"""Which function: the raw path of a module, and the operations that lead from its forward to the function."""


@dataclass(frozen=True)
class Part:
    """A part of a tensor that exists in the model, or of a parameter."""

    address: str
    """The address of the tensor, or the path of the parameter; with "[*]" of all times that an operation runs."""
    views: tuple[View, ...] = ()
    """The way to the part."""
    parameter: bool = False
    """Whether it is a parameter."""

    def to_proto(self) -> model_pb2.Part:
        """This part as a message."""
        return model_pb2.Part(address=self.address, views=views_to_proto(self.views), parameter=self.parameter)

    @classmethod
    def from_proto(cls, message: model_pb2.Part) -> Part:
        """The part of a message."""
        return cls(message.address, views_from_proto(message.views), message.parameter)


@dataclass(frozen=True)
class Name:
    """A canonical name and what it stands for."""

    name: str
    module: str
    """The raw path of the module."""
    value: Leaf | None = None
    """The value, if the name is of a value rather than of a module."""
    role: str = ""
    """What the part is, where a name covers several kinds: "attention", "ssm", "mlp", "moe"."""
    part: Part | None = None
    """Where it is, if the name is of a part of a tensor, or of a parameter."""
    part_in_steps: Part | None = None
    """Where it is in the steps of a generation after the first, if it is elsewhere then."""
    dims: str = ""
    """What its dimensions are: "batch seq head=12 d_head=64"."""
    formula: str = ""
    """The name of the formula, if it is computed from others."""

    @property
    def is_module(self) -> bool:
        """Whether it stands for a module, rather than for a value."""
        return self.value is None and self.part is None and not self.formula

    @property
    def is_computed(self) -> bool:
        """Whether it is computed from what the model has, so that it cannot be written."""
        return bool(self.formula) or (self.part is not None and any(view.copies for view in self.part.views))

    @property
    def symbolic(self) -> str:
        """Its shape as text: "[batch, seq, 12, 64]"."""
        return f"[{', '.join(each.rpartition('=')[2] for each in self.dims.split())}]"

    def to_proto(self) -> model_pb2.Name:
        """This name as a message."""
        return model_pb2.Name(
            name=self.name,
            module=self.module,
            value=None if self.value is None else self.value.to_proto(),
            role=self.role,
            part=None if self.part is None else self.part.to_proto(),
            part_in_steps=None if self.part_in_steps is None else self.part_in_steps.to_proto(),
            dims=self.dims,
            formula=self.formula,
        )

    @classmethod
    def from_proto(cls, message: model_pb2.Name) -> Name:
        """The name of a message."""
        return cls(
            message.name,
            message.module,
            Leaf.from_proto(message.module, message.value) if message.HasField("value") else None,
            message.role,
            Part.from_proto(message.part) if message.HasField("part") else None,
            Part.from_proto(message.part_in_steps) if message.HasField("part_in_steps") else None,
            message.dims,
            message.formula,
        )


@dataclass(frozen=True)
class Catalogue:
    """Every module, site and canonical name of a model."""

    model: str
    """The model's name, for messages."""
    modules: dict[str, Module]
    """By raw path, parents before children."""
    names: dict[str, Name] = field(default_factory=dict)
    """By canonical name."""
    missing: dict[str, str] = field(default_factory=dict)
    """The canonical names that models of this architecture have and this one lacks, with the reason."""
    found_by: str = ""
    """How the parts were found: "table" (the architecture is known), "detected" (by their structure) or "unknown"."""
    learn: Callable[[Inside], Source] | None = field(default=None, compare=False, repr=False)
    """Finds out what is inside a function, where that is possible; raises `SiteError` if there is no text of it."""
    sources: dict[Inside, Source] = field(default_factory=dict, compare=False, repr=False)
    """What has been found out so far."""

    @cached_property
    def children(self) -> dict[str, list[str]]:
        """The raw names of every module's children, in order."""
        children: dict[str, list[str]] = {path: [] for path in self.modules}
        for path in self.modules:
            if path:
                parent, _, name = path.rpartition(".")
                children[parent].append(name)
        return children

    @cached_property
    def prefixes(self) -> dict[str, list[str]]:
        """What may follow each canonical name, in order: {"": ["embed", "layers", …], "layers": ["0", …]}."""
        prefixes: dict[str, dict[str, None]] = {}
        for name in self.names:
            parts = name.split(".")
            for end in range(len(parts)):
                prefixes.setdefault(".".join(parts[:end]), {})[parts[end]] = None
            if len(parts) == 4 and parts[2] in MIXERS:
                prefixes.setdefault(".".join([*parts[:2], "mixer"]), {})[parts[3]] = None
        return {prefix: list(names) for prefix, names in prefixes.items()}

    def indices(self, name: str) -> list[str]:
        """What a list of modules may be indexed with, by its canonical name or raw path; empty if it is no list."""
        known = self._indices.get(name)
        if known is None:
            known = self.prefixes.get(name, [])
            if not any(each.isdigit() for each in known):
                raw = self.raw(name)
                known = self.children.get(raw, []) if raw is not None else []
            known = self._indices[name] = [each for each in known if each.isdigit()]
        return known

    @cached_property
    def _indices(self) -> dict[str, list[str]]:
        return {}

    @cached_property
    def entries(self) -> list[Order]:
        """When each module is entered, as positions in the order of sites, in order."""
        return sorted(module.side(INPUT)[0].order for module in self.modules.values() if module.side(INPUT))

    @cached_property
    def layers(self) -> list[str]:
        """The raw paths of the layers, those that have canonical names, in order."""
        return [self.names[f"layers.{index}"].module for index in range(self.num_layers)]

    @cached_property
    def num_layers(self) -> int:
        """How many layers have canonical names."""
        return len(self.prefixes.get("layers", []))

    @cached_property
    def canonical(self) -> dict[str, str]:
        """The first canonical name of each module that has one, by raw path."""
        return {each.module: each.name for each in reversed(self.names.values()) if each.is_module}

    def named(self, name: str) -> Name | None:
        """The canonical name, if it is one. What is in a layer's `attn` or `ssm` is also in its `mixer`."""
        found = self.names.get(name)
        if found is None and (match := _IN_MIXER.fullmatch(name)):
            for role in MIXERS:
                found = found or self.names.get(f"{match[1]}.{role}.{match[2]}")
        return found

    def raw(self, name: str) -> str | None:
        """The raw path of a module's canonical name or raw path, or of one that continues the other; None if none."""
        known, rest = name, list[str]()
        while (path := self._known(known)) is None:
            known, _, tail = known.rpartition(".")
            if not known:
                return None
            rest.append(tail)
        for tail in reversed(rest):
            path = f"{path}.{tail}" if path else tail
            if path not in self.modules:
                return None
        return path

    def _known(self, name: str) -> str | None:
        if name in self.names and self.names[name].is_module:
            return self.names[name].module
        return name if name in self.modules else None

    def holds_layers(self, path: str) -> bool:
        """Whether a module, by its raw path, has layers in it: then applying it is a forward pass of its own."""
        first = self.names.get("layers.0")
        prefix = f"{path}." if path else ""
        return path == "" or (first is not None and first.module.startswith(prefix))

    def module(self, name: str) -> Module:
        """The module of a canonical name or raw path.

        Raises:
            SiteError: there is none; the message tells the nearest names.
        """
        path = self.raw(name)
        if path is None:
            items = self.prefixes.get(name, [])
            is_list = bool(items) and all(each.isdigit() for each in items)
            hint = f"It is a list: `{spell(name)}[0]` is its first." if is_list else self.suggestion(name)
            raise SiteError(f"`{spell(name)}` is not a module of {self.model}.", hint=hint)
        return self.modules[path]

    @cached_property
    def _found(self) -> dict[tuple[Address, bool], Leaf]:
        return {}

    def leaf(self, address: Address, step: int = 0) -> Leaf:
        """The tensor at an address, in a step of a generation.

        Raises:
            SiteError: there is none, or a forward pass does not call that module.
        """
        key = (address, step > 0)
        found = self._found.get(key)
        if found is None:
            found = self._find(address, step).at_step(step)
            if len(self._found) < _REMEMBERED:  # addresses have many spellings, and a client may try them all
                self._found[key] = found
        return found

    def _find(self, address: Address, step: int) -> Leaf:
        named = self.names.get(address.name)
        if named is not None and named.value is not None and not address.path:
            return named.value
        name, _, side = address.name.rpartition(".")
        if address.name in _SIDES:
            name, side = "", address.name
        if side in _SIDES and (inside := self.split(name)) is not None:
            return self._find_operation(address, *inside, side, step)
        if side not in _SIDES:
            hint = self.suggestion(address.name)
            if self.raw(address.name) is not None:
                typed = spell(address.name)
                hint = f"`{typed}` is a module: write `{typed}.output` or `{typed}.input`."
            raise SiteError(f"`{address.spelled}` is not a site of {self.model}.", hint=hint)
        module = self.module(name)
        leaves = module.side(side)
        typed = address.spelled
        if not module.calls:
            raise SiteError(
                f"`{typed}` never exists: a forward pass of {self.model} does not call this module.",
                hint="Print the model: it says which modules are not called.",
            )
        if not leaves:
            raise SiteError(f"`{typed}` is not a tensor and has none in it.")
        if module.calls > 1:
            raise SiteError(
                f"`{typed}` exists {module.calls} times in a forward pass of {self.model}, which calls this module as "
                "often; one of them cannot be named in this version."
            )
        if not address.path and name in self.names:
            return leaves[0]
        for leaf in leaves:
            if leaf.path == address.path:
                return leaf
        found = ", ".join(f"`{Address(address.name, leaf.path).spelled}` {leaf.symbolic}" for leaf in leaves)
        raise SiteError(f"`{address.spelled}` is not a tensor.", hint=f"The tensors there are {found}.")

    # --- inside a forward ---------------------------------------------------------------------------------------------

    def split(self, name: str) -> tuple[str, tuple[str, ...], int | None] | None:
        """What a name with the word "source" in it means: a module's raw path, the operations, and which occurrence.

        The operations are empty if the name ends with "source". None if the name is of a module, or of nothing.
        """
        parts = name.split(".")
        for index, part in enumerate(parts):
            before = ".".join(parts[:index])
            if (
                part != SOURCE
                or self.raw(before) is None
                or self.raw(f"{before}.{part}" if before else part) is not None
            ):
                continue
            words = parts[index:]
            last, bracket, number = words[-1].partition("[")
            occurrence = int(number[:-1]) if re.fullmatch(r"\d{1,18}\]", number) else None
            words[-1] = last
            operations = words[1::2]
            if any(word != SOURCE for word in words[::2]) or not all(map(str.isidentifier, operations)):
                return None
            if bracket and (occurrence is None or len(words) % 2):
                return None
            raw = self.raw(before)
            assert raw is not None
            return raw, tuple(operations), occurrence
        return None

    def needed_sources(self, address: Address) -> list[Inside]:
        """The functions that have to be known to understand an address, outer ones first."""
        inside = self.split(address.name.rpartition(".")[0]) if SOURCE in address.name else None
        if inside is None:
            return []
        module, operations, _ = inside
        return [(module, operations[:depth]) for depth in range(min(len(operations), MAX_DEPTH))]

    def source(self, module: str, path: tuple[str, ...] = ()) -> Source:
        """What is inside a function.

        Args:
            module: The raw path of the module.
            path: The operations that lead from its forward to the function.

        Raises:
            SiteError: a forward pass does not call it, or its text is not to be had.
        """
        if len(path) > MAX_DEPTH:
            raise SiteError(
                f"`{spell(module)}.{SOURCE}…` leads through {len(path):,} functions, one inside the other.",
                hint=f"At most {MAX_DEPTH} can be looked through.",
            )
        known = self.sources.get((module, path))
        if known is not None:
            return known
        typed = spell(".".join([part for part in (module, SOURCE) if part] + [f"{each}.{SOURCE}" for each in path]))
        if path:
            operation = self.operation(module, path)
            if operation.closed:
                shows = f"`print({typed.removesuffix(f'.{path[-1]}.{SOURCE}')})` shows what is there."
                raise SiteError(f"`{typed}` is not there: {operation.closed}.", hint=shows)
        elif not self.modules[module].calls:
            raise SiteError(
                f"`{typed}` is of no use: a forward pass of {self.model} does not call this module.",
                hint="Print the model: it says which modules are not called.",
            )
        if self.learn is None:
            raise SiteError(f"`{typed}` is not known here.", hint="Ask a server, which has the model itself.")
        return self.learn((module, path))

    def operation(self, module: str, path: tuple[str, ...]) -> Operation:
        """The operation that a path leads to.

        Raises:
            SiteError: there is none; the message tells the nearest names.
        """
        source = self.source(module, path[:-1])
        found = source.operations.get(path[-1])
        if found is not None:
            return found
        raise self.no_operation(source, path[-1])

    def no_operation(self, source: Source, name: str, typed: str = "") -> SiteError:
        """The error for an operation that is not in a source; `typed` is how the source was spelled."""
        name = name[:_LONGEST_NAME]
        typed = typed or spell(".".join([source.module, *(f"{SOURCE}.{each}" for each in source.path), SOURCE]))
        near = [f"`{typed}.{each}`" for each in nearest(name, source.operations)]
        hint = f"Did you mean {' or '.join(near)}?" if near else f"`print({typed})` shows the operations."
        return SiteError(f"`{typed}` has no operation `{name}`: it is `{source.function}`.", hint=hint)

    def _find_operation(
        self, address: Address, module: str, path: tuple[str, ...], occurrence: int | None, side: str, step: int
    ) -> Leaf:
        typed = address.spelled
        if not path:
            raise SiteError(
                f"`{typed}` is not a site of {self.model}.",
                hint=f"Name an operation: `{typed.rpartition('.')[0]}.….{side}`; `print` shows them.",
            )
        operation = self.operation(module, path)
        leaves = self.operation_leaves(address.name, operation, occurrence, side, step)
        for leaf in leaves:
            if leaf.path == address.path:
                return leaf
        found = ", ".join(f"`{Address(address.name, leaf.path).spelled}` {leaf.symbolic}" for leaf in leaves)
        raise SiteError(f"`{typed}` is not a tensor.", hint=f"The tensors there are {found}.")

    def operation_leaves(
        self, name: str, operation: Operation, occurrence: int | None, side: str, step: int = 0
    ) -> tuple[Leaf, ...]:
        """The tensors of one side of an operation, at one of its occurrences.

        Args:
            name: The name in the address, for messages.
            operation: The operation.
            occurrence: Which time it runs; None if that was not said.
            side: `INPUT` or `OUTPUT`.
            step: The step of a generation.

        Raises:
            SiteError: it never runs, or not so often; it runs several times, and which is meant was not said; or there
                is no tensor.
        """
        operation = operation.at_step(step)
        typed, runs = spell(name), operation.runs
        if runs == Dim(Axis.CONSTANT, 0):
            when = "a step of a generation" if step else "a forward pass"
            raise SiteError(
                f"`{typed}` never exists: {when} of {self.model} does not come by this line.",
                hint="`print` the source: it says which operations run.",
            )
        if operation.repeated and occurrence is None:
            place = typed.removesuffix(f".{side}")
            often = {Axis.CONSTANT: f"{runs.size} times", Axis.UNKNOWN: "as often as its input says"}
            raise SiteError(
                f"`{typed}` does not say which time: the operation runs {often.get(runs.axis, f'[{runs}] times')} in a "
                "forward pass.",
                hint=f"Write `{place}[0].{side}` for the first.",
            )
        if runs.axis is Axis.CONSTANT and (occurrence or 0) >= runs.size:
            raise SiteError(
                f"`{typed}` never exists: the operation runs {_times(runs.size)} in a forward pass.",
                hint=f"The first time is [0], the last [{runs.size - 1}].",
            )
        leaves = operation.side(side)
        if not leaves:
            raise SiteError(
                f"`{typed}` is not a tensor and has none in it.",
                hint=f"`print({typed.removesuffix(f'.{side}')})` shows the tensors of the operation.",
            )
        return tuple(replace(leaf, occurrence=occurrence) for leaf in leaves) if occurrence else leaves

    def suggestion(self, name: str) -> str:
        """A sentence with the nearest valid names, or the first ones if none is near."""
        name = name[:_LONGEST_NAME]
        head, _, tail = name.rpartition(".")
        while head and self.raw(head) is None and head not in self.prefixes:
            head, _, tail = head.rpartition(".")
        raw = self.raw(head) if head else ""
        below = [*self.prefixes.get(head, []), *(self.children.get(raw, []) if raw is not None else [])]
        below += [each.name for each in self.modules[raw].parameters] if raw is not None else []
        below += nearest(tail, _READ, likeness=_A_SLIP) if raw is not None and self.modules[raw].leaves else []
        below = list(dict.fromkeys(below))
        dot = f"{head}." if head else ""
        if tail.isdigit() and below and all(each.isdigit() for each in below):
            return f"`{spell(head)}` has the indices {below[0]} to {below[-1]}."
        if f"{head}.mixer" in self.names and tail in _LAYER_HINTS:
            role = self.names[f"{head}.mixer"].role
            return _LAYER_HINTS[tail].format(layer=spell(head), role="an SSM" if role == "ssm" else role)
        close = [f"{dot}{each}" for each in nearest(tail, below)]
        if not close:
            close = nearest(name, dict.fromkeys([*self.names, *self.modules])) or [f"{dot}{each}" for each in below[:6]]
        return f"Did you mean {_either(close)}?" if close else ""

    def parameter(self, path: str) -> Parameter:
        """The parameter at a module's name or path and its own name: "lm_head.weight".

        Raises:
            SiteError: there is none.
        """
        owner, _, name = path.rpartition(".")
        module = self.module(owner)
        for parameter in module.parameters:
            if parameter.name == name:
                return parameter
        known = [f"`{spell(owner)}.{each.name}`" for each in module.parameters]
        raise SiteError(
            f"`{spell(path)}` is not a parameter of {self.model}.",
            hint=f"It has {', '.join(known)}." if known else f"`{spell(owner)}` has no parameters of its own.",
        )

    def to_proto(self) -> tuple[list[model_pb2.Module], list[model_pb2.Name]]:
        """The modules and names as messages."""
        modules = [
            model_pb2.Module(
                path=module.path,
                class_name=module.class_name,
                parameters=[
                    model_pb2.ParameterInfo(
                        name=each.name, shape=each.shape, dtype=dtype_to_proto(each.dtype), tied=each.tied
                    )
                    for each in module.parameters
                ],
                leaves=[leaf.to_proto() for leaf in module.leaves],
                calls=module.calls,
                items=module.items,
            )
            for module in self.modules.values()
        ]
        names = [name.to_proto() for name in self.names.values()]
        return modules, names

    @classmethod
    def from_proto(
        cls,
        model: str,
        modules: Iterable[model_pb2.Module],
        names: Iterable[model_pb2.Name],
        missing: Iterable[model_pb2.Missing] = (),
        found_by: str = "",
    ) -> Catalogue:
        """The catalogue of messages."""
        return cls(
            model,
            {
                each.path: Module(
                    each.path,
                    each.class_name,
                    tuple(
                        Parameter(info.name, tuple(info.shape), dtype_from_proto(info.dtype), info.tied)
                        for info in each.parameters
                    ),
                    tuple(Leaf.from_proto(each.path, leaf) for leaf in each.leaves),
                    each.calls,
                    each.items,
                )
                for each in modules
            },
            {each.name: Name.from_proto(each) for each in names},
            {each.name: each.reason for each in missing},
            found_by,
        )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _either(names: Sequence[str]) -> str:
    quoted = [f"`{spell(name)}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"
