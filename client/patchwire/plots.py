"""How a matrix of numbers looks: shaded cells in a terminal, and a heatmap in the style of the field's figures.

Both take the same: values `[rows, columns]`, a label for each row and column, and perhaps a text for each cell. Reading
down a terminal is going up the network, so a figure has its first row at the bottom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.cells import cell_len, set_cell_size
from rich.color import Color
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import Tensor

from patchwire.errors import PatchwireError, ShapeError, here

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Labels = Sequence[str]
Texts = Sequence[Sequence[str]]

_PALE, _DEEP = (222, 235, 247), (8, 48, 107)
_PADDING = 1
_WIDEST_CELL = 12


def visible(token: str) -> str:
    """A token as it is shown: spaces and line ends can be seen, and it is never empty."""
    shown = "".join(_SHOWN.get(each, each if each.isprintable() else "�") for each in token)
    return shown or "∅"


_SHOWN = {" ": "▁", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def shade(value: float) -> Style:
    """The colours of a terminal cell: none near 0, deep blue at 1; values outside of that are clipped."""
    value = min(max(0.0 if math.isnan(value) else value, 0.0), 1.0)
    if value < 0.02:
        return Style(dim=True)
    red, green, blue = (round(pale + (deep - pale) * value) for pale, deep in zip(_PALE, _DEEP, strict=True))
    ink = Color.from_rgb(255, 255, 255) if value > 0.5 else Color.from_rgb(0, 0, 0)
    return Style(color=ink, bgcolor=Color.from_rgb(red, green, blue))


def grid(
    values: Tensor,
    *,
    rows: Labels,
    columns: Labels,
    texts: Texts | None = None,
    title: str = "",
    corner: str = "layer",
    full: float | None = None,
    width: int | None = None,
) -> Table:
    """A table for the terminal, each cell shaded by its value.

    Args:
        values: `[rows, columns]`, any real dtype.
        rows: A label for each row.
        columns: A label for each column; may have several lines.
        texts: What to write in the cells, `[rows][columns]`; the values if left out.
        title: Written above.
        corner: The heading of the row labels.
        full: The value that has the deepest shade; the largest value if left out.
        width: How many characters wide it may be; the last columns that fit are shown, and the caption says so.

    Raises:
        ShapeError: labels or texts do not fit the values.
    """
    values = _checked(values, rows, columns, texts)
    texts = texts or number_texts(values)
    deepest = full if full is not None else float(values.nan_to_num().max()) if values.numel() else 1.0
    widths = [_width(columns, texts, column) for column in range(len(columns))]
    first = _first_column(widths, width, max([cell_len(corner), *map(cell_len, rows)]))
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="",
        caption=f"the last {len(columns) - first} of {len(columns)} columns" if first else None,
        caption_justify="left",
        box=None,
        padding=(0, _PADDING, 0, 0),
        pad_edge=False,
    )
    table.add_column(corner, justify="right", style="bold", no_wrap=True)
    for column in range(first, len(columns)):
        head = "\n".join(fit(line, widths[column]) for line in columns[column].split("\n"))
        table.add_column(Text(head), min_width=widths[column], no_wrap=True)
    for row, label in enumerate(rows):
        cells = (
            Text(
                set_cell_size(fit(texts[row][column], widths[column]), widths[column]),
                style=shade(float(values[row, column]) / deepest if deepest > 0 else 0.0),
            )
            for column in range(first, len(columns))
        )
        table.add_row(Text(label), *cells)
    return table


def number_texts(values: Tensor) -> list[list[str]]:
    """Each value as short text: two decimals, or powers of ten where all values are tiny."""
    largest = float(values.nan_to_num().abs().max()) if values.numel() else 0.0
    form = "{:.2f}" if largest >= 0.01 or largest == 0 else "{:.0e}"
    return [[form.format(each) for each in row] for row in values.tolist()]


def _checked(values: Tensor, rows: Labels, columns: Labels, texts: Texts | None) -> Tensor:
    values = torch.as_tensor(values).detach().to("cpu", torch.float32)
    if tuple(values.shape) != (len(rows), len(columns)):
        raise ShapeError(
            f"The values have shape {list(values.shape)}, the labels are for [{len(rows)}, {len(columns)}].",
            lines=here(),
        )
    if texts is not None and [len(row) for row in texts] != [len(columns)] * len(rows):
        raise ShapeError(
            f"The texts are not [{len(rows)}][{len(columns)}], as the values are.",
            hint="Give a text for each value.",
            lines=here(),
        )
    return values


def _width(columns: Labels, texts: Texts, column: int) -> int:
    lines = [*columns[column].split("\n"), *(row[column] for row in texts)]
    return min(max(cell_len(line) for line in lines), _WIDEST_CELL)


def _first_column(widths: Sequence[int], width: int | None, labels: int) -> int:
    """The first of the last columns that fit; at least one is shown."""
    if width is None:
        return 0
    left = width - labels - _PADDING
    for column in reversed(range(len(widths))):
        left -= widths[column] + _PADDING
        if left < 0:
            return min(column + 1, len(widths) - 1)
    return 0


def fit(text: str, width: int) -> str:
    """The text, cut to a number of characters."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def heatmap(
    values: Tensor,
    *,
    rows: Labels,
    columns: Labels,
    title: str = "",
    unit: str = "",
    annotate: Texts | Literal["values"] | None = None,
    row_axis: str = "layer",
    column_axis: str = "token",
    signed: bool = False,
    full: float | None = None,
) -> Figure:
    """A matplotlib figure of a matrix, first row at the bottom, with a colour bar.

    Args:
        values: `[rows, columns]`, any real dtype.
        rows: A label for each row.
        columns: A label for each column; may have several lines.
        title: Written above.
        unit: What the values are: "probability". Stands at the colour bar.
        annotate: What to write in the cells, `[rows][columns]`; "values" for the values themselves.
        row_axis: What the rows are.
        column_axis: What the columns are.
        signed: Colour by sign, white at 0, instead of by size.
        full: The value with the deepest colour; the largest (of either sign) if left out.

    Returns:
        A figure that belongs to no window: notebooks show it, `figure.savefig(path)` writes it.

    Raises:
        ShapeError: labels or texts do not fit the values.
        PatchwireError: matplotlib is not installed.
    """
    return panels(
        [(title, values)],
        rows=rows,
        columns=columns,
        unit=unit,
        annotate=annotate,
        row_axis=row_axis,
        column_axis=column_axis,
        signed=signed,
        full=full,
    )


