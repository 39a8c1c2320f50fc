"""Metering: what a model computes and holds in a run, operation by operation, and what it would in one of any size.

The model runs twice on a few tokens. The operations of the two runs correspond, so that for each tensor that is made it
is known how its bytes grow: with the rows, with the tokens, with their square. Where they do not correspond (a loop
over the tokens, or over the experts that were chosen), the part of the run between two calls of modules is taken as a
whole. A model that pads its rows to chunks of many tokens runs on fakes, for which a long row costs nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from patchwire.errors import first_line
from patchwire.sites import Catalogue
from patchwire_worker.models.costs import ONCE, ROW, TOKEN, Costs, Held, Polynomial, terms

log = logging.getLogger(__name__)

_ROWS = (2, 3)
"""The rows of the two runs; not one, for which some operations are left out."""
_ROWS_OF_CHUNKS = (2, 5)
"""The same, of a model that computes tokens in chunks."""
_CHUNKS_OF_RUNS = (1, 2)
"""How many whole chunks their rows have, and three tokens more: so no two of the terms grow alike."""
_MORE, _SHORT = 3, 4
_LONG = 16
"""The tokens of a chunk from which on a real run would take long."""
_CHUNKS = ("chunk_size", "mamba_chunk_size")

T = TypeVar("T")
Call = Callable[[Tensor, bool], object]
"""Runs the model on token ids, with attention computed step by step or not."""
Remember = Callable[[Tensor], object]
"""Runs the model on token ids: the cache that it gives, or None."""


def meter(
    module: nn.Module,
    catalogue: Catalogue,
    call: Call,
    device: torch.device,
    *,
    stepwise: bool,
    remember: Remember | None,
) -> Costs:
    """What passes of a model cost.

    Args:
        module: The model.
        catalogue: Its layers.
        call: Runs it as a pass does.
        device: Where it is.
        stepwise: Whether it can compute attention step by step, and usually does not.
        remember: Gives its cache, if it has one.
    """
    chunk = _chunk(module)
    lengths = [count * (chunk or _SHORT) + _MORE for count in _CHUNKS_OF_RUNS]
    sizes = list(zip(_ROWS_OF_CHUNKS if chunk else _ROWS, lengths, strict=True))
    embeddings = module.get_input_embeddings()  # type: ignore[operator]
    vocabulary, itemsize = int(embeddings.weight.shape[0]), next(module.parameters()).element_size()

    polynomials = [terms(*size, chunk=chunk) for size in sizes]

    def runs(fakes: bool, run: Callable[[Tensor], T]) -> list[T]:
        found = []
        for size in sizes:
            with FakeTensorMode(allow_non_fake_inputs=True) if fakes else contextlib.nullcontext():
                found.append(run(torch.arange(size[0] * size[1], device=device).reshape(size) % vocabulary))
        return found

    def ledger(fakes: bool, stepwise: bool) -> _Ledger:
        tapes = runs(fakes, lambda ids: _taped(module, catalogue, lambda: call(ids, stepwise)))
        return _Ledger(tapes, polynomials, catalogue.num_layers + 3)

    # Fakes have no numbers, and some models look at theirs.
    for learnt, fakes in (("fakes", True), ("run", False)) if chunk > _LONG else (("run", False),):
        try:
            usual = ledger(fakes, False)
            steps = ledger(fakes, True) if stepwise else usual
            cache = runs(fakes, lambda ids: _cache_bytes(remember(ids))) if remember else [0, 0]
            cached = _fit(polynomials, *cache)
            logits = vocabulary, vocabulary * itemsize
            return Costs(usual.operations, usual.held, steps.held, cached, chunk, *logits, learnt)
        except Exception as error:  # a model fails in whatever way it likes
            log.info("%s: what its passes cost is not seen in a run (%s)", catalogue.model, first_line(error))
    return _guessed(module, catalogue, vocabulary, vocabulary * itemsize)


def _guessed(module: nn.Module, catalogue: Catalogue, vocabulary: int, logit_bytes: int) -> Costs:
    """What the parameters tell: each is multiplied with once for each token, and each row of them gives a number."""
    parts = ["", *catalogue.layers, "", catalogue.raw("lm_head") or ""]
    operations, moments = np.zeros((len(parts), len(ONCE))), np.zeros((len(parts), 2 * len(ONCE)))
    for at, path in enumerate(parts):
        weights = [each for each in module.get_submodule(path).parameters() if each.ndim > 1] if path else []
        operations[at] = TOKEN * sum(2 * each.numel() for each in weights)
        made = TOKEN * sum(each.element_size() * each.shape[0] for each in weights)
        moments[at] = np.concatenate([0 * made, made] if at == len(parts) - 1 else [made, 0 * made])
    held = Held(moments, range(len(parts) + 1))
    return Costs(operations, held, held, 0 * ONCE, 0, vocabulary, logit_bytes, "parameters")


def _cache_bytes(cache: object) -> int:
    """The bytes of a cache: its layers have tensors, or tables of them."""
    kept = tree_leaves([list(vars(layer).values()) for layer in getattr(cache, "layers", ())])
    storages = {id(each.untyped_storage()): each for each in kept if isinstance(each, Tensor)}
    return sum(each.untyped_storage().nbytes() for each in storages.values())


def _chunk(module: nn.Module) -> int:
    """The tokens that its SSMs compute together; 0 if they have no such number."""
    found = [getattr(each, name, None) for each in module.modules() for name in _CHUNKS]
    return max((each for each in found if isinstance(each, int) and each > 1), default=0)


@dataclass
class _Step:
    """An operation."""

    flops: int
    made: list[tuple[int, int]]
    """The number and the bytes of each storage that it has made."""
    freed: list[int]
    """The storages that were freed before."""


@dataclass
class _Segment:
    """What happens between two calls or returns of modules, or, if that does not correspond, in a part of the model."""

    part: int
    steps: list[_Step] = field(default_factory=list)

    @property
    def shape(self) -> list[int]:
        """How many storages each operation makes."""
        return [len(step.made) for step in self.steps]


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation of a run: what it computes, what it makes, and what is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.segments = [_Segment(0)]
        self._made = 0
        self._freed: list[int] = []
        self._known: dict[int, weakref.ref[Any]] = {}

    def begin(self, part: int | None = None) -> None:
        """A module is called, or returns."""
        self.segments.append(_Segment(self.segments[-1].part if part is None else part))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = []
        if not (func.is_view or func._schema.is_mutable):  # these return what there was before
            for each in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(each, Tensor) and (number := self._note(each)) is not None:
                    made.append((number, each.untyped_storage().nbytes()))
        self.segments[-1].steps.append(_Step(_flops(func, args, kwargs, result), made, self._freed))
        self._freed = []
        return result

    def _note(self, tensor: Tensor) -> int | None:
        """Remember a tensor's storage; its number if it was not known."""
        if tensor.layout is not torch.strided:
            return None
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return None
        self._made = number = self._made + 1

        def gone(_: object) -> None:
            del self._known[key]
            self._freed.append(number)

        self._known[key] = weakref.ref(storage, gone)
        return number


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    packet = func._overloadpacket
    known = flop_registry.get(packet)
    if known is not None:
        return int(known(*args, **kwargs, out_val=result))
    name = str(packet)
    if name == "aten._scaled_dot_product_flash_attention_for_cpu":
        return int(sdpa_flop_count(*(each.shape for each in args[:3])))  # type: ignore[no-untyped-call]
    if name == "aten._grouped_mm":  # rows that are sorted by the expert that they go to
        return 2 * int(args[0].numel()) * int(args[1].shape[-1])
    return 0


