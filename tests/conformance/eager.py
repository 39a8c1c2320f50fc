"""The same programs without Patchwire: real tensors, PyTorch's own memory, hooks that wait.

`EagerModel` has the names of `patchwire.Model` that the programs of these tests use. A forward pass runs in a greenlet;
asking for a site lets it run until that site's hook, which hands out copies of the tensors there; when the program goes
on to a later site, the hook returns what has become of them. So a program must ask for sites in the order of the
forward pass, and change a site's value only before it asks for the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from greenlet import greenlet
from torch import Tensor, nn

from conformance import hooks
from conformance.places import PARTS


class EagerModel:
    """A Hugging Face model, with the proxies' names."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self._module = module
        self._parts = PARTS[name]
        self._run: _Run | _Everyone | None = None
        self._held: list[_Run] | None = None
        self.num_layers = module.config.num_hidden_layers

    @property
    def layers(self) -> list[EagerModule]:
        return [self._named("layer", index) for index in range(self.num_layers)]

    def __getattr__(self, name: str) -> EagerModule:
        return self._named(name)

    def _named(self, part: str, index: int = 0) -> EagerModule:
        return EagerModule(self, self._parts[part].format(index), part, index)

    def module(self, path: str) -> EagerModule:
        return EagerModule(self, path)

    @property
    def logits(self) -> Tensor:
        return self.run.at("", "output")["logits",]

    @logits.setter
    def logits(self, value: Tensor) -> None:
        self.run.at("", "output")["logits",] = value

    @property
    def run(self) -> Any:
        assert self._run is not None
        return self._run

    @contextlib.contextmanager
    def trace(self, prompt: Sequence[int] | None = None, *, together: bool = False) -> Iterator[EagerModel]:
        """One call of the model.

        Args:
            prompt: What it is called with; left out if there are invokes.
            together: Whether an invoke without a prompt follows them. Then each invoke's forward pass waits at the last
                site that was asked for there, and the last invoke goes on with all of them.
        """
        with torch.no_grad(), contextlib.nullcontext() if prompt is None else self.invoke(prompt):
            self._held = [] if together else None
            try:
                yield self
                for run in self._held or ():
                    run.finish()
            finally:
                for run in self._held or ():
                    run.close()
                self._held = None

    @contextlib.contextmanager
    def invoke(self, prompt: Sequence[int] | None = None) -> Iterator[None]:
        if self._held is not None:
            everyone = _Everyone(self._held)
            if prompt is not None:
                self._held.append(_Run(self._module, prompt))
            self._run = everyone if prompt is None else self._held[-1]
            yield
            everyone.give_back()
            self._run = None
            return
        assert prompt is not None
        self._run = _Run(self._module, prompt)
        try:
            yield
            self._run.finish()
        finally:
            self._run.close()
            self._run = None


class EagerModule:
    """A module, with the proxies' names."""

    def __init__(self, model: EagerModel, path: str, part: str = "", index: int = 0) -> None:
        self._model, self._path, self._part, self._index = model, path, part, index

    @property
    def mixer(self) -> EagerModule:
        return self._model._named("mixer", self._index)

    @property
    def mlp(self) -> EagerModule:
        return self._model._named("mlp", self._index)

    def _first(self, side: str) -> tuple[dict[tuple[Any, ...], Tensor], tuple[Any, ...]]:
        tensors = self._model.run.at(self._path, side)
        return tensors, next(iter(tensors))

    @property
    def output(self) -> Any:
        tensors, first = self._first("output")
        return tensors[first] if self._part or first == () else Items(tensors)

    @output.setter
    def output(self, value: Tensor) -> None:
        tensors, first = self._first("output")
        tensors[first] = value

    @property
    def input(self) -> Tensor:
        tensors, first = self._first("input")
        return tensors[first]

    @input.setter
    def input(self, value: Tensor) -> None:
        tensors, first = self._first("input")
        tensors[first] = value

    def __call__(self, value: Tensor) -> Tensor:
        with self._model.run.unseen():
            return self._model._module.get_submodule(self._path)(value)


