"""What an error has to say: its class, its words, the user's own line, and what to write instead.

The statement that is wrong carries the comment `# this line`, and `# and this line` a second one that has to be named.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from patchwire.errors import PatchwireError

THIS, AND_THIS = "# this line", "# and this line"


@dataclass
class Refusal:
    """An error that is about to come."""

    error: PatchwireError | None = None


@contextlib.contextmanager
def refused(kind: type[PatchwireError], *says: str, hint: str | None = None, line: bool = True) -> Iterator[Refusal]:
    """The block under this fails with an error that is clear.

    Args:
        kind: Its class, exactly.
        says: Regular expressions that are found in what happened.
        hint: A regular expression that is found in what to write instead; by default there only is one.
        line: Whether it names the line that carries the comment.
    """
    frame = sys._getframe(2)
    file, start = frame.f_code.co_filename, frame.f_lineno
    refusal = Refusal()
    with pytest.raises(PatchwireError) as caught:
        yield refusal
    error = refusal.error = caught.value
    text = str(error)
    assert type(error) is kind or kind in type(error).__bases__, text
    for each in says:
        assert re.search(each, error.message), f"{each!r} is not in:\n{text}"
    assert error.hint, f"nothing says what to write instead:\n{text}"
    assert re.search(hint or "", error.hint), f"{hint!r} is not in:\n{text}"
    for of_the_inside in ("Traceback", "patchwire_worker", "site-packages", "grpc", "_InactiveRpcError", "meta"):
        assert of_the_inside not in text, text
    if line:
        assert_names(error, file, *marked(file, start))


def marked(file: str, start: int) -> list[int]:
    """The numbers of the next line with `# this line`, and of the one with `# and this line` near it."""
    code = Path(file).read_text().splitlines()
    first = next(number for number, each in enumerate(code, 1) if number >= start and each.endswith(THIS))
    near = [number for number, each in enumerate(code[:first], 1) if number >= start and each.endswith(AND_THIS)]
    return [first, *near]


def assert_names(error: PatchwireError, file: str, *numbers: int) -> None:
    """The error's lines are these, in its text too."""
    code = Path(file).read_text().splitlines()
    assert [(each.file, each.line) for each in error.lines] == [(file, number) for number in numbers], str(error)
    for number in numbers:
        assert f"{Path(file).name}:{number}    {code[number - 1].strip()}" in str(error)