def _taped(module: nn.Module, catalogue: Catalogue, call: Callable[[], object]) -> _Tape:
    tape = _Tape()
    with torch.no_grad(), _telling(module, catalogue, tape), tape:
        call()
    return tape


@contextlib.contextmanager
def _telling(module: nn.Module, catalogue: Catalogue, tape: _Tape) -> Iterator[None]:
    """Have a tape be told when modules are called, and which part of the model that begins."""
    layers = {path: number for number, path in enumerate(catalogue.layers, start=1)}
    last = catalogue.layers[-1] if layers else None
    head = catalogue.raw("lm_head")
    after = len(layers) + 1
    handles = []
    for path, each in module.named_modules():
        enters = after + 1 if path == head else layers.get(path)
        leaves = after if path == last else None
        handles.append(each.register_forward_pre_hook(lambda *_, part=enters: tape.begin(part)))
        handles.append(each.register_forward_hook(lambda *_, part=leaves: tape.begin(part)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _corresponding(tapes: Sequence[_Tape]) -> Iterator[tuple[_Segment, _Segment]]:
    """The segments of two runs; those of a part of the model as one where they do not correspond."""
    groups = ([list(part) for _, part in groupby(tape.segments, lambda each: each.part)] for tape in tapes)
    for first, second in zip(*groups, strict=True):
        if len(first) == len(second):
            yield from zip(first, second, strict=True)
        else:
            yield _joined(first), _joined(second)


def _joined(segments: Iterable[_Segment]) -> _Segment:
    known = list(segments)
    return _Segment(known[0].part, [step for each in known for step in each.steps])


class _Ledger:
    """Keeps count of what is held, as polynomials, through the operations of two runs."""

    def __init__(self, tapes: Sequence[_Tape], sizes: Sequence[Polynomial], count: int) -> None:
        """
        Args:
            tapes: The two runs.
            sizes: The terms of each.
            count: How many parts the model has.
        """
        self.operations = np.zeros((count, len(ONCE)))
        """`[part, term]`: what is computed."""
        self._sizes = sizes
        self._now = np.zeros(2 * len(ONCE))
        self._storages: dict[int, Polynomial] = {}
        self._moments: list[list[Polynomial]] = [[] for _ in range(count)]
        for segments in _corresponding(tapes):
            same = segments[0].shape == segments[1].shape
            (self._each if same else self._whole)(*segments)

    @property
    def held(self) -> Held:
        """What is held at the moments that matter."""
        moments = [_most(each) for each in self._moments]
        return Held(np.concatenate(moments), [0, *itertools.accumulate(map(len, moments))])

    def _each(self, one: _Segment, other: _Segment) -> None:
        """Operations that correspond."""
        for first, second in zip(one.steps, other.steps, strict=True):
            self._free(first.freed)
            self.operations[one.part] += _fit(self._sizes, first.flops, second.flops)
            for (number, bytes_), (_, others) in zip(first.made, second.made, strict=True):
                self._make(number, _fit(self._sizes, bytes_, others), one.part)
            self._moment(one.part)

    def _whole(self, one: _Segment, other: _Segment) -> None:
        """Operations that do not: what they hold at most, and what remains of it."""
        flops, most, left = zip(*map(_summed, (one, other)), strict=True)
        self.operations[one.part] += _fit(self._sizes, *flops)
        self._make(-1, _fit(self._sizes, *most), one.part)
        self._moment(one.part)
        self._free([-1])
        total = [sum(each.values()) for each in left]
        remains = _fit(self._sizes, *total)
        if len(left[0]) == len(left[1]):
            for (number, bytes_), others in zip(left[0].items(), left[1].values(), strict=True):
                self._make(number, _fit(self._sizes, bytes_, others), one.part)
        else:
            for number, bytes_ in left[0].items():
                self._make(number, remains * (bytes_ / max(total[0], 1)), one.part)
        self._free([number for step in one.steps for number in step.freed if number not in left[0]])

    def _make(self, number: int, bytes_: Polynomial, part: int) -> None:
        of_head = part == len(self.operations) - 1
        self._storages[number] = np.concatenate([0 * bytes_, bytes_] if of_head else [bytes_, 0 * bytes_])
        self._now = self._now + self._storages[number]

    def _free(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number in self._storages:
                self._now = self._now - self._storages.pop(number)

    def _moment(self, part: int) -> None:
        self._moments[part].append(self._now)


def _fit(sizes: Sequence[Polynomial], one: float, other: float) -> Polynomial:
    """The term that grows from one run to the other as a number did; if none does, so much for each row and so
    much for each of its tokens."""
    first, second = sizes
    for term, (before, after) in enumerate(zip(first, second, strict=True)):
        if before and one * after == other * before:
            found: Polynomial = 0 * ONCE
            found[term] = one / before
            return found
    rows, tokens = [ROW @ each for each in sizes], [TOKEN @ each for each in sizes]
    shares = one / rows[0], other / rows[1]
    lengths = tokens[0] / rows[0], tokens[1] / rows[1]
    each = (shares[1] - shares[0]) / (lengths[1] - lengths[0])
    rest = shares[0] - each * lengths[0]
    if each < 0 or rest < 0:
        each, rest = max(one / tokens[0], other / tokens[1]), 0
    affine: Polynomial = TOKEN * each + ROW * rest
    return affine


def _summed(segment: _Segment) -> tuple[int, int, dict[int, int]]:
    """The operations of a segment, the most bytes that it holds of what it makes, and what is left of that."""
    held: dict[int, int] = {}
    most = total = 0
    for step in segment.steps:
        total -= sum(held.pop(number, 0) for number in step.freed)
        held |= step.made
        total += sum(bytes_ for _, bytes_ in step.made)
        most = max(most, total)
    return sum(step.flops for step in segment.steps), most, held


def _most(moments: Sequence[Polynomial]) -> Polynomial:
    """Those moments at which the most may be held, for some numbers of rows and tokens."""
    kept: list[Polynomial] = []
    known = np.unique(np.array(moments).reshape(-1, 2 * len(ONCE)).round(6), axis=0)
    for each in known[np.argsort(-known.sum(axis=1))]:
        if not any((each <= other).all() for other in kept):
            kept.append(each)
    return np.array(kept).reshape(-1, known.shape[1])
