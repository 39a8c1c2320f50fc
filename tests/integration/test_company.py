"""Requests of several users that wait for one model run in one pass, and none of them can tell from its numbers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import patchwire
import tiny
from conformance.hooks import assert_same
from serving import Server

ROUNDS = 40
Work = Callable[[patchwire.Model], tuple[Any, Any]]
"""What a user does: the trace, and the tensor that comes back."""


def read(length: int) -> Work:
    def work(model: patchwire.Model) -> tuple[Any, Any]:
        with model.trace(tiny.prompt(length, seed=length)) as trace:
            logits = model.logits[:, -1].save()
        return trace.stats, logits.value

    return work


def choose(length: int, *answers: int) -> Work:
    def work(model: patchwire.Model) -> tuple[Any, Any]:
        with model.trace(tiny.prompt(length, seed=length)) as trace:
            logits = model.logits[:, -1, list(answers)].save()
        return trace.stats, logits.value

    return work


def patch(length: int, layer: int) -> Work:
    def work(model: patchwire.Model) -> tuple[Any, Any]:
        with model.trace() as trace:
            with trace.invoke(tiny.prompt(length)):
                clean = model.layers[layer].output[:, -1]
            with trace.invoke(tiny.prompt(length + 2, seed=1)):
                model.layers[layer].output[:, -1] = clean
                logits = model.logits.save()
        return trace.stats, logits.value

    return work


def early(model: patchwire.Model) -> tuple[Any, Any]:
    with model.trace(tiny.prompt(9)) as trace:
        state = (model.layers[1].output * 2).save()
    return trace.stats, state.value


def attention(model: patchwire.Model) -> tuple[Any, Any]:
    with model.trace(tiny.prompt(8)) as trace:
        model.layers[1].attn.pattern[:, 0] = 0
        logits = model.logits.save()
    return trace.stats, logits.value


def alone(model: patchwire.Model) -> tuple[Any, Any]:
    with model.trace(tiny.prompt(7), exact=True) as trace:
        logits = model.logits.save()
    return trace.stats, logits.value


def gradient(model: patchwire.Model) -> tuple[Any, Any]:
    with model.trace(tiny.prompt(7)) as trace:
        state = model.layers[0].output
        found = patchwire.grad(model.logits[0, -1, 3], state).save()
    return trace.stats, found.value


def fails(model: patchwire.Model) -> tuple[Any, Any]:
    with pytest.raises(patchwire.ExecutionError, match="out of"), model.trace(tiny.prompt(7)):
        model.logits[:, torch.tensor([50])].save()
    return None, torch.zeros(1)


CHOOSING: list[Work] = [choose(5, 3, 8), choose(6, 8, 40), choose(11, 60), early]
SHARING: list[Work] = [read(5), read(6), read(11), patch(6, 0), patch(9, 2), early, attention, read(12), fails]
SHARING += CHOOSING[:2]
APART: list[Work] = [alone, gradient]


def together(address: str, name: str, works: list[Work]) -> list[tuple[Any, Any]]:
    """What users who ask at the same time get, while somebody else holds the model."""
    start, clients = (
        threading.Barrier(len(works) + 1),
        [patchwire.connect(address, progress=False) for _ in range(len(works) + 1)],
    )
    models = [client.model(name) for client in clients]

    def ask(model: patchwire.Model, work: Work) -> tuple[Any, Any]:
        start.wait()
        return work(model)

    with ThreadPoolExecutor(len(works) + 1) as pool:
        others = [pool.submit(ask, model, work) for model, work in zip(models[1:], works, strict=True)]

        def hold() -> None:
            with models[0].generate(tiny.prompt(6), max_new_tokens=40, min_new_tokens=40) as made:
                made.output.save()

        holding = pool.submit(hold)
        start.wait()
        holding.result()
        found = [each.result() for each in others]
    for client in clients:
        client.close()
    return found


@pytest.mark.parametrize("who", [SHARING + APART, CHOOSING], ids=["all", "those who look at few logits"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba", "mamba2"])
def test_what_each_gets_is_what_it_gets_alone(server: Server, name: str, who: list[Work]) -> None:
    works = [each for each in who if each is not attention or name in ("gpt2", "llama")]
    sharing = [each for each in works if each not in APART]
    client = patchwire.connect(server.address, progress=False)
    model = client.model(name)
    expected = [work(model)[1] for work in works]
    met = set[Work]()
    for _ in range(ROUNDS):
        for work, (stats, value), lone in zip(works, together(server.address, name, works), expected, strict=True):
            assert_same(value, lone)
            if work in APART:
                assert stats.companions == 0
            elif stats is not None and stats.companions:
                assert stats.passes == 1
                met.add(work)
        if met >= set(sharing) - {fails}:
            break
    assert met >= set(sharing) - {fails}, "sooner or later everybody has company"
    client.close()


def test_who_leaves_takes_nobody_along(server: Server) -> None:
    def leave(model: patchwire.Model) -> tuple[Any, Any]:
        with contextlib.suppress(patchwire.TimeoutError), model.trace(tiny.prompt(9)):
            model.logits.save()
        return None, torch.zeros(1)

    client = patchwire.connect(server.address, progress=False)
    model = client.model("llama")
    expected = read(6)(model)[1]
    hasty = patchwire.connect(server.address, progress=False).model("llama")
    hasty.connection.timeout = 0.01
    for _ in range(5):
        works: list[Work] = [read(6), lambda _: leave(hasty), read(6)]
        (_, one), _, (_, other) = together(server.address, "llama", works)
        assert_same(one, expected)
        assert_same(other, expected)
    client.close()


@pytest.mark.parametrize("long", ["exact", "gradients", "loop"])
def test_a_short_request_does_not_wait_for_all_passes_of_a_long_one(long: str) -> None:
    module: Any = tiny.build("llama").requires_grad_(False)
    model = patchwire.local(module, progress=False)
    expected = {length: read(length)(model)[1] for length in (4, 9)}
    lengths: list[int] = []
    found: list[Any] = []
    short = threading.Thread(target=lambda: found.append(read(4)(model)))

    def passing(_: object, given: tuple[torch.Tensor, ...]) -> None:
        lengths.append(given[0].shape[1])
        if len(lengths) == 1:
            short.start()
        if 4 not in lengths:
            time.sleep(0.05)  # it is on its way

    module.model.embed_tokens.register_forward_pre_hook(passing)
    prompt, saved = tiny.prompt(9, seed=9), []
    with model.session(exact=long == "exact") as session:
        if long == "loop":
            with session.repeat(40), model.trace(prompt):
                saved.append(model.logits[:, -1].save())
        for _ in range(40 if long != "loop" else 0):
            with model.trace(prompt):
                if long == "gradients":
                    patchwire.grad(model.logits[0, -1, 3], model.layers[0].output).save()
                saved.append(model.logits[:, -1].save())
    short.join()

    assert lengths.count(4) == 1
    assert lengths.count(9) == session.stats.passes == 40
    assert 4 in lengths[:-1]
    assert_same(found[0][1], expected[4])
    for each in saved:
        for value in each.value if long == "loop" else [each.value]:
            assert_same(value, expected[9])
