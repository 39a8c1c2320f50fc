"""Plans: how a server would run what was recorded, before it does.

`session.plan()` says which passes there would be, how many rows each has and where they fork, after which site it ends,
and what it would compute and hold. Printed, a plan is a table; `plan.plot()` draws its rows from layer to layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from patchwire import tabular
from patchwire.listing import layer_of, spans
from patchwire.sites import spell
from patchwire.v1 import service_pb2

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PREFIXES = " kMGTPE"
_MOST_PANELS = 12


@dataclass(frozen=True)
class PlannedFork:
    """Rows that were shared are computed apart from here on."""

    before: str
    """The module before which they fork: "layers.5"."""
    rows: int
    """Rows from there on."""

    @property
    def layer(self) -> int | None:
        """The number of that layer; None if it is none."""
        return layer_of(self.before)


@dataclass(frozen=True)
class PlannedPass:
    """A forward pass of a model, or one generation, that would run."""

    model: str
    """The model's name."""
    layers: int
    """How many layers it has."""
    rows: int
    """Rows that it begins with."""
    tokens: int
    """Tokens of each row, the padding of short ones included."""
    cached: int
    """Tokens of each row that come before these and are in a cache."""
    forks: tuple[PlannedFork, ...]
    """Where rows fork, in order."""
    stops_after: str
    """The site after which it ends: "layers.5.output"; empty if it runs to its end."""
    layers_computed: int
    """Layers that are computed, from the first."""
    modules_skipped: int
    """Modules that come after its end."""
    positions: int | None
    """Positions, of all rows together, whose logits are computed: None if of all, 0 if it ends before them."""
    columns: int | None
    """Entries of the vocabulary whose logits are computed; None if of all."""
    generates: int
    """New tokens that it generates for each row; 0 if it is no generation."""
    calls: int
    """How often the model is called: once, or for each step of a generation."""
    traces: tuple[int, ...]
    """The traces that it is for, by their positions in the request, or in the body of the loop."""
    invokes: int
    """How many invokes it is for."""
    iterations: int
    """How often it runs: once for each iteration of its loop, or once."""
    flops: float
    """Floating-point operations of one run."""
    bytes: int
    """Bytes of the activations that one run holds at once."""

    @classmethod
    def from_proto(cls, message: service_pb2.PlannedPass) -> PlannedPass:
        """The pass of a message."""
        return cls(
            model=message.model,
            layers=message.layers,
            rows=message.rows,
            tokens=message.tokens,
            cached=message.cached,
            forks=tuple(PlannedFork(each.before, each.rows) for each in message.forks),
            stops_after=message.stops_after,
            layers_computed=message.layers_computed,
            modules_skipped=message.modules_skipped,
            positions=message.positions if message.HasField("positions") else None,
            columns=message.columns if message.HasField("columns") else None,
            generates=message.generates,
            calls=message.calls,
            traces=tuple(message.traces),
            invokes=message.invokes,
            iterations=message.iterations,
            flops=message.flops,
            bytes=message.bytes,
        )

    @property
    def rows_at_end(self) -> int:
        """Rows that it ends with."""
        return self.forks[-1].rows if self.forks else self.rows

    @property
    def times(self) -> int:
        """How often the model is called for it in all."""
        return self.calls * self.iterations

    def rows_of_layers(self) -> list[int]:
        """The rows that each of its layers computes: 0 for those that it does not come to."""
        found = [self.rows] * self.layers
        for fork in self.forks:
            if fork.layer is not None:
                found[fork.layer :] = [fork.rows] * (self.layers - fork.layer)
        return [rows if at < self.layers_computed else 0 for at, rows in enumerate(found)]


