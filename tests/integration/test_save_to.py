"""Saved values that go to a function, or into a tensor, as they come."""

from __future__ import annotations

import gc
import os
import re
import threading
import weakref
from pathlib import Path

import pytest
import torch

import patchwire
import tiny
from serving import Server

DATA = [tiny.prompt(5, seed=seed) for seed in range(6)]


def plain(model: str, ids: list[list[int]], layer: int) -> torch.Tensor:
    """What a hook on the Hugging Face model sees after a layer of a GPT-2."""
    found = []
    built = tiny.build(model)
    handle = built.transformer.h[layer].register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        built(torch.tensor(ids))
    handle.remove()
    return found[0] if isinstance(found[0], torch.Tensor) else found[0][0]


def over(model, taken, *, to=None) -> patchwire.Value:
    """Save a layer's output over batches of two."""
    with model.session() as session, session.over(DATA, batch_size=2) as batches, model.trace(batches.prompt):
        return model.layers[1].output.save(to=taken if to is None else to)


class TestAFunction:
    def test_is_given_every_iteration_in_order(self, served):
        taken: list[torch.Tensor] = []

        over(served["gpt2"], taken.append)

        expected = [plain("gpt2", DATA[start : start + 2], 1) for start in (0, 2, 4)]
        torch.testing.assert_close(taken, expected)

    def test_is_given_a_value_outside_of_loops_too(self, served):
        taken: list[torch.Tensor] = []
        with served["gpt2"].trace(DATA[0]):
            hidden = served["gpt2"].layers[1].output
            given, kept = hidden.save(to=taken.append), hidden.save()

        assert [torch.equal(each, kept.value) for each in taken] == [True]
        with pytest.raises(patchwire.GraphError, match="given to a function when it came"):
            _ = given.value

    def test_is_given_the_dtype_that_was_asked_for(self, served):
        taken: list[torch.Tensor] = []
        with served["gpt2"].trace(DATA[0]):
            served["gpt2"].layers[1].output.save(to=taken.append, dtype=torch.bfloat16)

        assert [each.dtype for each in taken] == [torch.bfloat16]

    def test_that_raises_ends_a_request_that_goes_on_meanwhile(self, checkpoints):
        def take(tensor: torch.Tensor) -> None:
            raise ZeroDivisionError("no")

        with (
            Server({"gpt2": checkpoints["gpt2"]}) as server,
            patchwire.connect(server.address, progress=False) as client,
        ):
            model = client.model()
            loop = model.session()
            with pytest.raises(ZeroDivisionError), loop as session, session.repeat(100_000), model.trace([1, 2, 3]):
                model.layers[1].output.save(to=take)
            with model.trace([1, 2, 3]):  # comes after it
                model.layers[1].output.save()
            assert "was cancelled by its client" in server.log

    def test_is_called_when_a_detached_job_is_fetched(self, served):
        taken: list[torch.Tensor] = []
        with served["gpt2"].trace(DATA[0], blocking=False) as trace:
            served["gpt2"].layers[1].output.save(to=taken.append)
        assert not taken

        assert trace.job.fetch() == [None]

        torch.testing.assert_close(taken, [plain("gpt2", [DATA[0]], 1)])


class TestATensor:
    def test_receives_a_value(self, served):
        into = torch.full((1, 5, tiny.WIDTH), 7.0)
        with served["gpt2"].trace(DATA[0]):
            hidden = served["gpt2"].layers[1].output.save(to=into)

        assert hidden.value.data_ptr() == into.data_ptr()
        torch.testing.assert_close(into, plain("gpt2", [DATA[0]], 1))

    def test_receives_every_iteration_of_a_loop(self, served):
        into = torch.empty(3, 2, 5, tiny.WIDTH)

        hidden = over(served["gpt2"], None, to=into)

        torch.testing.assert_close(into, torch.stack([plain("gpt2", DATA[each : each + 2], 1) for each in (0, 2, 4)]))
        assert hidden.value.data_ptr() == into.data_ptr()

    def test_of_another_shape_or_dtype_is_refused(self, served):
        for into in (torch.empty(1, 4, tiny.WIDTH), torch.empty(1, 5, tiny.WIDTH, dtype=torch.float64)):
            with (
                pytest.raises(patchwire.ShapeError, match="does not fit into") as caught,
                served["gpt2"].trace(DATA[0]),
            ):
                served["gpt2"].layers[1].output.save(to=into)
            assert "save(to=into)" in caught.value.lines[0].code

    def test_without_room_for_all_iterations_is_refused(self, served):
        with pytest.raises(patchwire.GraphError, match="no room for iteration 2"):
            over(served["gpt2"], None, to=torch.empty(2, 2, 5, tiny.WIDTH))


