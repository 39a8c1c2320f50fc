"""Modules of the user's own that are set on a model's: `model.transformer.h[0].sae = module`.

They run where the block is written: applied to values, each of their operations becomes part of the graph, and their
weights are sent with it. What their parts return is kept for as long as the block is recorded.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from patchwire.errors import GraphError, SiteError, here
from patchwire.proxy import values_in


class Attached:
    """A module of the user's own, or a part of one: it can be applied to values, and says what it returned last."""

    def __init__(self, module: nn.Module, name: str, seen: dict[nn.Module, tuple[Any, Any]] | None = None) -> None:
        self._module = module
        self._name = name
        self._seen = {} if seen is None else seen

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        """Apply it; with `hook`, remember what its parts take and return."""
        hooks = [each.register_forward_hook(self._see, with_kwargs=True) for each in self._module.modules() if hook]
        try:
            return self._module(*args, **kwargs)
        finally:
            for each in hooks:
                each.remove()

    def _see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._seen[module] = ((args, kwargs), output)

    def _last(self, which: str) -> tuple[Any, Any]:
        found = self._seen.get(self._module)
        if found is None or any(not each.ready and not each.recorder.open for each in values_in(found)):
            raise GraphError(
                f"`{self._name}` was not applied in this block, so it has no `{which}`.",
                hint=f"Write `{self._name}(value, hook=True)` above.",
                lines=here(),
            )
        return found

    @property
    def output(self) -> Any:
        """What it returned last."""
        return self._last("output")[1]

    @output.setter
    def output(self, value: Any) -> None:
        raise SiteError(
            f"`{self._name}` has run already: its output cannot be replaced by assigning it.",
            hint="Edit the value that the call returned, or use another value in its place.",
            lines=here(),
        )

    @property
    def inputs(self) -> Any:
        """What it was called with last: `(args, kwargs)`."""
        return self._last("inputs")[0]

    @property
    def input(self) -> Any:
        """Its first argument."""
        args, kwargs = self.inputs
        return next(iter((*args, *kwargs.values())))

    def __getattr__(self, name: str) -> Any:
        part = getattr(self._module, name)
        return Attached(part, f"{self._name}.{name}", self._seen) if isinstance(part, nn.Module) else part

    def __getitem__(self, index: int) -> Attached:
        return Attached(self._module[index], f"{self._name}[{index}]", self._seen)  # type: ignore[index]

    def __repr__(self) -> str:
        return repr(self._module)
