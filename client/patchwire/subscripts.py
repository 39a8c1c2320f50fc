"""Telling an index from a list of indices.

Asked for `tensor[index]`, PyTorch takes every short sequence apart, with a warning, before it asks whether the index
knows better. A value, which has a length and items as any tensor does, would be such a sequence. It is none if it has
no length at that moment: then PyTorch hands the whole indexing to it.
"""

from __future__ import annotations

import dis
import sys

_SUBSCRIPTS = frozenset({"BINARY_SUBSCR", "STORE_SUBSCR", "BINARY_OP"})
"""What Python does for `a[b]` and `a[b] = c`; since 3.14 the first is an operator like others."""


def in_subscript() -> bool:
    """Whether the program is at `a[b]`, and not at a call: to be asked by a method of `b`, at its beginning."""
    program = sys._getframe(2)
    return dis.opname[program.f_code.co_code[program.f_lasti]] in _SUBSCRIPTS
