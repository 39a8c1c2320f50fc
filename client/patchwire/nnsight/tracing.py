"""nnsight's tracers: the blocks of `trace`, `generate`, `scan` and `session`, with its names for what is in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from patchwire import editing, scanning
from patchwire.errors import GraphError, InputError, here
from patchwire.nnsight.cache import Cache, CacheView
from patchwire.nnsight.values import TensorRecorder
from patchwire.proxy import Value
from patchwire.results import Results, Stats
from patchwire.session import Session
from patchwire.tracing import Generation, Scope, Steps, Trace, current, move, within

if TYPE_CHECKING:
    from patchwire.nnsight.model import LanguageModel

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "inputs_embeds")


def prompt(inputs: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """The prompt of a call: its first argument, or a mapping of those that are named; None if there is none.

    Raises:
        InputError: there is something else.
    """
    named = {name: value for name, value in named.items() if value is not None}
    unknown = sorted(set(named) - set(_INPUTS))
    if unknown or len(inputs) > 1 or (inputs and named):
        what = ", ".join(f"`{each}`" for each in unknown) or "more than a prompt"
        raise InputError(
            f"The model's call takes no {what} here.",
            hint=f"Give one prompt, or {', '.join(f'`{each}`' for each in _INPUTS)} by name.",
            lines=here(),
        )
    if named:
        return named
    return inputs[0] if inputs else None


class Iterations:
    """Steps to go through: `for step in tracer.iter[1:3]:`."""

    def __init__(self, steps: Steps, which: int | slice | Sequence[int] = slice(None)) -> None:
        self._steps = steps
        self._which = which
        self._running: Iterator[int] | None = None

    def __getitem__(self, which: int | slice | Sequence[int]) -> Iterations:
        return Iterations(self._steps, which)

    def __iter__(self) -> Iterator[int]:
        return self._steps[self._which]

    def __enter__(self) -> int:
        if self._steps.count(self._which) != 1:
            raise GraphError(
                "A `with` block runs once, and cannot be repeated for several steps.",
                hint="Write `for step in tracer.iter[…]:` instead of `with tracer.iter[…]:`.",
                lines=here(),
            )
        self._running = iter(self)
        return next(self._running)

    def __exit__(self, *_: object) -> None:
        next(iter(self._running or ()), None)


class Tracer(Trace):
    """What `model.trace(…)` gives, and what all other blocks share."""

    _recorder_class = TensorRecorder
    _model: LanguageModel

    def invoke(  # type: ignore[override]
        self, *inputs: Any, **named: Any
    ) -> AbstractContextManager[Trace]:
        """Rows of this trace with their own input; without one, those of all invokes above."""
        return super().invoke(prompt(inputs, named))

    @property
    def inputs(self) -> tuple[tuple[()], dict[str, torch.Tensor]]:
        """What the model is called with in this invoke: no positional arguments, and `input_ids` and `attention_mask`
        `[batch, seq]`, shorter rows padded on the left with 0."""
        scope = current("inputs", self._model)
        if scope.invoke is None or scope.invoke < 0:
            raise GraphError("The inputs are those of an invoke.", hint="Read them in one with a prompt.", lines=here())
        mask = self.mask(scope.invoke)
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        ids[mask] = torch.tensor([each for row in self._trace.invokes[scope.invoke].rows for each in row])
        return (), {"input_ids": ids, "attention_mask": mask.long()}

    @property
    def result(self) -> Any:
        """What the model's call returns."""
        return self._model.output

    @property
    def iter(self) -> Iterations:
        """The steps of a generation; a trace has one."""
        return Iterations(Steps(self, 1))

    def all(self) -> Iterations:
        """All steps."""
        return self.iter[:]

    def next(self, step: int = 1) -> Tracer:
        """From here on, sites are those of so many steps later."""
        move(step)
        return self

    def barrier(self, count: int) -> Callable[[], None]:
        """Nothing: values flow between invokes by themselves."""
        return lambda: None

    def cache(  # type: ignore[override]
        self,
        modules: Sequence[Any] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
        include_output: bool = True,
        include_inputs: bool = False,
        non_blocking: bool = False,
    ) -> CacheView:
        """What modules return or take in this invoke, all writes of the block included.

        Args:
            modules: Modules or their paths; all that are called if left out.
            device: Ignored: tensors arrive on the CPU.
            dtype: The element type to send them in.
            detach: Ignored: what arrives has no graph behind it.
            include_output: Whether to keep what they return.
            include_inputs: Whether to keep what they take.
            non_blocking: Ignored.
        """
        scope = current("cache", self._model)
        chosen = None if modules is None else [self._model.module_of(each) for each in modules]
        cache = Cache(self._model, chosen, dtype, include_output, include_inputs)
        self._kept.append((scope, cache))
        return CacheView(cache)

    @property
    def _kept(self) -> list[tuple[Scope, Cache]]:
        caches: list[tuple[Scope, Cache]] = self.__dict__.setdefault("_kept_caches", [])
        return caches

    def _finish(self) -> None:
        for scope, cache in self._kept:
            with within(Scope(scope.model, scope.recorder, scope.trace, scope.invoke)):
                for _ in self.all():
                    cache.record()
        super()._finish()