class Items:
    """A tuple of tensors at a site."""

    def __init__(self, tensors: dict[tuple[Any, ...], Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, index: int) -> Tensor:
        return self._tensors[index,]

    def __setitem__(self, index: int, value: Tensor) -> None:
        self._tensors[index,] = value


class _Run:
    """One forward pass, which stops wherever the program wants to look."""

    def __init__(self, module: nn.Module, prompt: Sequence[int]) -> None:
        self._module = module
        self._prompt = prompt
        self._wanted: tuple[str, str] | None = None
        self._found: dict[tuple[str, str], dict[tuple[Any, ...], Tensor]] = {}
        self._unseen = False
        self._program = greenlet.getcurrent()
        self._forward = greenlet(self._go)

    def _go(self) -> None:
        with hooks.hooked(self._module, self._visit):
            hooks.forward(self._module, self._prompt)

    def _visit(self, path: str, side: str, value: Any) -> Any:
        if self._unseen or (path, side) != self._wanted or greenlet.getcurrent() is not self._forward:
            return None if side == "output" else value
        # Contiguous, as every value of a trace is: else `flatten` would be a view in one and a copy in the other.
        contiguous = torch.contiguous_format
        copies = {steps: tensor.clone(memory_format=contiguous) for steps, tensor in hooks.tensors_in(value, side)}
        tensors = self._found[path, side] = dict(copies)
        self._program.switch()
        for steps, tensor in tensors.items():
            if tensor is not copies[steps] or tensor._version:
                value = hooks.with_change(value, side, steps, lambda _, new=tensor: new.clone())
        return value

    def at(self, path: str, side: str) -> dict[tuple[Any, ...], Tensor]:
        """The tensors of a site; the forward pass runs until there."""
        if (path, side) not in self._found:
            self._wanted = (path, side)
            self._forward.switch()
            assert (path, side) in self._found, f"{path}.{side} comes earlier than the last site, or never"
        return self._found[path, side]

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """Modules are called, and no site is."""
        self._unseen = True
        try:
            yield
        finally:
            self._unseen = False

    def finish(self) -> None:
        """Run to the end."""
        self._wanted = None
        if not self._forward.dead:
            self._forward.switch()

    def close(self) -> None:
        """Leave no hooks behind, whatever happened."""
        if not self._forward.dead:
            self._forward.throw()


class _Everyone:
    """The runs of several prompts, which go from site to site together; their rows end together."""

    def __init__(self, runs: Sequence[_Run]) -> None:
        self._runs = runs
        self._site: tuple[str, str] | None = None
        self._copies: dict[tuple[Any, ...], Tensor] = {}
        self._tensors: dict[tuple[Any, ...], Tensor] = {}

    def at(self, path: str, side: str) -> dict[tuple[Any, ...], Tensor]:
        """The tensors of a site, rows and tokens first; the forward passes run until there."""
        if len(self._runs) == 1:  # then it is that prompt's own scope
            return self._runs[0].at(path, side)
        if (path, side) != self._site:
            self.give_back()
            parts = [run.at(path, side) for run in self._runs]
            self._site = (path, side)
            self._copies = {steps: _together([part[steps] for part in parts]) for steps in parts[0]}
            self._tensors = dict(self._copies)
        return self._tensors

    def give_back(self) -> None:
        """Let every run go on with its part of what has become of the tensors."""
        for steps, tensor in self._tensors.items():
            if tensor is self._copies[steps] and not tensor._version:
                continue
            assert self._site is not None
            start = 0
            for run in self._runs:
                own = run.at(*self._site)
                rows, length = own[steps].shape[:2]
                own[steps] = tensor[start : start + rows, tensor.shape[1] - length :].clone()
                start += rows
        self._tensors = {}


def _together(parts: Sequence[Tensor]) -> Tensor:
    longest = max(each.shape[1] for each in parts)
    padded = []
    for each in parts:
        filler = float("nan") if each.is_floating_point() else 0
        padded.append(
            torch.cat([each.new_full((len(each), longest - each.shape[1], *each.shape[2:]), filler), each], 1)
        )
    return torch.cat(padded)


Results = dict[str, Any]
Program = Callable[[Any], Results]
"""Takes a model, eager or not, inside a trace, and gives the values to compare, by name."""


def assert_program_agrees(
    program: Program, model: Any, reference: EagerModel, prompt: Sequence[int], *, tolerance: float = 1e-5
) -> None:
    """A program gives the same numbers in a trace and on real tensors."""
    with reference.trace(prompt):
        expected = program(reference)
    with model.trace(prompt):
        found = {name: value.save() for name, value in program(model).items()}
    compare(found, expected, tolerance)


def assert_invokes_agree(
    program: Callable[[Any, Any], Results], model: Any, reference: EagerModel, *, tolerance: float = 1e-5
) -> None:
    """The same for a program that opens its own invokes: it takes the model and the trace."""
    with reference.trace() as trace:
        expected = program(reference, trace)
    with model.trace() as trace:
        found = {name: value.save() for name, value in program(model, trace).items()}
    compare(found, expected, tolerance)


def compare(found: Results, expected: Results, tolerance: float) -> None:
    """Every value is the same."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        hooks.assert_same(value.value, torch.as_tensor(expected[name]), name, tolerance=tolerance)
