"""While a block is recorded garbage is collected rarely, and afterwards as before, however the block ends."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import patchwire
import tiny
from patchwire.garbage import Rarely, rarely

PROMPT = tiny.prompt(5)
USUAL = (701, 11, 12)


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*USUAL)
    yield
    gc.set_threshold(*before)


@pytest.fixture
def model(served: dict[str, patchwire.Model]) -> patchwire.Model:
    return served["gpt2"]


def test_of_a_trace(model: patchwire.Model) -> None:
    with model.trace(PROMPT):
        assert gc.get_threshold()[0] > 10_000
        assert gc.get_threshold()[1:] == USUAL[1:]
        model.logits.save()
    assert gc.get_threshold() == USUAL


def test_of_a_session_until_its_last_trace(model: patchwire.Model) -> None:
    with model.session():
        for _ in range(2):
            with model.trace(PROMPT):
                model.logits.save()
            assert gc.get_threshold()[0] > 10_000
    assert gc.get_threshold() == USUAL


def raises(model: patchwire.Model) -> None:
    with model.trace(PROMPT):
        raise ZeroDivisionError


def raises_in_a_session(model: patchwire.Model) -> None:
    with model.session(), model.trace(PROMPT):
        raise ZeroDivisionError


def has_a_wrong_prompt(model: patchwire.Model) -> None:
    with model.trace([10**9]):
        pass


def has_no_prompt(model: patchwire.Model) -> None:
    with model.trace():
        pass


def has_no_trace(model: patchwire.Model) -> None:
    with model.session():
        pass


@pytest.mark.parametrize(
    "block",
    [raises, raises_in_a_session, has_a_wrong_prompt, has_no_prompt, has_no_trace],
    ids=lambda each: each.__name__,
)
def test_of_a_block_that_fails(model: patchwire.Model, block: Any) -> None:
    with pytest.raises((ZeroDivisionError, patchwire.PatchwireError)):
        block(model)
    assert gc.get_threshold() == USUAL


def test_of_a_scan_and_of_an_edit(model: patchwire.Model) -> None:
    with model.scan(PROMPT):
        model.logits.save()
    assert gc.get_threshold() == USUAL
    with model.edit():
        model.layers[0].output[:] *= 2
    assert gc.get_threshold() == USUAL


def test_of_several_threads_until_the_last_is_done(model: patchwire.Model) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def other() -> None:
        with model.trace(PROMPT):
            inside.set()
            assert go_on.wait(60)
            model.logits.save()

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(60)
    with model.trace(PROMPT):
        model.logits.save()
    assert gc.get_threshold()[0] > 10_000
    go_on.set()
    thread.join(60)
    assert gc.get_threshold() == USUAL


def test_what_the_program_has_set_stays() -> None:
    gc.set_threshold(0)
    with rarely():
        assert gc.get_threshold()[0] == 0
    assert gc.get_threshold()[0] == 0
    gc.set_threshold(*USUAL)
    with rarely():
        gc.set_threshold(5, 6, 7)
    assert gc.get_threshold() == (5, 6, 7)


def test_one_that_is_gone_has_ended() -> None:
    going_on = Rarely()
    del going_on
    assert gc.get_threshold() == USUAL