class Generator(Tracer, Generation):
    """What `model.generate(…)` gives."""

    @property
    def result(self) -> Value:
        """The token ids that the generation ends with, the prompt's included: `[batch, seq + new]` int64."""
        return self.output

    @property
    def iter(self) -> Iterations:  # type: ignore[override]
        """The steps of the generation: `tracer.iter[2:5]`, `tracer.iter[3]`, `tracer.iter[[0, 2]]`."""
        return Iterations(super(Tracer, self).iter)

    def all(self) -> Iterations:  # type: ignore[override]
        """All steps, as far as the generation goes."""
        return self.iter[:]


class Scan(Tracer, scanning.Scan):
    """What `model.scan(…)` gives: a block that is recorded and not run; what is saved has shapes and dtypes only."""

    def _graph(self) -> None:
        super()._graph()
        mode = FakeTensorMode()
        fakes: list[torch.Tensor | None] = [self._fake(mode, value, dtype) for value, dtype, *_ in self._recorder.saved]
        self._recorder.resolve(Results(Stats(), fakes, [], {}), self._model.connection)

    @staticmethod
    def _fake(mode: FakeTensorMode, value: Value, dtype: torch.dtype | None) -> torch.Tensor:
        known = value._node.meta.get("fake")
        if not isinstance(known, torch.Tensor):
            raise GraphError(
                "The shape of a saved value depends on data, which a scan does not have.",
                hint="Save it in a trace.",
                lines=here(),
            )
        return FakeTensor(mode, known.detach().to(dtype or known.dtype), torch.device("cpu"))


class _EditRecorder(editing.EditRecorder, TensorRecorder):
    """Records an edit, with values that are tensors."""


class Editing(editing.Editing):
    """What `model.edit(…)` gives."""

    _recorder_class = TensorRecorder
    _any_prompt_class = _EditRecorder

    def __init__(self, model: LanguageModel, *, inplace: bool, prompt_only: bool) -> None:
        super().__init__(model, None, prompt_only=prompt_only)
        if inplace:
            self._edited = model


class TensorSession(Session):
    """What `model.session()` gives."""

    _recorder_class = TensorRecorder


class GeneratorOutput:
    """`model.generator`: what a generation makes.

    - `output`: the token ids that it ends with.
    - `streamer.output`: the token ids that the step's pass is over: the prompt's, then the newest of each row.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    @property
    def output(self) -> Value:
        """The token ids that the generation ends with, the prompt's included: `[batch, seq + new]` int64.

        Raises:
            GraphError: the block is no generation.
        """
        scope = current("model.generator.output", self._model)
        if scope.recorder.request.traces[scope.trace].generation is None or scope.invoke is None or scope.invoke < 0:
            raise GraphError(
                "There is no generated text here.",
                hint="Read it in `with model.generate(…)`, in the invoke that it is of.",
                lines=here(),
            )
        return scope.recorder.generated(scope.trace, scope.invoke)

    @property
    def streamer(self) -> _Streamer:
        """What is made step by step."""
        return _Streamer(self._model)


class _Streamer:
    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    @property
    def output(self) -> Value:
        """The token ids `[batch, seq]` of the prompt in step 0, `[batch]` of the newest tokens in a later one."""
        step = current("model.generator.streamer.output", self._model).step
        ids: Value = self._model.input
        return ids if step == 0 else ids[:, -1]  # type: ignore[index]
