"""Rows of words as a table: aligned for a terminal, and as HTML for a notebook."""

from __future__ import annotations

import html as escaping
from collections.abc import Iterable, Sequence

from rich.cells import cell_len

_GAP = "  "


def text(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The table as lines, columns aligned on the left.

    Args:
        head: What each column is.
        rows: The words of each row, one for each column.
    """
    lines = [list(head), *map(list, rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        _GAP.join(cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def html(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The table for a notebook."""
    body = "".join(_line(row, "td") for row in rows)
    return f'<table style="font-family: monospace; text-align: left">{_line(head, "th")}{body}</table>'


def _line(cells: Sequence[str], tag: str) -> str:
    inside = "".join(f'<{tag} style="text-align: left">{escaping.escape(cell)}</{tag}>' for cell in cells)
    return f"<tr>{inside}</tr>"
