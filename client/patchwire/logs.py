"""Logs: what values look like as text, made where they are and printed where the program runs.

A log is a few texts and values. The worker makes one bounded text of it as soon as all values exist: a small tensor in
full, a large one as PyTorch's own `repr` abbreviates it. It comes back as an event while the pass goes on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

from torch import Tensor

from patchwire.errors import SourceLine

MAX_LENGTH = 1 << 14
"""How many characters the text of one log has at most."""

MAX_TOTAL = 1 << 22
"""How many characters all logs of a request have at most."""

_FULL = 1000
_EDGES = 6
_MAX_SHOWN = 4096


def to_text(parts: Iterable[str | Tensor]) -> str:
    """One text of texts and tensors, cut to `MAX_LENGTH` characters."""
    text = ""
    for part in parts:
        each = _look(part) if isinstance(part, Tensor) else part
        # A tensor's lines are aligned with its first.
        text += ("\n" if "\n" in each else " ") + each if text else each
        if len(text) > MAX_LENGTH:
            return f"{text[: MAX_LENGTH - 1]}…"
    return text


def _look(tensor: Tensor) -> str:
    tensor = tensor.detach().cpu()
    # PyTorch shows so many of each dimension's, which becomes much where there are many dimensions.
    shown = math.prod(min(length, _EDGES) for length in tensor.shape)
    if tensor.numel() > _FULL and shown > _MAX_SHOWN:
        return f"{tensor.flatten()!r} of shape {list(tensor.shape)}"
    return repr(tensor)


def printed(text: str, line: SourceLine | None) -> str:
    """What is printed: the user's line and the text, without what a terminal would obey."""
    clean = "".join(each if each.isprintable() or each in "\n\t" else "�" for each in text[:MAX_LENGTH])
    if line is None:
        return clean
    between = "\n" if "\n" in clean else "  "
    return f"{os.path.basename(line.file)}:{line.line}{between}{clean}"
