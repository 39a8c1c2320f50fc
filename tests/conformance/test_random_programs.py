"""Whatever a program does with sites, views and edits: a trace gives the numbers that PyTorch gives.

Random small programs over one to three prompts, between which values flow, perhaps with an invoke for all rows after
them; and sessions of two such traces, the second of which uses and edits values of the first. A step's numbers choose
among the values and sites that there are, so that every list of steps is a program; what it chooses depends on shapes
alone, and is the same for both. No step jumps where a value crosses a threshold, so that rounding stays rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from conformance import places
from conformance.eager import EagerModel, Results, assert_invokes_agree, compare
from conformance.hooks import Place
from patchwire.sites import Axis

MAX_ELEMENTS = 4000
TOLERANCE = 1e-4

VIEWS: list[Callable[[Any], Any]] = [
    lambda v: v[..., : max(1, v.shape[-1] // 2)],
    lambda v: v[..., ::2],
    lambda v: v[..., -1:],
    lambda v: v[:, -1] if v.ndim > 2 else v,
    lambda v: v[:, 1:] if v.ndim > 2 and v.shape[1] > 1 else v,
    lambda v: v[-1] if v.ndim > 1 else v,
    lambda v: v.transpose(-1, -2) if v.ndim > 1 else v,
    lambda v: v.transpose(0, -1),
    lambda v: v.unsqueeze(1) if v.ndim < 5 else v,
    lambda v: v.squeeze(0) if v.ndim > 1 and v.shape[0] == 1 else v,
    lambda v: v.chunk(2, -1)[-1],
    lambda v: v.split(2, -1)[0],
    lambda v: v.unbind(-1)[0] if v.ndim > 1 else v,
    lambda v: v.narrow(-1, 0, 1),
    lambda v: v.reshape(-1),
    lambda v: v.flatten(1) if v.ndim > 2 else v,
    lambda v: v.contiguous(),
    lambda v: v.unflatten(-1, (2, -1)) if v.shape[-1] % 2 == 0 and v.ndim < 5 else v,
    lambda v: v.float(),
    lambda v: v[..., None, :] if v.ndim < 5 else v,
    lambda v: v.permute(*reversed(range(v.ndim))),
    lambda v: v.movedim(-1, 0),
    lambda v: v.swapaxes(0, -1),
    lambda v: v.mT if v.ndim > 1 else v,
    lambda v: v.diagonal(0, -2, -1) if v.ndim > 1 else v,
    lambda v: v.select(-1, -1) if v.ndim > 1 else v,
    lambda v: v.unfold(-1, 2, 2) if v.shape[-1] > 1 and v.ndim < 5 else v,
    lambda v: v.view_as(v),
    lambda v: v.tensor_split(3, -1)[0],
    lambda v: v.ravel(),
    lambda v: v.squeeze() if v.numel() > 1 else v,
    lambda v: v.detach(),
    lambda v: v.to(v.dtype),
    lambda v: v.type_as(v),
    lambda v: v.T if v.ndim == 2 else v,
]


def edit_set_from(v: Any, w: Any) -> None:
    v[..., 0] = w.mean()


def edit_mask(v: Any, w: Any) -> None:
    v[v > 0.3337] = 0.3337


def edit_mask_scaled(v: Any, w: Any) -> None:
    v[v < 0] *= 0.5


def edit_list(v: Any, w: Any) -> None:
    v[..., [0]] *= 1.5


def edit_flip(v: Any, w: Any) -> None:
    v[:] = v.flip(-1)


def edit_all(v: Any, w: Any) -> None:
    v[...] = 0.125


def edit_add(v: Any, w: Any) -> None:
    v += w.mean()


def edit_scale(v: Any, w: Any) -> None:
    v *= 0.75


def edit_last(v: Any, w: Any) -> None:
    v[..., -1] += 1


def edit_copy(v: Any, w: Any) -> None:
    v.copy_(w.clone()) if v.shape == w.shape else v.fill_(0.0625)


def edit_minus_mean(v: Any, w: Any) -> None:
    v.sub_(v.mean())


def edit_clamp(v: Any, w: Any) -> None:
    v.clamp_(-1, 1)


def edit_tanh(v: Any, w: Any) -> None:
    v.tanh_()


def edit_where(v: Any, w: Any) -> None:
    v[...] = torch.where(v > 0, v, 0.5 * v)


def edit_lerp(v: Any, w: Any) -> None:
    v.lerp_(v.flip(-1), 0.25)


def edit_masked_fill(v: Any, w: Any) -> None:
    v.masked_fill_(v > 0.7771, 0.7771)


def edit_index_add(v: Any, w: Any) -> None:
    v.index_add_(-1, torch.tensor([0]), v[..., -1:] * 0.5)


def edit_positions(v: Any, w: Any) -> None:
    v[..., torch.tensor([0, -1])] = 0.375


def edit_every_other(v: Any, w: Any) -> None:
    v[..., ::2] -= w.mean()


def edit_twice(v: Any, w: Any) -> None:
    v.mul_(0.5).add_(0.1)


EDITS = [
    edit_lerp,
    edit_masked_fill,
    edit_index_add,
    edit_positions,
    edit_every_other,
    edit_twice,
    edit_set_from,
    edit_mask,
    edit_mask_scaled,
    edit_list,
    edit_flip,
    edit_all,
    edit_add,
    edit_scale,
    edit_last,
    edit_copy,
    edit_minus_mean,
    edit_clamp,
    edit_tanh,
    edit_where,
]

MATHS: list[Callable[[Any, Any], Any]] = [
    lambda v, w: v * 2 + 1,
    lambda v, w: 1 - v,
    lambda v, w: v - v.mean(),
    lambda v, w: torch.tanh(v),
    lambda v, w: v.clone(),
    lambda v, w: torch.where(v > 0, v, 0.1 * v),
    lambda v, w: v.softmax(-1),
    lambda v, w: v + w.mean(),
    lambda v, w: v + w if v.shape == w.shape else v + 0.5,
    lambda v, w: torch.cat([v, v * 0.5], -1),
    lambda v, w: torch.stack([v, v.flip(-1)]),
    lambda v, w: v.cumsum(-1) * 0.1,
    lambda v, w: v.max(-1).values if v.ndim > 1 else v * 1,
    lambda v, w: v.expand(2, *v.shape) * 1.0 if v.ndim < 5 else v * 1,
    lambda v, w: v[..., [0, -1]],
    lambda v, w: torch.zeros(3) + v.mean(),
]

Step = tuple[str, int, int, int]
Invoke = tuple[int, list[Step]]

KINDS = ["site"] * 3 + ["view"] * 4 + ["edit"] * 5 + ["math"] * 2 + ["assign", "again"]
steps = st.tuples(st.sampled_from(KINDS), st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
programs = st.lists(st.tuples(st.integers(1, 9), st.lists(steps, min_size=1, max_size=14)), min_size=1, max_size=3)
traces = st.tuples(programs, st.none() | st.lists(steps, min_size=1, max_size=10), st.booleans())
sessions = st.lists(traces, min_size=1, max_size=2)
"""Of each trace: its invokes, what the invoke for all rows does if there is one, whether all prompts are as long."""


@dataclass(eq=False)
class _Memory:
    """What aliases share."""

    passed: bool = False
    """Whether it must not be edited any more, because its site has passed."""
    edited: int = -1
    """The site at which it was edited the last time."""
    former: bool = False
    """Whether it is of a trace that has ended: a site that becomes its value has memory of its own."""


class _Value:
    """A tensor, eager or not, with what decides what may be done with it."""

    def __init__(self, tensor: Any, memory: _Memory, order: int) -> None:
        self.tensor = tensor
        self.memory = memory
        self._order = order

    @property
    def order(self) -> int:
        """The last site that it may depend on."""
        return max(self._order, self.memory.edited)


class _Machine:
    """Runs the steps of one invoke."""

    def __init__(self, model: Any, sites: list[Place], foreign: list[_Value], earlier: Sequence[_Value] = ()) -> None:
        self.model = model
        self.sites = sites
        self.foreign = foreign
        self.order = -1
        self.values: list[_Value] = [_Value(each.tensor, each.memory, -1) for each in earlier]
        self._earlier = len(self.values)
        self.here: list[_Memory] = []
        """The memories that the current site is bound to."""

    def run(self, steps: list[Step]) -> None:
        self.site(0, 0, 0)
        for kind, *numbers in steps:
            getattr(self, kind)(*numbers)
        for memory in self.here:
            memory.passed = True

    @property
    def own(self) -> list[_Value]:
        """The values that it made."""
        return self.values[self._earlier :]

    @property
    def module(self) -> Any:
        return self.model.module(self.sites[self.order][0])

    @property
    def side(self) -> str:
        return self.sites[self.order][1]

    def pick(self, number: int) -> _Value:
        known = [each for each in self.values if each.order <= self.order]
        return known[-1 - number % len(known)]

    def other(self, number: int) -> Any:
        known = [each for each in (*self.values, *self.foreign) if each.order <= self.order]
        return known[-1 - number % len(known)].tensor

    def keep(self, tensor: Any, memory: _Memory) -> None:
        if tensor.numel() <= MAX_ELEMENTS:
            self.values.append(_Value(tensor, memory, self.order))

    def site(self, a: int, b: int, c: int) -> None:
        order = self.order + 1 + a % 6
        if order >= len(self.sites):
            return
        for memory in self.here:
            memory.passed = True
        self.order = order
        memory = _Memory()
        self.here = [memory]
        self.keep(getattr(self.module, self.side), memory)

    def again(self, a: int, b: int, c: int) -> None:
        self.keep(getattr(self.module, self.side), self.here[-1])

    def view(self, a: int, b: int, c: int) -> None:
        value = self.pick(a)
        self.keep(VIEWS[b % len(VIEWS)](value.tensor), value.memory)

    def math(self, a: int, b: int, c: int) -> None:
        self.keep(MATHS[b % len(MATHS)](self.pick(a).tensor, self.other(c)), _Memory())

    def edit(self, a: int, b: int, c: int) -> None:
        value = self.pick(a)
        if not value.memory.passed:
            EDITS[b % len(EDITS)](value.tensor, self.other(c))
            value.memory.edited = self.order

    def assign(self, a: int, b: int, c: int) -> None:
        value = self.pick(a)
        place = getattr(self.module, self.side)
        if value.tensor.shape != place.shape or value.memory.passed or (value.memory in self.here):
            value = _Value(place * 0.5 + value.tensor.mean(), _Memory(), self.order)
            self.values.append(value)
        tensor, memory = value.tensor, value.memory
        if memory.former:
            memory.passed, memory = True, _Memory()
            tensor = tensor.clone() if isinstance(tensor, torch.Tensor) else tensor
        setattr(self.module, self.side, tensor)
        self.here.append(memory)


def program_of(invokes: list[Invoke], sites: list[Place]) -> Callable[[Any, Any], Results]:
    """What the steps of some invokes do, for either model."""

    def run(model: Any, trace: Any) -> Results:
        found: Results = {}
        foreign: list[_Value] = []
        for index, (length, steps) in enumerate(invokes):
            with trace.invoke(tiny.prompt(length, seed=index)):
                machine = _Machine(model, sites, foreign)
                machine.run(steps)
                for position, value in enumerate(machine.values[-5:]):
                    found[f"value {position} of invoke {index}"] = value.tensor
                found[f"logits of invoke {index}"] = model.logits
            foreign = [*foreign, *machine.values]
        return found

    return run


def session_of(session: list[Any], sites: list[Place]) -> Callable[[Any, Callable[..., Any]], Results]:
    """What the steps of the traces of a session do, for either model."""

    def run(model: Any, open_trace: Callable[..., Any]) -> Results:
        found: Results = {}
        earlier: list[_Value] = []
        for number, (invokes, everyone, alike) in enumerate(session):
            # All rows together are as long: what PyTorch's attention makes of NaN depends on lengths.
            foreign = [_Value(each.tensor, each.memory, -1) for each in earlier]
            machines: list[_Machine] = []
            with open_trace(together=everyone is not None) as trace:
                for index, (length, steps) in enumerate(invokes):
                    with trace.invoke(
                        tiny.prompt(invokes[0][0] if alike or everyone is not None else length, seed=index)
                    ):
                        machine = _Machine(model, sites, foreign, earlier)
                        machine.run(steps)
                        if everyone is None:
                            found[f"logits of invoke {index} of trace {number}"] = model.logits
                    machines.append(machine)
                    foreign = [*foreign, *machine.own]
                if everyone is not None:
                    with trace.invoke():
                        machine = _Machine(model, sites, foreign)
                        machine.order = max(each.order for each in machines) - 1
                        machine.run(everyone)
                        found[f"logits of trace {number}"] = model.logits
                    machines.append(machine)
            for index, machine in enumerate(machines):
                for position, value in enumerate(machine.own[-4:]):
                    found[f"value {position} of invoke {index} of trace {number}"] = value.tensor
            # What was put together of all rows cannot be edited in its parts any more.
            earlier = [value for each in machines for value in each.own] if everyone is None else machines[-1].own
            earlier = earlier[-6:]
            for value in earlier:
                # Its trace has ended: it is a tensor like any other.
                value.memory.passed, value.memory.edited, value.memory.former = False, -1, True
        return found

    return run


def check_session(name: str, session: list[Any], served: Any, references: Any) -> None:
    """Run a session both ways."""
    model, reference = served[name], EagerModel(name, references[name])
    leaves = {place: places.leaf_of(model, place) for place in sites_of(model)}
    sites = [
        place
        for place, leaf in leaves.items()
        if leaf.packs and [dim.axis for dim in leaf.shape] == [Axis.BATCH, Axis.SEQ, Axis.CONSTANT]
    ]
    program = session_of(session, sites)
    expected = program(reference, reference.trace)
    with model.session():
        found = program(model, lambda together: model.trace())
        for value in found.values():
            value.save()
    compare(found, expected, TOLERANCE)


def sites_of(model: Any) -> list[Place]:
    """The floating-point outputs that are one tensor, and first arguments, in the order of a forward pass."""
    found = []
    for place in places.every_place(model):
        leaf = places.leaf_of(model, place)
        plain = place[2] == () if place[1] == "output" else place[2] == ("args", 0)
        if plain and leaf.dtype.is_floating_point and len(leaf.shape) == 3:
            found.append(place)
    return found


def check(name: str, invokes: list[Invoke], served: Any, references: Any) -> None:
    """Run a program both ways."""
    model = served[name]
    program = program_of(invokes, sites_of(model))
    assert_invokes_agree(program, model, EagerModel(name, references[name]), tolerance=TOLERANCE)


names = pytest.mark.parametrize("name", tiny.SERVED)
quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@names
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=quiet)
@given(invokes=programs)
def test_a_random_program_gives_what_pytorch_gives(name: str, invokes: Any, served: Any, references: Any) -> None:
    check(name, invokes, served, references)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@names
@settings(max_examples=1500, deadline=None, suppress_health_check=quiet)
@given(invokes=programs)
def test_many_random_programs_give_what_pytorch_gives(name: str, invokes: Any, served: Any, references: Any) -> None:
    check(name, invokes, served, references)


core = pytest.mark.parametrize("name", tiny.CORE)


@core
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=quiet)
@given(session=sessions)
def test_a_random_session_gives_what_pytorch_gives(name: str, session: Any, served: Any, references: Any) -> None:
    check_session(name, session, served, references)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@core
@settings(max_examples=2000, deadline=None, suppress_health_check=quiet)
@given(session=sessions)
def test_many_random_sessions_give_what_pytorch_gives(name: str, session: Any, served: Any, references: Any) -> None:
    check_session(name, session, served, references)
