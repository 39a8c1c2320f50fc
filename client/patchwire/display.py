"""How a model looks: its module tree, in a terminal and in a notebook, and the text of its forwards.

Runs of alike modules (the layers) are shown once, with their count. Each module is shown with its class, the shape of
what it returns, its parameters, and the canonical names that stand for it.
"""

from __future__ import annotations

import html as escaping
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from patchwire.sites import Axis, Catalogue, Dim, Module, Operation, Source, spell


@dataclass
class _Row:
    """A module of the tree as it is shown; `count` alike ones as one."""

    label: str
    class_name: str
    output: str
    parameters: str
    canonical: str
    children: list[_Row] = field(default_factory=list)


def text(catalogue: Catalogue, name: str = "") -> str:
    """The tree under a name, for a terminal."""
    rows = _rows(catalogue, name)
    if not rows:
        return f"<{name or catalogue.model}>"
    lines = [line for row in rows for line in _lines(row)]
    width = max(len(left) for left, _ in lines)
    return "\n".join(f"{left:<{width}}  {right}".rstrip() for left, right in lines)


def html(catalogue: Catalogue, name: str = "") -> str:
    """The tree under a name, for a notebook: foldable, the first levels open."""
    body = "".join(_details(row, depth=0) for row in _rows(catalogue, name))
    return f'<div style="font-family: monospace; line-height: 1.5">{body}</div>'


def source(known: Source) -> str:
    """The text of a function, with the operations beside the lines that they are on."""
    width = max((len(_mark(each)) for each in known.operations.values()), default=0)
    beside: dict[int, list[str]] = {}
    for operation in known.operations.values():
        beside.setdefault(operation.line, []).append(_mark(operation))
    lines = []
    for number, line in enumerate(known.text.rstrip().split("\n"), start=1):
        first, *more = beside.get(number, [""])
        lines.append(f"{first:<{width}} {'->' if first else '  '} {number:>3} {line}".rstrip())
        lines += [f"{each:<{width}} ->   +" for each in more]
    marks = [_mark(each) for each in known.operations.values()]
    if any(mark.endswith("]") for mark in marks):
        lines.append("name[n]: it may run several times, and [0] is the first")
    if any(mark.startswith("(") for mark in marks):
        lines.append("(name): a forward pass does not come by")
    return "\n".join(lines)


def operation(known: Source, name: str) -> str:
    """The lines around an operation, and the tensors that it takes and returns."""
    found, text = known.operations[name], known.text.rstrip().split("\n")
    lines = [f"{_mark(found)}, in {known.function}"]
    for number in range(max(found.line - 3, 1), min(found.line + 3, len(text)) + 1):
        lines.append(f"{'-->' if number == found.line else '   '} {number:>3} {text[number - 1]}".rstrip())
    for leaf in found.leaves:
        way = "".join(f"[{step!r}]" for step in leaf.path)
        lines.append(f"{leaf.side}{way} {leaf.symbolic}")
    return "\n".join(lines)


def _mark(operation: Operation) -> str:
    if operation.runs == Dim(Axis.CONSTANT, 0):
        return f"({operation.name})"
    return f"{operation.name}[n]" if operation.repeated else operation.name


def lines_html(lines: Iterable[str]) -> str:
    """Lines of text, for a notebook."""
    body = escaping.escape("\n".join(lines).strip())
    return f'<pre style="font-family: monospace">{body}</pre>' if body else ""


def _rows(catalogue: Catalogue, name: str) -> list[_Row]:
    raw = catalogue.raw(name) if name else ""
    if raw is not None:
        return [_row(catalogue, raw, spell(name) if name else catalogue.model)]
    keys = catalogue.prefixes.get(name, [])
    raws = [catalogue.names[f"{name}.{key}"].module for key in keys if f"{name}.{key}" in catalogue.names]
    return [
        _row(catalogue, same[0], _label(name, keys, start, len(same)), alike=len(same) > 1)
        for start, same in _runs(catalogue, raws)
    ]


def _label(name: str, keys: list[str], start: int, count: int) -> str:
    if count == 1:
        return f"{spell(name)}[{keys[start]}]"
    return f"{spell(name)}[{keys[start]}…{keys[start + count - 1]}] ({count} alike)"


def _row(catalogue: Catalogue, path: str, label: str, *, alike: bool = False) -> _Row:
    module = catalogue.modules[path]
    row = _Row(label, module.class_name, _output(module), _parameters(module), _canonical(catalogue, path, alike))
    names = catalogue.children[path]
    paths = [f"{path}.{name}" if path else name for name in names]
    for start, same in _runs(catalogue, paths):
        name = names[start] if len(same) == 1 else f"{names[start]}…{names[start + len(same) - 1]} ({len(same)} alike)"
        row.children.append(_row(catalogue, same[0], name, alike=alike or len(same) > 1))
    return row


def _runs(catalogue: Catalogue, paths: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Neighbours that look the same, as (position of the first, paths)."""
    start = 0
    while start < len(paths):
        end = start + 1
        numbered = paths[start].rpartition(".")[2].isdigit()
        shape = _shape(catalogue, paths[start]) if numbered else None
        while numbered and end < len(paths) and _shape(catalogue, paths[end]) == shape:
            end += 1
        yield start, paths[start:end]
        start = end


def _shape(catalogue: Catalogue, path: str) -> tuple[object, ...]:
    module = catalogue.modules[path]
    children = tuple((name, _shape(catalogue, f"{path}.{name}")) for name in catalogue.children[path])
    return (module.class_name, tuple((each.name, each.shape) for each in module.parameters), children)


def _output(module: Module) -> str:
    leaves = module.side("output")
    if not leaves:
        return "" if module.calls or module.class_name == "ModuleList" else "(not called)"
    if leaves[0].path == ():
        return leaves[0].symbolic
    return "(" + ", ".join(f"{leaf.path[0]}: {leaf.symbolic}" for leaf in leaves if len(leaf.path) == 1) + ")"


def _parameters(module: Module) -> str:
    return " ".join(f"{each.name}{list(each.shape)}" for each in module.parameters)


def _canonical(catalogue: Catalogue, path: str, alike: bool) -> str:
    names = [each.name for each in catalogue.names.values() if each.module == path]
    typed = ", ".join(spell(name) for name in names)
    return re.sub(r"layers\[\d+\]", "layers[i]", typed) if alike else typed


def _lines(row: _Row, indent: str = "") -> Iterator[tuple[str, str]]:
    right = "  ".join(part for part in (row.output, row.parameters, row.canonical and f"= {row.canonical}") if part)
    yield f"{indent}{row.label}: {row.class_name}", right
    for child in row.children:
        yield from _lines(child, indent + "  ")


def _details(row: _Row, depth: int) -> str:
    def span(value: str, colour: str) -> str:
        return f' <span style="color: {colour}">{escaping.escape(value)}</span>' if value else ""

    line = (
        f"<b>{escaping.escape(row.label)}</b>: {escaping.escape(row.class_name)}"
        + span(row.output, "#2a7")
        + span(row.parameters, "#888")
        + span(row.canonical and f"= {row.canonical}", "#47c")
    )
    if not row.children:
        return f'<div style="margin-left: {0 if depth == 0 else 1.5}em">{line}</div>'
    inside = "".join(_details(child, depth + 1) for child in row.children)
    return (
        f'<details {"open" if depth < 3 else ""} style="margin-left: {0 if depth == 0 else 1}em">'
        f"<summary>{line}</summary>{inside}</details>"
    )
