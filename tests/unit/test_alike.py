"""What was checked once is not checked again, and nobody can tell: results, errors and their lines are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.fx

from patchwire import alike, ops
from patchwire import graph as g
from patchwire.checking import Checker, fake_of
from patchwire.errors import LimitError, PatchwireError, ShapeError, SourceLine

GIVEN: list[torch.Tensor] = [
    torch.empty(2, 3, 4, device="meta"),
    torch.empty(4, 3, 2, device="meta").transpose(0, 2),
    torch.empty(2, 3, 9, device="meta")[..., 4:8],
    torch.empty(2, 3, 1, device="meta").expand(2, 3, 4),
    torch.empty(2, 3, 4, dtype=torch.int64, device="meta"),
    torch.empty(2, 3, 4, dtype=torch.complex64, device="meta"),
]


class Asked:
    """A graph on tensors that are given, and what a checker says about it."""

    def __init__(self, *given: torch.Tensor, value_bytes: int | None = None) -> None:
        self.graph = g.Graph(traces=[g.Trace("tiny")], outside=list(given))
        self.checker = Checker(self.graph, lambda name: pytest.fail("no site is asked for"), value_bytes=value_bytes)
        self.given = [self._add(g.outside, index) for index in range(len(given))]
        for node, fake in zip(self.given, given, strict=True):
            node.meta["fake"] = fake  # with its strides, which a value from outside keeps

    def _add(self, target: Any, *args: Any, operation: ops.Operation | None = None, **kwargs: Any) -> torch.fx.Node:
        node = g.add(self.graph.fx, target, args, kwargs)
        node.meta |= {"operation": operation, "line": SourceLine("user.py", len(self.graph.nodes), "code")}
        self.checker.node(node)
        return node

    def ask(self, name: str, *args: Any, **kwargs: Any) -> torch.fx.Node:
        operation = ops.OPERATIONS[name]
        return self._add(operation.function, *args, operation=operation, **kwargs)

    def edit(self, base: torch.fx.Node, views: Any, change: Any) -> torch.fx.Node:
        return self._add(g.edit, base, views, change)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(alike, "_REMEMBERED", {})


def looks(fake: Any, *given: torch.Tensor) -> Any:
    """All that can be seen of a fake, and which of these it shares memory with."""
    if not isinstance(fake, torch.Tensor):
        return type(fake), [looks(each, *given) for each in fake or ()]
    shared = [g.same_storage(fake, each) for each in given]
    return fake.shape, fake.stride(), fake.storage_offset(), fake.dtype, fake.is_conj(), fake.is_neg(), shared


ONE = [
    ("operator.getitem", ((slice(None), -1),)),
    ("operator.getitem", ((0, slice(1, None), None),)),
    ("operator.getitem", (([0, 1],),)),
    ("operator.add", (1,)),
    ("operator.truediv", (2,)),
    ("torch.Tensor.transpose", (0, 1)),
    ("torch.Tensor.view", (6, 4)),
    ("torch.Tensor.reshape", (6, 4)),
    ("torch.Tensor.contiguous", ()),
    ("torch.Tensor.expand_as", None),
    ("torch.Tensor.clone", ()),
    ("torch.Tensor.conj", ()),
    ("torch.Tensor.real", ()),
    ("torch.Tensor.float", ()),
    ("torch.Tensor.split", (1,)),
    ("torch.sum", (-1,)),
    ("torch.atleast_3d", None),
    ("torch.matmul", None),
]


@pytest.mark.parametrize("given", range(len(GIVEN)))
@pytest.mark.parametrize(("name", "args"), ONE)
def test_the_second_answer_is_the_first_and_pytorch_s(name, args, given):
    def ask(asked: Asked) -> Any:
        rest = asked.given[1:] if args is None else args
        try:
            fake = fake_of(asked.ask(name, asked.given[0], *rest))
        except PatchwireError as error:
            return type(error), error.message, error.hint
        return looks(fake, *(fake_of(each) for each in asked.given))

    pair = (GIVEN[given], torch.empty_strided(GIVEN[given].shape, (0, 0, 0), dtype=GIVEN[given].dtype, device="meta"))

    first, second = ask(Asked(*pair)), ask(Asked(*pair))

    assert second == first
    if isinstance(first[0], torch.Size):
        rest = pair[1:] if args is None else args
        assert first == looks(ops.OPERATIONS[name].function(pair[0], *rest), *pair)


@pytest.mark.parametrize("given", GIVEN[:3])
def test_an_edit_of_what_looks_alike_gives_what_looks_alike(given):
    asked = Asked(given, torch.empty(2, 4, device="meta"))
    base, item = asked.given

    made = [asked.edit(base, (), ("operator.setitem", ((slice(None), 1), item), {})) for _ in range(2)]

    assert looks(fake_of(made[0]), given) == looks(fake_of(made[1]), given)
    assert not g.same_storage(fake_of(made[0]), fake_of(made[1]))


def test_numbers_that_are_equal_and_of_other_kinds_are_not_taken_for_each_other():
    asked = Asked(GIVEN[4])

    made = [fake_of(asked.ask("operator.mul", asked.given[0], each)).dtype for each in (1, 1.0, True, 1)]

    assert made == [torch.int64, torch.float32, torch.int64, torch.int64]


def test_whole_numbers_are_divided_to_the_dtype_that_is_pytorch_s_default_now():
    asked = Asked(GIVEN[4])
    asked.ask("operator.truediv", asked.given[0], 2)
    torch.set_default_dtype(torch.float64)
    try:
        made = fake_of(asked.ask("operator.truediv", asked.given[0], 2))
    finally:
        torch.set_default_dtype(torch.float32)

    assert made.dtype is torch.float64


def test_an_operand_given_twice_is_not_taken_for_two_of_the_same_looks():
    one, other = torch.empty(3, device="meta"), torch.empty(3, device="meta")
    asked = Asked(one, other)

    twice = asked.ask("torch.Tensor.expand_as", asked.given[0], asked.given[0])
    both = asked.ask("torch.Tensor.expand_as", asked.given[1], asked.given[0])

    assert g.same_storage(fake_of(twice), one)
    assert g.same_storage(fake_of(both), other)


def test_an_error_is_found_for_each_node_at_its_own_line():
    asked = Asked(GIVEN[0], torch.empty(5, device="meta"))
    lines = []
    for _ in range(3):
        with pytest.raises(ShapeError) as caught:
            asked.ask("operator.add", *asked.given)
        lines.append(caught.value.lines[0].line)

    assert lines == [3, 4, 5]


def test_a_smaller_limit_is_not_passed_by_what_was_found_under_a_larger_one():
    large, small = Asked(GIVEN[0], value_bytes=1 << 20), Asked(GIVEN[0], value_bytes=100)
    large.ask("torch.Tensor.repeat", large.given[0], 2, 1, 1)

    with pytest.raises(LimitError, match="needs 192 bytes on its way"):
        small.ask("torch.Tensor.repeat", small.given[0], 2, 1, 1)


def test_no_more_is_remembered_than_so_many(monkeypatch):
    monkeypatch.setattr(alike, "_MOST_REMEMBERED", 3)
    asked = Asked(GIVEN[0])

    for index in range(10):
        asked.ask("operator.add", asked.given[0], index)

    assert len(alike._REMEMBERED) == 3