def panels(
    matrices: Sequence[tuple[str, Tensor]],
    *,
    rows: Labels,
    columns: Labels,
    title: str = "",
    unit: str = "",
    annotate: Texts | Literal["values"] | None = None,
    row_axis: str = "layer",
    column_axis: str = "token",
    signed: bool = False,
    full: float | None = None,
) -> Figure:
    """Several heatmaps of one shape as one figure, one above the other, with one colour scale.

    Args:
        matrices: A title and the values `[rows, columns]` of each; NaN stays white.
        title: Written above all of them.
        annotate: As for `heatmap`; texts are those of every matrix.

    The others, and what it returns and raises, are as for `heatmap`.
    """
    checked = [_checked(each, rows, columns, None if annotate == "values" else annotate) for _, each in matrices]
    texts = [number_texts(each) if annotate == "values" else annotate for each in checked]
    longest = max([4, *(cell_len(text) for each in texts for row in each or () for text in row)])
    cell = 0.42 + 0.075 * longest
    height = max(2.8, 1.7 + 0.24 * len(rows))
    figure = _figure()(figsize=(max(4.6, 2.2 + cell * len(columns)), height * len(matrices)), layout="constrained")
    every = figure.subplots(len(matrices), squeeze=False)[:, 0]
    largest = max((float(each.nan_to_num().abs().max()) for each in checked if each.numel()), default=1.0)
    most = full if full is not None else largest
    most = most or 1.0
    for axes, (name, _), values, written in zip(every, matrices, checked, texts, strict=True):
        image = axes.imshow(
            values.numpy(),
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            cmap="RdBu_r" if signed else "Blues",
            vmin=-most if signed else 0.0,
            vmax=most,
        )
        _label(axes, rows, columns, name, row_axis, column_axis)
        _annotate(axes, values / most, written or ())
    bar = figure.colorbar(image, ax=list(every), pad=0.02, fraction=0.05, aspect=30 * len(matrices))
    bar.set_label(unit)
    bar.outline.set_visible(False)
    if title:
        figure.suptitle(_plain(title), fontsize=11)
    return figure


