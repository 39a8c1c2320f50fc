"""The catalogue of errors, read from the code: every error that Patchwire raises in words of its own.

`python docs/catalogue.py` writes `errors.md` beside this file. The test suite checks that it is up to date, that every
error in it is raised by a test, and that those of a block name the user's line.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from patchwire import errors

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (_ROOT / "client" / "patchwire", _ROOT / "worker" / "patchwire_worker")
PAGE = Path(__file__).with_name("errors.md")
_GAP = "…"

_ROOMS_OF_A_BLOCK = frozenset(["checking", "editing", "executor", "model", "proxy", "recording", "session", "tracing"])

Function = ast.FunctionDef | ast.AsyncFunctionDef

KINDS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.PatchwireError) and kind is not errors.PatchwireError
}
"""The classes of errors, by name, in the order of their module."""


@dataclass(frozen=True)
class Entry:
    """One error, as the code words it; "…" stands for what depends on the case."""

    kind: str
    message: str
    hint: str
    room: str
    """The file that words it."""

    @property
    def in_a_block(self) -> bool:
        """Whether it is about a line of the user's program, and says which."""
        return self.room in _ROOMS_OF_A_BLOCK

    def matches(self, message: str) -> bool:
        """Whether a message is this error's."""
        return re.fullmatch(".*".join(map(re.escape, self.message.split(_GAP))), message, re.DOTALL) is not None


def entries() -> list[Entry]:
    """Every error that the code raises in words of its own."""
    found: dict[tuple[str, str], Entry] = {}
    for package in _PACKAGES:
        for file in sorted(package.rglob("*.py")):
            if file.parent.name != "v1":
                for each in _entries(file):
                    found.setdefault((each.kind, each.message), each)
    return list(found.values())


def _entries(file: Path) -> Iterator[Entry]:
    tree = ast.parse(file.read_text())
    functions = [each for each in ast.walk(tree) if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        assigned = _assigned(functions, node)
        kind = _kind(node)
        if kind is None or not node.args:
            continue
        keywords = {each.arg: each.value for each in node.keywords}
        for message in _texts(node.args[0], assigned):
            hints = list(_texts(keywords["hint"], assigned)) if "hint" in keywords else [""]
            yield Entry(kind, message, hints[0] if hints else "", file.stem)


def _assigned(functions: list[Function], call: ast.Call) -> dict[str, ast.expr]:
    """What names stand for where a call is made: the last assignments before it in its function."""
    around = [each for each in functions if each.lineno <= call.lineno <= (each.end_lineno or 0)]
    if not around:
        return {}
    innermost = max(around, key=lambda each: each.lineno)
    return {
        target.id: node.value
        for node in sorted((each for each in ast.walk(innermost) if isinstance(each, ast.Assign)), key=_line)
        if node.lineno < call.lineno
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _line(node: ast.Assign) -> int:
    return node.lineno


def _kind(call: ast.Call) -> str | None:
    if isinstance(call.func, ast.Name) and call.func.id in KINDS:
        return call.func.id
    if ast.unparse(call.func) == "self.error":  # of a decoder
        given = [each.id for each in call.args[1:2] if isinstance(each, ast.Name)]
        return given[0] if given and given[0] in KINDS else "GraphError"
    return None


def _texts(node: ast.expr, assigned: dict[str, ast.expr]) -> Iterator[str]:
    """The texts that an expression may be."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=parts):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else _GAP for part in parts)
            yield re.sub(f"{_GAP}+", _GAP, text)
        case ast.IfExp(body=one, orelse=other):
            yield from _texts(one, assigned)
            yield from _texts(other, assigned)
        case ast.Name(id=name) if name in assigned:
            yield from _texts(assigned[name], {})


def page() -> str:
    """The catalogue as a page."""
    everything = entries()
    parts = [
        "# Errors",
        "<!-- Written by docs/catalogue.py. -->",
        "Every error says what happened, at which line of your program, and what to write instead. All classes are in "
        f"`patchwire` and derive from `patchwire.PatchwireError`. {_GAP} stands for what depends on the case.",
    ]
    for name, kind in KINDS.items():
        own = [each for each in everything if each.kind == name]
        parts += [f"## {name}", str(kind.__doc__)]
        if own:
            parts.append("\n".join(f"- {each.message}" + (f"<br>→ {each.hint}" if each.hint else "") for each in own))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
