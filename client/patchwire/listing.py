"""The canonical names of a model as a table: what each is, where it is in this model, and how that was verified.

`print(model.sites)` shows it, and so does `patchwire sites MODEL`. Layers that are alike share a line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from patchwire import tabular
from patchwire.sites import Catalogue, Name

if TYPE_CHECKING:
    from patchwire.verifying import Verification

_FOUND_BY = {
    "detected": (
        "There is no table of this architecture. Its parts were found by their structure, and named where that tells "
        "what they are. Raw paths reach the rest, and `print(model.layers[0].source)` shows what there is."
    ),
    "unknown": "There is no table of this architecture, and no list of layers was found. Raw paths reach every module.",
}
_HEAD = ("name", "layers", "dimensions", "where", "what", "verified by")


@dataclass(frozen=True)
class Listed:
    """A canonical name, at all layers where it is the same."""

    name: str
    """With `[i]` for the number of the layer: "layers[i].attn.q"."""
    layers: tuple[int, ...]
    """The numbers of the layers; empty if it is of the model."""
    dims: str
    """Its dimensions, those that are constant with their lengths: "batch seq head=12 d_head=64"."""
    where: str
    """The raw address of the tensor that it is, or is a part of: "transformer.h[i].attn.c_attn.output"; of what is
    computed, nothing."""
    kind: str
    """"module", "value" (it can be written), "computed" (it cannot) or "parameter"."""
    checks: tuple[str, ...] = ()
    """The checks that it has passed."""
    failed: tuple[str, ...] = ()
    """Those that it has not."""


@dataclass(frozen=True)
class Lacking:
    """A canonical name that models of this architecture have and this one lacks."""

    name: str
    """With `[i]` for the number of the layer."""
    layers: tuple[int, ...]
    """The numbers of the layers; empty if it is of the model."""
    reason: str
    """Why it is not there."""


@dataclass(frozen=True, eq=False)
class Listing:
    """The canonical names of a model. Printed, it is a table."""

    model: str
    """The model's name."""
    found_by: str
    """How its parts were found: "table", "detected" or "unknown"."""
    rows: list[Listed]
    """What it has."""
    missing: list[Lacking]
    """What it lacks."""

    def table(self) -> tuple[Sequence[str], list[Sequence[str]]]:
        """The heads of the columns, and the lines."""
        lines = []
        for row in self.rows:
            verified = "; ".join([*(f"FAILED {each}" for each in row.failed), *row.checks])
            lines.append((row.name, spans(row.layers), row.dims, row.where, row.kind, verified))
        if not any(line[-1] for line in lines):
            return _HEAD[:-1], [line[:-1] for line in lines]
        return _HEAD, list(lines)

    def notes(self) -> list[str]:
        """What there is to say beside the table: how the parts were found, and what is missing."""
        found = [_FOUND_BY[self.found_by]] if self.found_by in _FOUND_BY else []
        for each in self.missing:
            layers = f" (layers {spans(each.layers)})" if each.layers else ""
            found.append(f"no {each.name}{layers}: {each.reason}")
        return found

    def __repr__(self) -> str:
        return "\n".join([tabular.text(*self.table()), *self.notes()])

    def _repr_html_(self) -> str:
        return tabular.html(*self.table()) + tabular.html((self.model,), [(each,) for each in self.notes()])


def listing(catalogue: Catalogue, verification: Verification | None = None) -> Listing:
    """The canonical names of a model.

    Args:
        catalogue: What is known of it.
        verification: What its checks have found, if they have run.
    """
    rows = _merged(_listed(catalogue, each, verification) for each in catalogue.names.values())
    missing: dict[tuple[str, str], list[int]] = {}
    for name, reason in catalogue.missing.items():
        layer = layer_of(name)
        layers = missing.setdefault((generic(name), _anywhere(catalogue, reason, layer)), [])
        layers += [] if layer is None else [layer]
    lacking = [Lacking(name, tuple(layers), reason) for (name, reason), layers in missing.items()]
    return Listing(catalogue.model, catalogue.found_by, rows, lacking)


def _listed(catalogue: Catalogue, named: Name, verification: Verification | None) -> Listed:
    layer = layer_of(named.name)
    where, kind = f"{named.module or 'the model'}", "module"
    if named.formula:
        where, kind = "", "computed"
    elif named.part is not None:
        where, kind = named.part.address, "parameter" if named.part.parameter else "value"
    elif named.value is not None:
        where, kind = f"output[{named.value.path[0]!r}]", "value"
    dims = named.dims or (named.value.symbolic.strip("[]").replace(",", "") if named.value else "")
    about = [named.name, *(f"{named.name}.{side}" for side in ("input", "output") if kind == "module")]
    checks = [] if verification is None else [row for each in about for row in verification.of(each)]
    return Listed(
        generic(named.name),
        () if layer is None else (layer,),
        dims,
        _anywhere(catalogue, where, layer),
        kind,
        _short(row.check for row in checks if row.passed),
        _short(row.check for row in checks if not row.passed),
    )


def _short(checks: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(each.partition(":")[0] for each in checks))


def _anywhere(catalogue: Catalogue, text: str, layer: int | None) -> str:
    """A text about a layer, for every layer: its path with `[i]` in the place of its number."""
    if layer is None or layer >= catalogue.num_layers:
        return text
    path = catalogue.layers[layer]
    return text.replace(path, f"{path.removesuffix(f'.{layer}')}[i]")


def _merged(rows: Iterable[Listed]) -> list[Listed]:
    found: dict[Listed, list[int]] = {}
    for row in rows:
        found.setdefault(replace(row, layers=()), []).extend(row.layers)
    return [replace(row, layers=tuple(layers)) for row, layers in found.items()]


def generic(site: str) -> str:
    """A canonical name with `[i]` in the place of the layer's number: "layers[i].attn.q"."""
    return re.sub(r"^layers\.\d+(?=\.|$)", "layers[i]", site)


def layer_of(name: str) -> int | None:
    """The number of the layer that a canonical name is of."""
    match = re.match(r"layers\.(\d+)(?=\.|$)", name)
    return None if match is None else int(match[1])


def spans(numbers: Iterable[int]) -> str:
    """Numbers as ranges: "0–3, 5"."""
    return ", ".join("–".join(map(str, each)) for each in _ranges(sorted(set(numbers))))


def _ranges(numbers: Sequence[int]) -> Iterator[tuple[int, ...]]:
    start = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            yield (numbers[start],) if end - start == 1 else (numbers[start], numbers[end - 1])
            start = end