@dataclass(frozen=True, eq=False)
class Panel:
    """One matrix of a figure that has several, with labels of its own."""

    title: str
    values: Tensor
    """`[rows, columns]`, any real dtype; NaN stays white."""
    rows: Labels
    columns: Labels
    row_axis: str
    column_axis: str
    downwards: bool = False
    """The first row is on top, and not at the bottom."""


def side_by_side(parts: Sequence[Panel], *, title: str = "", unit: str = "", signed: bool = False) -> Figure:
    """Heatmaps of any shapes as one figure, beside each other, with one colour scale.

    Args:
        parts: At least one. One whose rows are those of the one before it has no row labels of its own.
        title: Written above all of them.
        unit: What the values are. Stands at the colour bar.
        signed: Colour by sign, white at 0, instead of by size.

    Returns:
        A figure that belongs to no window.

    Raises:
        ShapeError: labels do not fit the values.
        PatchwireError: matplotlib is not installed.
    """
    values = [_checked(each.values, each.rows, each.columns, None) for each in parts]
    most = max((float(each.nan_to_num().abs().max()) for each in values if each.numel()), default=1.0) or 1.0
    shared = [False, *(one.rows == other.rows and one.row_axis == other.row_axis for one, other in pairwise(parts))]
    widths = [
        min(max(1.3, (0.22 if _numbered(each.columns) else 0.5) * len(each.columns)), 9.0) + 0.06 * len(each.title) / 2
        for each in parts
    ]
    labels = sum(
        0.6 + 0.08 * max(map(cell_len, each.rows), default=0)
        for each, left in zip(parts, shared, strict=True)
        if not left
    )
    height = max(2.6, 1.3 + 0.24 * min(max(len(each.rows) for each in parts), 64))
    figure = _figure()(figsize=(max(3.6, sum(widths) + labels + 1.1), height), layout="constrained")
    every = figure.subplots(1, len(parts), squeeze=False, width_ratios=widths)[0]
    for axes, each, numbers, left in zip(every, parts, values, shared, strict=True):
        image = axes.imshow(
            numbers.numpy(),
            aspect="auto",
            origin="upper" if each.downwards else "lower",
            interpolation="nearest",
            cmap="RdBu_r" if signed else "Blues",
            vmin=-most if signed else 0.0,
            vmax=most,
        )
        _label(axes, each.rows, each.columns, each.title, each.row_axis, each.column_axis)
        if left:
            axes.set_ylabel("")
            axes.tick_params("y", labelleft=False)
    bar = figure.colorbar(image, ax=list(every), pad=0.02, fraction=0.05, aspect=25)
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    if title:
        figure.suptitle(_plain(title), fontsize=11)
    return figure


