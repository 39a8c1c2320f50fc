"""Patchwire with the products of matrices that all others have: PyTorch's usual ones."""

from __future__ import annotations

from libraries import patchwire


class Library(patchwire.Library):
    """See `tasks.Library`."""

    options = ("--matmul", "pytorch")
