"""`tracer.cache()`: what many modules return and take, by their paths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from patchwire.errors import GraphError, here
from patchwire.model import Module
from patchwire.nnsight.values import TensorRecorder
from patchwire.proxy import Value, values_in
from patchwire.sites import INPUT, OUTPUT
from patchwire.tracing import scope_now

if TYPE_CHECKING:
    from patchwire.nnsight.model import Envoy, LanguageModel

ROOT = "model"
"""What the paths in a cache start with."""


@dataclass
class Entry:
    """One call of a module."""

    output: Any = None
    inputs: Any = None

    @property
    def input(self) -> Any:
        """Its first argument."""
        if self.inputs is None:
            return None
        args, kwargs = self.inputs
        return next(iter((*args, *kwargs.values())), None)


class Cache:
    """What was recorded, by the raw path of the module, one entry for each step."""

    def __init__(
        self,
        model: LanguageModel,
        modules: list[Envoy] | None,
        dtype: torch.dtype | None,
        include_output: bool,
        include_inputs: bool,
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.sides = {OUTPUT: include_output, INPUT: include_inputs}
        called = [path for path, each in model.catalogue.modules.items() if each.calls and each.leaves]
        self.paths = called if modules is None else [each.path for each in modules]
        self._entries: dict[str, list[Entry]] = {}

    def record(self) -> None:
        """Read and save the modules' sides in the scope that user code is in."""
        scope = scope_now()
        assert scope is not None
        assert isinstance(scope.recorder, TensorRecorder)
        for path in self.paths:
            if scope.recorder.left_out(scope.trace, scope.invoke, scope.step, path):
                continue
            module, entry = self.model.module_of(path), Entry()
            known = self.model.catalogue.modules[path]
            if self.sides[OUTPUT] and known.side(OUTPUT):
                entry.output = self._saved(module.output)
            if self.sides[INPUT]:
                entry.inputs = self._saved(module.inputs) if known.side(INPUT) else ((), {})
            self._entries.setdefault(path, []).append(entry)

    def _saved(self, value: Any) -> Any:
        if isinstance(value, Value):
            return value.save(dtype=self.dtype)
        if isinstance(value, tuple):
            return tuple(self._saved(each) for each in value)
        if isinstance(value, dict):
            return type(value)({key: self._saved(each) for key, each in value.items()})
        return value

    def entries(self) -> dict[str, list[Entry]]:
        """What there is; steps that the generation did not reach have no entries.

        Raises:
            GraphError: the block has not ended, or its run failed.
        """
        if not self._entries:
            raise GraphError("A cache is filled when its block has ended.", hint="Read it after it.", lines=here())
        return {path: [each for each in found if not self._absent(each)] for path, found in self._entries.items()}

    @staticmethod
    def _absent(entry: Entry) -> bool:
        return any(each._absent for each in values_in((entry.output, entry.inputs)))


class CacheView:
    """A cache, or the part of it under a module: `cache["model.transformer.h.0"].output`, `cache.model.lm_head.output`.

    The paths are those of the modules, and of their other names. Under a module, `output`, `inputs` and `input` are
    what it returned and took; a list with one for each step if there were several, `len` of them.
    """

    def __init__(self, cache: Cache, module: Envoy | None = None) -> None:
        self._cache = cache
        self._module = module

    def keys(self) -> list[str]:
        """The paths of the modules here."""
        here_now = None if self._module is None else self._module.path
        return [
            f"{ROOT}.{path}" if path else ROOT
            for path in self._cache.entries()
            if not here_now or path == here_now or path.startswith(f"{here_now}.")
        ]

    def _own(self) -> list[Entry]:
        if self._module is None or self._module.path not in self._cache.entries():
            raise KeyError(f"{'The whole' if self._module is None else self._module.path} is not a cached module.")
        return self._cache.entries()[self._module.path]

    def _values(self, name: str) -> Any:
        values = [getattr(each, name) for each in self._own()]
        return values[0] if len(values) == 1 else values

    @property
    def output(self) -> Any:
        """What the module returned."""
        return self._values("output")

    @property
    def inputs(self) -> Any:
        """What it was called with: `(args, kwargs)`."""
        return self._values("inputs")

    @property
    def input(self) -> Any:
        """Its first argument."""
        return self._values("input")

    def _below(self, name: str) -> CacheView:
        if self._module is None:
            return CacheView(self._cache, self._cache.model) if name == ROOT else self["model"]._below(name)
        child = self._module.find(name)
        if not isinstance(child, Module):
            raise AttributeError(f"`{name}` is not a module here.")
        view = CacheView(self._cache, child)
        if not view.keys():
            raise AttributeError(f"Nothing of `{child.path}` was cached.")
        return view

    def __getattr__(self, name: str) -> CacheView:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._below(name)

    def __getitem__(self, key: str | int) -> CacheView:
        if isinstance(key, int):
            assert self._module is not None
            if not len(self._module):
                raise KeyError(f"`{self._module.path}` is not a list of modules.")
            return CacheView(self._cache, self._module[key])
        view = self
        try:
            for part in key.split("."):
                view = view._below(part)
        except AttributeError as error:
            raise KeyError(key) from error
        return view

    def __contains__(self, key: str) -> bool:
        try:
            module = self[key]._module
        except KeyError:
            return False
        return module is not None and module.path in self._cache.entries()

    def __len__(self) -> int:
        return len(self.keys()) if self._module is None else len(self._own())

    def __repr__(self) -> str:
        return f"<cache of {', '.join(self.keys())}>"