@dataclass(frozen=True)
class Plan:
    """How a request would run. Printed, it is a table with a line for each pass; alike ones share a line.

    Example:
        >>> with model.session() as session:
        ...     for layer in range(model.num_layers):
        ...         with model.trace(prompt):
        ...             model.layers[layer].output[:, -1] = 0
        ...             model.logits[:, -1].save()
        ...     print(session.plan())
    """

    passes: tuple[PlannedPass, ...]
    """In the order in which they would run."""
    result_bytes: int
    """Bytes of the saved values, as far as their shapes are known beforehand."""

    @classmethod
    def from_proto(cls, message: service_pb2.PlanResponse) -> Plan:
        """The plan of a message."""
        return cls(tuple(map(PlannedPass.from_proto, message.passes)), message.result_bytes)

    @property
    def calls(self) -> int:
        """Forward passes of models, each step of a generation and each iteration of a loop counted."""
        return sum(each.times for each in self.passes)

    @property
    def rows(self) -> int:
        """Rows in all of them, counted where they end."""
        return sum(each.times * each.rows_at_end for each in self.passes)

    @property
    def modules_skipped(self) -> int:
        """Modules that are left out because nobody needs what comes after the last site."""
        return sum(each.iterations * each.modules_skipped for each in self.passes)

    @property
    def forks(self) -> int:
        """How often rows fork."""
        return sum(each.iterations * len(each.forks) for each in self.passes)

    @property
    def flops(self) -> float:
        """Floating-point operations of all passes."""
        return sum(each.iterations * each.flops for each in self.passes)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the activations that the largest pass holds at once, beside the weights."""
        return max((each.bytes for each in self.passes), default=0)

    def table(self) -> tuple[Sequence[str], list[Sequence[str]]]:
        """The heads of the columns, and the lines."""
        lines = [(span, *_cells(each)) for span, each in self._alike()]
        shown = [column for column in range(len(_HEAD)) if column not in _OPTIONAL or _differ(lines, column)]
        return [_HEAD[at] for at in shown], [[line[at] for at in shown] for line in lines]

    def _alike(self) -> Iterator[tuple[str, PlannedPass]]:
        """Neighbours that differ only in the traces that they are for, with their numbers, from 1."""
        start = 1
        for each, group in groupby(self.passes, lambda each: replace(each, traces=())):
            count = len(list(group))
            yield spans(range(start, start + count)), each
            start += count

    def __str__(self) -> str:
        total = (
            f"{_plural(self.calls, 'pass', 'passes')} of {_plural(self.rows, 'row', 'rows')}: "
            f"{_short(self.flops, 'FLOP')}, {_short(self.memory_bytes, 'B')} held at most, "
            f"{_short(self.result_bytes, 'B')} saved"
        )
        return "\n".join([tabular.text(*self.table()), total]) if self.passes else total

    __repr__ = __str__

    def plot(self, *, title: str = "") -> Figure:
        """A figure of the rows of each pass, from layer to layer; alike ones share a panel.

        Raises:
            PatchwireError: matplotlib is not installed.
        """
        from patchwire import plots

        alike = list(self._alike())
        left = len(alike) - _MOST_PANELS
        note = f"{_plural(left, 'more pass is', 'more passes are')} not shown" if left > 0 else ""
        bands = [(f"{span}  {_label(each)}", each.rows_of_layers()) for span, each in alike[:_MOST_PANELS]]
        return plots.bands(bands, title=title or note, axis="layer", unit="rows")


_HEAD = ("pass", "model", "runs", "rows", "tokens", "forks before", "stops after", "logits", "computes", "holds")
_OPTIONAL = {1: "", 2: "1", 5: "", 7: "all"}
"""The columns that are left out where there is nothing to say: of these words alone."""


def _differ(lines: Sequence[Sequence[str]], column: int) -> bool:
    words = {line[column] for line in lines}
    return len(words) > 1 or (column != 1 and words != {_OPTIONAL[column]})


def _cells(each: PlannedPass) -> tuple[str, ...]:
    runs = [f"{each.iterations:,}"] if each.iterations > 1 else []
    runs += [f"{each.calls:,} steps"] if each.generates else []
    rows = f"{each.rows:,} → {each.rows_at_end:,}" if each.forks else f"{each.rows:,}"
    layers = [fork.layer for fork in each.forks if fork.layer is not None]
    forks = [f"layers[{spans(layers)}]"] if layers else []
    forks += [fork.before for fork in each.forks if fork.layer is None]
    return (
        each.model,
        " x ".join(runs) or "1",
        rows,
        f"{each.cached:,} + {each.tokens:,}" if each.cached else f"{each.tokens:,}",
        ", ".join(forks),
        spell(each.stops_after).removeprefix("model.") if each.stops_after else "its end",
        _logits(each),
        _short(each.flops, "FLOP"),
        _short(each.bytes, "B"),
    )


def _logits(each: PlannedPass) -> str:
    if each.positions == 0:
        return "none"
    if each.generates:
        return "last"
    where = "" if each.positions is None else f"{each.positions:,} of {each.rows_at_end * each.tokens:,}"
    which = "" if each.columns is None else _plural(each.columns, "column", "columns")
    return ", ".join(filter(None, (where, which))) or "all"


def _label(each: PlannedPass) -> str:
    model, runs, rows, tokens, _, end, *_ = _cells(each)
    often = "" if runs == "1" else f"{runs} x "
    return f"{model}: {often}{rows} rows of {tokens} tokens, to {end}"


def _plural(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _short(number: float, unit: str) -> str:
    """A number with three digits and a prefix: "12.3 MB"."""
    power = 0
    while number >= 999.5 and power < len(_PREFIXES) - 1:
        number, power = number / 1000, power + 1
    digits = 0 if number >= 99.5 or not power else 1 if number >= 9.95 else 2
    return f"{number:.{digits}f} {_PREFIXES[power].strip()}{unit}"
