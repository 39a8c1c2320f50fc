"""Caches: many values of a trace at once, by the addresses of their sites.

    with model.trace("…") as trace:
        cache = trace.cache(["layers.*.mixer", model.norm])
    cache["layers.3.mixer.output"]

What a cache holds is what the site holds when the block ends: edits are in it, those written later in the block too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from patchwire.checking import describe
from patchwire.errors import BranchError, SiteError, here, nearest
from patchwire.proxy import Value


class Cache(Mapping[str, Value]):
    """Saved values by address: after the block, each behaves as its tensor.

    The addresses are known at once, in the order of the selection.
    """

    def __init__(self, sites: Mapping[str, Callable[[], Value]], dtype: torch.dtype | None) -> None:
        self._sites = sites
        self._dtype = dtype
        self._values: dict[str, Value] = {}
        for read in sites.values():
            read()  # so that what is wrong with it is found at this line

    def now(self) -> list[Value]:
        """What the sites hold now, in the block."""
        return [read() for read in self._sites.values()]

    def close(self) -> None:
        """Save what the sites hold now: the block has ended."""
        for name, read in self._sites.items():
            self._values[name] = read().save(dtype=self._dtype)

    def __getitem__(self, address: str) -> Value:
        if address not in self._sites:
            near = nearest(address, self._sites) or list(self._sites)[:6]
            raise _NotCached(
                f"`{address}` is not in this cache.",
                hint=f"It has {', '.join(f'`{each}`' for each in near)}.",
                lines=here(),
            )
        if address not in self._values:
            raise BranchError(
                "A cache is filled when the block has ended.",
                hint="Read the site itself inside the block: `model.layers[3].output`.",
                lines=here(),
            )
        return self._values[address]

    def __contains__(self, address: object) -> bool:
        return address in self._sites

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __repr__(self) -> str:
        looks = (_look(self._values[each]) if each in self._values else "…" for each in self._sites)
        return "\n".join(f"{name}: {look}" for name, look in zip(self._sites, looks, strict=True))


def _look(value: Value) -> str:
    """Shape and dtype, for the numbers of all sites would fill the screen; what is not here says why."""
    return describe(value.value) if value.ready and isinstance(value.value, torch.Tensor) else repr(value)


class _NotCached(SiteError, KeyError):
    """An address that a cache does not have; also a KeyError, so that `get` works."""

    def __reduce__(self) -> tuple[object, ...]:
        return SiteError(self.message, hint=self.hint, lines=self.lines).__reduce__()


_NotCached.__name__ = _NotCached.__qualname__ = "SiteError"  # what the user sees
_NotCached.__module__ = SiteError.__module__