@pytest.mark.parametrize("to", [3, torch.ones(4, 4).t(), torch.ones(2, device="meta")], ids=["3", "strided", "meta"])
def test_what_is_neither_is_refused_at_its_line(served, to):
    with pytest.raises(patchwire.GraphError, match="cannot be saved to a") as caught, served["gpt2"].trace(DATA[0]):
        served["gpt2"].layers[1].output.save(to=to)

    assert "save(to=to)" in caught.value.lines[0].code


def test_a_tensor_goes_when_the_program_lets_go_of_it(served):
    gc.disable()
    try:
        with served["gpt2"].trace(DATA[0]):
            hidden = served["gpt2"].layers[1].output.save()
        tensor = weakref.ref(hidden.value)
        del hidden

        assert tensor() is None
    finally:
        gc.enable()


def memory(pid: int, what: str) -> int:
    """Bytes of memory of a process: VmRSS has them now, VmHWM at their most."""
    found = re.search(rf"^{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


MIB = 1 << 20


def peaks(server: Server, mib: int, take) -> dict[str, int]:
    """The bytes of memory that worker and client had more than before, while so many MiB came in pieces of 4 MiB."""
    model = patchwire.connect(server.address, progress=False).model()

    def run(count: int) -> None:
        with model.session() as session, session.repeat(count), model.trace([1, 2, 3]):
            model.layers[0].output.new_ones(MIB).save(to=take)

    run(2)
    pids = {"worker": server.process.pid, "client": os.getpid()}
    for pid in pids.values():
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # its peak is what it has now
    before = {name: memory(pid, "VmHWM") for name, pid in pids.items()}
    run(mib // 4)
    return {name: memory(pid, "VmHWM") - before[name] for name, pid in pids.items()}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is told by Linux")
class TestMemory:
    def test_of_both_ends_is_less_than_what_streams_through(self, checkpoints):
        with Server({"gpt2": checkpoints["gpt2"]}) as server:
            more = peaks(server, 320, lambda tensor: None)

        assert max(more.values()) < 160 * MIB

    def test_is_bounded_when_the_client_is_slower_than_the_model(self, checkpoints):
        busy = threading.Event()
        with Server({"gpt2": checkpoints["gpt2"]}) as server:
            more = peaks(server, 320, lambda tensor: busy.wait(0.03))

        assert max(more.values()) < 160 * MIB

    @pytest.mark.slow
    def test_stays_bounded_for_much_more(self, checkpoints):
        with Server({"gpt2": checkpoints["gpt2"]}) as server:
            more = peaks(server, 2048, lambda tensor: None)

        assert max(more.values()) < 160 * MIB


def test_more_than_may_wait_for_a_slow_client_is_refused(checkpoints):
    taken: list[int] = []

    def take(tensor: torch.Tensor) -> None:
        if not taken:
            threading.Event().wait(5)  # the model makes a hundred of them meanwhile
        taken.append(tensor.nbytes)

    with (
        Server({"gpt2": checkpoints["gpt2"]}, limits={"waiting_bytes": 20 * MIB}) as server,
        patchwire.connect(server.address, progress=False) as client,
    ):
        model = client.model()
        many = model.session()
        with (
            pytest.raises(patchwire.LimitError, match="that nobody has taken yet"),
            many as session,
            session.repeat(100),
            model.trace([1, 2, 3]),
        ):
            model.layers[0].output.new_ones(MIB).save(to=take)
        with model.trace([1, 2, 3]):
            hidden = model.layers[0].output.save()
        assert hidden.value.shape == (1, 3, tiny.WIDTH)