def bands(
    series: Sequence[tuple[str, Sequence[float]]], *, title: str = "", axis: str = "layer", unit: str = "rows"
) -> Figure:
    """A figure of numbers that change from layer to layer, as steps: a panel for each series, one above the other.

    Args:
        series: A title and the numbers of each; where one is 0 there is nothing.
        title: Written above all of them.
        axis: What the numbers are of.
        unit: What the numbers are.

    Raises:
        PatchwireError: matplotlib is not installed.
    """
    longest = max([1, *(len(numbers) for _, numbers in series)])
    size = (min(max(6.4, 1.6 + 0.3 * longest), 12), 0.7 + 1.1 * max(1, len(series)))
    figure = _figure()(figsize=size, layout="constrained")
    every = figure.subplots(max(1, len(series)), squeeze=False)[:, 0]
    for axes, (name, numbers) in zip(every, series or [("", [])], strict=True):
        if numbers:
            axes.stairs(numbers, [at - 0.5 for at in range(len(numbers) + 1)], fill=True, color="#4292c6")
        axes.set_xlim(-0.5, longest - 0.5)
        axes.set_ylim(0, 1.1 * max([1, *numbers]))
        step = max(1, math.ceil(longest / 24))
        axes.set_xticks(range(0, longest, step), [str(each) for each in range(0, longest, step)], fontsize=8)
        axes.yaxis.get_major_locator().set_params(integer=True, nbins=4)
        axes.tick_params("y", labelsize=8)
        axes.set_ylabel(unit, fontsize=8)
        axes.set_title(_plain(name), fontsize=9, loc="left")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    every[-1].set_xlabel(axis)
    if title:
        figure.suptitle(_plain(title), fontsize=11)
    return figure


def _label(axes: Any, rows: Labels, columns: Labels, title: str, row_axis: str, column_axis: str) -> None:
    step = max(1, math.ceil(len(rows) / 64))
    axes.set_yticks(range(0, len(rows), step), [_plain(each) for each in rows[::step]], fontsize=8)
    long = max((len(line) for label in columns for line in label.split("\n")), default=0) > 5
    across = max(1, math.ceil(len(columns) / 16)) if _numbered(columns) else 1
    axes.set_xticks(range(0, len(columns), across), [_plain(each) for each in columns[::across]], fontsize=8)
    if long:
        axes.tick_params("x", rotation=40)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.set_xlabel(column_axis)
    axes.set_ylabel(row_axis)
    axes.set_title(_plain(title), fontsize=10, loc="left")
    axes.tick_params(length=0)
    axes.set_xticks([each - 0.5 for each in range(1, len(columns))], minor=True)
    axes.set_yticks([each - 0.5 for each in range(1, len(rows))], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _numbered(labels: Labels) -> bool:
    """Whether some may be left out, since everybody knows what is between them."""
    return all(each.isdigit() for each in labels)


def _annotate(axes: Any, strengths: Tensor, texts: Texts) -> None:
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            ink = "white" if abs(float(strengths[row, column].nan_to_num())) > 0.5 else "#333333"
            axes.text(column, row, _plain(text), ha="center", va="center", fontsize=6.5, color=ink)


def require() -> None:
    """Say at once, rather than after the work, that figures cannot be drawn.

    Raises:
        PatchwireError: matplotlib is not installed.
    """
    _figure()


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure to a file; the folder is made if it is not there. The suffix says the format.

    Raises:
        PatchwireError: the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
    except (OSError, ValueError) as error:
        raise PatchwireError(f"The figure cannot be written to {path}: {error}") from error
    return path


def _plain(text: str) -> str:
    """Text that matplotlib writes as it is: a dollar would start a formula, rare characters have no glyph."""
    return "".join("\\$" if each == "$" else each if ord(each) < 0x2E80 else "□" for each in text)


def _figure() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise PatchwireError(
            f"Plots need matplotlib ({error}).", hint='Install it: `pip install "patchwire[demo]"`.'
        ) from None

    class Shown(Figure):
        """A figure that notebooks show without pyplot."""

        def _repr_png_(self) -> Any:
            from io import BytesIO

            buffer = BytesIO()
            self.savefig(buffer, format="png", dpi=110)
            return buffer.getvalue()

    return Shown
