"""Learning what flows through a model: every site's shape in terms of the call, and the order of sites.

The model runs three times on a handful of tokens, with other numbers of rows and tokens. A length that is the same in
all is constant; one that follows the rows or the tokens is named after them. One more run tells whether padding on the
right leaves a row's own numbers alone, as it must before rows of different lengths may share a pass. Tensors that the
model changes in place after they were at a site are noted too: rows that share a pass with a write there could miss it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from patchwire.errors import GraphError
from patchwire.sites import INPUT, OUTPUT, Axis, Catalogue, Dim, Leaf, Module, Name, Parameter, Path
from patchwire.tensors import dtype_to_proto
from patchwire_worker import containers
from patchwire_worker.interleaving import Location, PassInterleaver, Stopping, location_of
from patchwire_worker.models.families import ATTENTION, Family

# Rows and tokens of each run. Small, so that it costs nothing; three, and not on one line, so that a length that grows
# with the rows (one for each row and attention head, say) cannot be taken for one that grows with the tokens.
_SHAPES = ((2, 7), (3, 11), (5, 8))


@dataclass
class _Seen:
    """What one run showed."""

    order: dict[Location, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    leaves: dict[tuple[Location, Path], tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    versions: dict[tuple[Location, Path], tuple[Tensor, int]] = field(default_factory=dict)

    def observe(self, provider: str, value: Any) -> None:
        location = location_of(provider)
        if location is None:
            return
        if location[1] == OUTPUT:
            self.calls[location[0]] = self.calls.get(location[0], 0) + 1
        if location in self.order:
            return
        self.order[location] = len(self.order)
        for path, tensor in containers.tensors(value, location[1]):
            self.leaves[location, path] = (tuple(tensor.shape), tensor.dtype)
            self.versions[location, path] = (tensor, tensor._version)

    def overwritten(self) -> set[tuple[Location, Path]]:
        """The tensors that were changed in place after they had been seen; forgets all of them."""
        found = {place for place, (tensor, version) in self.versions.items() if tensor._version != version}
        self.versions.clear()
        return found


class Learner:
    """Runs a model on a few tokens and tells what it saw."""

    def __init__(
        self,
        module: nn.Module,
        interleaver: PassInterleaver,
        options: dict[str, Any],
        device: torch.device,
        vocabulary: int,
    ) -> None:
        self.module = module
        self.interleaver = interleaver
        self.options = options
        self.device = device
        self.vocabulary = vocabulary
        self.overwritten: set[tuple[Location, Path]] = set()
        """The tensors that the model changes in place after they were at a site."""

    def catalogue(self, name: str, family: Family | None) -> Catalogue:
        """Every module of the model, with the tensors that it takes and returns."""
        runs = [self._run(*shape) for shape in _SHAPES]
        modules = {
            path: Module(
                path,
                type(module).__name__,
                _parameters(module),
                tuple(_leaves(path, runs)),
                runs[0].calls.get(path, 0),
            )
            for path, module in self.module.named_modules()
        }
        return Catalogue(name, modules, _names(modules, family))

    def _run(self, batch: int, seq: int) -> _Seen:
        seen = _Seen()
        self.interleaver.observe = seen.observe
        try:
            self._forward(self._ids(batch, seq))
        finally:
            self.interleaver.observe = None
        self.overwritten |= seen.overwritten()
        return seen

    def _forward(self, ids: Tensor) -> None:
        with torch.no_grad():
            self.interleaver.run(self.module, [], Stopping(), input_ids=ids, **self.options)

    def _ids(self, batch: int, seq: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self.vocabulary, (batch, seq), generator=generator).to(self.device)

    def pads(self) -> bool:
        """Whether padding on the right leaves a row's own numbers alone, as in every causal model."""
        batch, seq = _SHAPES[1]
        short = seq // 2
        ids = self._ids(batch, seq)
        padded, alone = self._result(ids)[:, :short], self._result(ids[:, :short])
        scale = alone.abs().max().clamp(min=1e-6)
        tolerance = 1e-4 if alone.dtype is torch.float32 else 5e-2
        return bool(((padded - alone).abs().max() / scale) < tolerance)

    def _result(self, ids: Tensor) -> Tensor:
        found: list[Tensor] = []

        def observe(provider: str, value: Any) -> None:
            if location_of(provider) == ("", OUTPUT):
                found.extend(tensor for _, tensor in containers.tensors(value, OUTPUT))

        self.interleaver.observe = observe
        try:
            self._forward(ids)
        finally:
            self.interleaver.observe = None
        return found[0].float() if found[0].dtype is torch.float64 else found[0]


def _parameters(module: nn.Module) -> tuple[Parameter, ...]:
    found = []
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        try:
            dtype_to_proto(tensor.dtype)
        except GraphError:  # a quantized weight: it stays on the worker
            continue
        found.append(Parameter(name, tuple(tensor.shape), tensor.dtype))
    return tuple(found)


def _leaves(path: str, runs: Sequence[_Seen]) -> list[Leaf]:
    leaves = []
    first, *others = runs
    for side in (INPUT, OUTPUT):
        location = (path, side)
        for place, (shape, dtype) in first.leaves.items():
            seen = [each.leaves.get(place) for each in others]
            if place[0] != location or any(each is None or each[1] != dtype for each in seen):
                continue
            try:
                dtype_to_proto(dtype)
            except GraphError:
                continue
            shapes = [shape, *(each[0] for each in seen if each is not None)]
            alike = len({len(each) for each in shapes}) == 1
            dims = tuple(map(_dim, zip(*shapes, strict=True))) if alike else (Dim(Axis.UNKNOWN),)
            leaves.append(Leaf(path, side, place[1], dims, dtype, first.order[location]))
    return leaves


def _dim(lengths: tuple[int, ...]) -> Dim:
    """What a dimension is that had these lengths in the runs."""
    if len(set(lengths)) == 1:
        return Dim(Axis.CONSTANT, lengths[0])
    followed = {
        Axis.BATCH: [batch for batch, _ in _SHAPES],
        Axis.SEQ: [seq for _, seq in _SHAPES],
        Axis.BATCH_SEQ: [batch * seq for batch, seq in _SHAPES],
    }
    for axis, values in followed.items():
        rest = {length - value for length, value in zip(lengths, values, strict=True)}
        if len(rest) == 1:
            return Dim(axis, rest.pop())
    return Dim(Axis.UNKNOWN)


def _names(modules: dict[str, Module], family: Family | None) -> dict[str, Name]:
    names: dict[str, Name] = {}

    def add(name: str, path: str, role: str = "", value: Leaf | None = None) -> None:
        if path in modules:
            names[name] = Name(name, path, value, role)

    if family is not None:
        if family.embed:
            add("embed", family.embed)
        index = 0
        while (layer := f"{family.layers}.{index}") in modules:
            add(f"layers.{index}", layer)
            for part, role in family.mixers.items():
                if f"{layer}.{part}" in modules:
                    add(f"layers.{index}.mixer", f"{layer}.{part}", role)
                    add(f"layers.{index}.{'attn' if role == ATTENTION else 'ssm'}", f"{layer}.{part}", role)
                    break
            for part, role in family.mlps.items():
                if f"{layer}.{part}" in modules:
                    add(f"layers.{index}.mlp", f"{layer}.{part}", role)
                    break
            index += 1
        if family.norm:
            add("norm", family.norm)
        if family.lm_head:
            add("lm_head", family.lm_head)
    for leaf in modules[""].side(OUTPUT):
        if leaf.path == ("logits",):
            add("logits", "", value=leaf)
    return names
