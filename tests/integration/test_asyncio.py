"""Traces in coroutines: requests wait for the server, and the event loop for none of them."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch

import patchwire
import tiny
from integration.refusals import refused

# Longer than anything here takes, and shorter than what is cancelled would have taken.
PATIENCE = 120


@pytest.fixture
def model(served) -> patchwire.Model:
    return served["gpt2"]


@pytest.fixture(scope="module")
def reference(references) -> Any:
    return references["gpt2"]


def within(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE))


async def logits(model: patchwire.Model, ids: list[int]) -> torch.Tensor:
    async with model.trace(ids):
        found = model.logits.save()
    return found.value


async def endless(model: patchwire.Model) -> None:
    """Many minutes of work."""
    async with model.trace([1, 2, 3]) as trace:
        value = model.layers[0].output.new_ones(2048, 2048)
        trace.log("busy", value[0, 0])
        for _ in range(3_000):
            value = value @ value
        value.sum().save()


@pytest.fixture
def until_busy(capsys) -> Callable[[], Coroutine[Any, Any, None]]:
    """Return once the model runs what is endless: whoever comes then has to wait."""

    async def until_busy() -> None:
        while "busy" not in capsys.readouterr().out:
            await asyncio.sleep(0.01)

    return until_busy


class TestManyAtOnce:
    def test_each_get_their_own_numbers(self, model, reference):
        async def ablated(number: int) -> torch.Tensor:
            async with model.trace(tiny.prompt(2 + number)):
                await asyncio.sleep(0)  # everybody's block is open now
                model.layers[1].mlp.output[:, -1] = float(number)
                await asyncio.sleep(0)
                found = model.logits.save()
            return found.value

        async def everybody() -> list[torch.Tensor]:
            return await asyncio.gather(*(ablated(number) for number in range(20)))

        for number, found in enumerate(within(everybody())):

            def ablate(module, args, output, number=number):
                output[:, -1] = float(number)

            handle = reference.transformer.h[1].mlp.register_forward_hook(ablate)
            with torch.no_grad():
                torch.testing.assert_close(found, reference(torch.tensor([tiny.prompt(2 + number)])).logits)
            handle.remove()

    def test_do_not_see_each_others_blocks(self, model):
        inside, looked = asyncio.Event(), asyncio.Event()

        async def first() -> int:
            async with model.trace([1, 2, 3]) as trace:
                inside.set()
                await looked.wait()
                found = model.logits.save()
            return len(trace.tokens[0]) * found.shape[0]

        async def second() -> str:
            await inside.wait()
            with pytest.raises(patchwire.GraphError, match="only while the model runs") as caught:
                _ = model.logits
            async with model.trace([1]):
                found = model.logits.save()
            assert found.value.shape == (1, 1, 61)
            looked.set()
            return caught.value.hint

        async def both() -> list[Any]:
            return await asyncio.gather(first(), second())

        assert within(both())[0] == 3

    def test_another_model_answers_while_one_is_busy(self, served, references, until_busy):
        async def both() -> torch.Tensor:
            busy = asyncio.create_task(endless(served["gpt2"]))
            await until_busy()
            found = await logits(served["llama"], [1, 2, 3])
            assert not busy.done()
            busy.cancel()
            return found

        with torch.no_grad():
            wanted = references["llama"](torch.tensor([[1, 2, 3]])).logits
        torch.testing.assert_close(within(both()), wanted)

    def test_more_wait_than_a_pool_has_threads(self, model, until_busy):
        async def everybody() -> int:
            busy = asyncio.create_task(endless(model))
            await until_busy()
            waiting = [asyncio.create_task(logits(model, [1, 2])) for _ in range(60)]
            await asyncio.to_thread(lambda: None)  # the program's own threads are free
            busy.cancel()
            return len(await asyncio.gather(*waiting))

        assert within(everybody()) == 60


class TestCancelling:
    def test_a_task_stops_its_pass(self, model, until_busy):
        async def cancelled() -> torch.Tensor:
            task = asyncio.create_task(endless(model))
            await until_busy()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await logits(model, [1, 2])

        assert within(cancelled()).shape == (1, 2, 61)

    def test_a_task_that_waits_leaves_the_queue(self, model, until_busy):
        async def cancelled() -> torch.Tensor:
            first, second = (asyncio.create_task(endless(model)) for _ in range(2))
            await until_busy()
            second.cancel()
            first.cancel()
            await asyncio.wait([first, second])
            return await logits(model, [1, 2])

        assert within(cancelled()).shape == (1, 2, 61)

    def test_by_a_timeout(self, model):
        async def late() -> torch.Tensor:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.0):
                    await endless(model)
            return await logits(model, [1, 2])

        assert within(late()).shape == (1, 2, 61)

    def test_before_anything_is_sent(self, model):
        async def early() -> torch.Tensor:
            task = asyncio.create_task(endless(model))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await logits(model, [1, 2])

        assert within(early()).shape == (1, 2, 61)

    def test_a_block_that_is_left_early_sends_nothing(self, model):
        async def left() -> None:
            async with model.trace([1, 2]):
                found = model.logits.save()
                raise ZeroDivisionError
            return found

        with pytest.raises(ZeroDivisionError):
            within(left())
        assert within(logits(model, [1, 2])).shape == (1, 2, 61)


class TestErrors:
    def test_of_the_run_name_the_line_and_show_nothing_of_the_inside(self, model):
        with refused(patchwire.ExecutionError, "singular") as refusal:

            async def fails() -> None:
                async with model.trace([1, 2, 3]):
                    zero = model.layers[0].output.new_zeros(3, 3)
                    torch.linalg.inv(zero).save()  # this line

            within(fails())
        files = {Path(each.filename).name for each in traceback.extract_tb(refusal.error.__traceback__)}
        assert "connection.py" not in files
        assert "background.py" not in files

    def test_of_one_do_not_disturb_the_others(self, model):
        async def fails() -> None:
            async with model.trace([1, 2, 3]):
                torch.linalg.inv(model.layers[0].output.new_zeros(3, 3)).save()

        async def everybody() -> list[Any]:
            return await asyncio.gather(logits(model, [1]), fails(), logits(model, [1, 2]), return_exceptions=True)

        first, error, last = within(everybody())
        assert first.shape == (1, 1, 61)
        assert type(error) is patchwire.ExecutionError
        assert last.shape == (1, 2, 61)

    def test_found_while_recording_stand_at_their_line(self, model):
        with refused(patchwire.ShapeError, "24"):

            async def fails() -> None:
                async with model.trace([1, 2, 3]):
                    model.layers[0].output @ model.layers[0].output  # this line

            within(fails())

    def test_a_block_without_a_save_is_warned_of_at_its_line(self, model):
        async def nothing() -> None:
            async with model.trace([1, 2, 3]):
                _ = model.logits

        with pytest.warns(patchwire.PatchwireWarning, match="saved nothing") as caught:
            within(nothing())
        assert caught[0].filename == __file__


class TestJobs:
    def test_can_be_awaited(self, model, reference):
        async def awaited() -> torch.Tensor:
            async with model.trace([1, 2, 3], blocking=False) as trace:
                found = model.logits.save()
            assert not found.ready
            (tensor,) = await trace.job
            assert found.value is tensor
            trace.job.forget()
            return tensor

        with torch.no_grad():
            torch.testing.assert_close(within(awaited()), reference(torch.tensor([[1, 2, 3]])).logits)

    def test_go_on_when_nobody_awaits_them_any_more(self, model, until_busy):
        async def given_up() -> patchwire.JobStatus:
            busy = asyncio.create_task(endless(model))
            await until_busy()
            async with model.trace([1, 2, 3], blocking=False) as trace:
                model.logits.save()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await trace.job
            busy.cancel()
            await trace.job
            status = trace.job.status
            trace.job.forget()
            return status

        assert within(given_up()) == "done"


def test_an_ordinary_block_works_in_a_coroutine(model):
    async def ordinary() -> torch.Tensor:
        with model.trace([1, 2]):
            found = model.logits.save()
        return found.value

    assert within(ordinary()).shape == (1, 2, 61)


def test_several_prompts_in_one_block(model, reference):
    async def several() -> list[torch.Tensor]:
        async with model.trace() as trace:
            with trace.invoke([1, 2, 3]):
                first = model.logits.save()
            await asyncio.sleep(0)
            with trace.invoke([4, 5]):
                second = model.logits.save()
        return [first.value, second.value]

    first, second = within(several())
    with torch.no_grad():
        torch.testing.assert_close(first, reference(torch.tensor([[1, 2, 3]])).logits)
        torch.testing.assert_close(second, reference(torch.tensor([[4, 5]])).logits)
