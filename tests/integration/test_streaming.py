"""What comes back, and when: every value as soon as it exists, as it was asked for."""

from __future__ import annotations

import pytest
import torch

import patchwire
from integration import messages
from patchwire import tensors
from patchwire.v1 import service_pb2, tensor_pb2


def kinds(events) -> list[str]:
    return [event.WhichOneof("kind") for event in events]


class TestEvents:
    def test_of_a_request_without_a_pass_come_in_one_response(self, stub):
        graph = messages.graph("gpt2", messages.parameter("lm_head.weight"), messages.save(0))

        assert len(list(stub.Run(service_pb2.RunRequest(graph=graph)))) == 1

    def test_a_value_is_sent_while_the_pass_runs_on(self, strict_stub, authorized):
        # The first layer's value is all that is cheap: what follows at the last layer takes a while.
        work = [messages.call("torch.Tensor.new_ones", messages.node(1), [1500, 1500])]
        work += [messages.call("operator.matmul", messages.node(2), messages.node(each)) for each in range(2, 7)]
        nodes = [messages.read("layers.0.output"), messages.read("layers.39.output"), *work]
        last = len(nodes) - 1
        graph = messages.graph("deep", *nodes, messages.call("torch.sum", messages.node(last)))
        graph.nodes.extend([messages.save(0), messages.save(last + 1)])

        events = messages.events(strict_stub.Run(service_pb2.RunRequest(graph=graph), metadata=authorized))
        arrived = []
        for event in events:
            arrived.append(event)
            if event.WhichOneof("kind") == "chunk":
                break
        assert kinds(arrived) == ["running", "saved", "chunk"]
        assert arrived[1].saved.node == last + 2
        # It is still busy: whoever asks now has to wait behind it.
        small = messages.graph("deep", messages.read("layers.0.output"), messages.save(0))
        other = messages.events(strict_stub.Run(service_pb2.RunRequest(graph=small), metadata=authorized))
        assert next(other).HasField("queued")
        assert kinds(events) == ["saved", "chunk", "done"]

    def test_values_come_in_the_order_of_their_sites_not_of_their_saves(self, stub):
        reads = [messages.read(f"layers.{layer}.output") for layer in (2, 1, 0)]
        graph = messages.graph("gpt2", *reads, *(messages.save(each) for each in range(3)))

        events = messages.events(stub.Run(service_pb2.RunRequest(graph=graph)))

        assert [event.saved.node for event in events if event.HasField("saved")] == [5, 4, 3]

    def test_a_long_value_comes_in_several_chunks(self, stub):
        nodes = [messages.read("layers.0.output"), messages.call("torch.Tensor.new_ones", messages.node(0), [3 << 18])]
        graph = messages.graph("gpt2", *nodes, messages.save(1))

        events = list(messages.events(stub.Run(service_pb2.RunRequest(graph=graph))))

        assert kinds(events) == ["running", "saved", *["chunk"] * 3, "done"]

    def test_the_last_tells_what_it_cost(self, stub):
        graph = messages.graph("gpt2", messages.read("layers.0.output"), messages.save(0), rows=[[1, 2], [3]])

        *_, last = messages.events(stub.Run(service_pb2.RunRequest(graph=graph)))

        assert (last.done.passes, last.done.rows) == (1, 2)
        assert last.done.modules_skipped > 0
        assert last.done.result_bytes == 2 * 2 * 24 * 4


def test_a_pass_ends_after_the_last_site_that_is_needed(served):
    with served["gpt2"].trace([1, 2, 3]) as early:
        served["gpt2"].layers[0].output.save()
    with served["gpt2"].trace([1, 2, 3]) as late:
        served["gpt2"].logits.save()

    assert early.stats.modules_skipped > late.stats.modules_skipped == 0


def test_what_needs_no_model_runs_no_pass(served):
    with served["gpt2"].trace([1, 2, 3]) as trace:
        norm = served["gpt2"].lm_head.weight.norm().save()

    assert trace.stats.passes == 0
    assert norm.value.ndim == 0


class TestCompression:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
    def test_changes_nothing_in_the_values(self, server, dtype):
        with patchwire.connect(server.address, compression="zstd", progress=False) as client:
            model = client.model("gpt2")
            with model.trace([1, 2, 3]):
                hidden = model.layers[1].output
                packed, plain = (hidden * 100).to(dtype).save(), hidden.save()

        assert torch.equal(packed.value, (plain.value * 100).to(dtype))

    def test_makes_fewer_bytes_of_what_repeats(self, stub):
        nodes = [messages.read("layers.0.output"), messages.call("torch.Tensor.new_ones", messages.node(0), [3 << 18])]
        graph = messages.graph("gpt2", *nodes, messages.save(1))

        events = list(
            messages.events(stub.Run(service_pb2.RunRequest(graph=graph, compression=tensor_pb2.COMPRESSION_ZSTD)))
        )

        assembly = tensors.Assembly(events[1].saved.header)
        for event in events[2:-1]:
            assembly.add(event.chunk)
        assert torch.equal(assembly.tensor(), torch.ones(3 << 18))
        assert sum(len(event.chunk) for event in events) < 10_000

    def test_of_another_kind_is_refused_before_anything_is_sent(self, server):
        with pytest.raises(ValueError, match="not 'gzip'"):
            patchwire.connect(server.address, compression="gzip")


class TestNarrowDtypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64])
    def test_come_as_asked_for(self, served, dtype):
        with served["gpt2"].trace([1, 2, 3]):
            hidden = served["gpt2"].layers[1].output
            narrow, wide = hidden.save(dtype=dtype), hidden.save()

        assert narrow.value.dtype is dtype
        assert torch.equal(narrow.value.float(), wide.value.to(dtype).float())

    def test_halve_the_bytes(self, served):
        with served["gpt2"].trace([1, 2, 3]) as narrow:
            served["gpt2"].layers[1].output.save(dtype=torch.bfloat16)
        with served["gpt2"].trace([1, 2, 3]) as wide:
            served["gpt2"].layers[1].output.save()

        assert narrow.stats.result_bytes * 2 == wide.stats.result_bytes


class TestResults:
    """A saved value behaves as its tensor."""

    @pytest.fixture
    def saved(self, served):
        with served["gpt2"].trace([1, 2, 3]):
            hidden = served["gpt2"].layers[1].output.save()
        return hidden

    def test_in_torch_functions_operators_and_methods(self, saved):
        assert torch.equal(torch.softmax(saved, -1), saved.value.softmax(-1))
        assert torch.equal(saved + 1, saved.value + 1)
        assert torch.equal(1 - saved, 1 - saved.value)
        assert saved.mean().item() == saved.value.mean().item()

    def test_in_numpy_and_in_python(self, saved):
        assert saved.numpy().shape == (1, 3, 24)
        assert float(saved[0, 0, 0]) == saved.value[0, 0, 0].item()
        assert bool((saved == saved).all())
        assert len(saved) == 1

    def test_in_shape_and_dtype(self, saved):
        assert (saved.shape, saved.dtype, saved.ndim) == (torch.Size([1, 3, 24]), torch.float32, 3)

    def test_that_is_of_this_program_and_may_be_changed(self, saved):
        saved[:] = 0

        assert saved.value.abs().sum() == 0

    def test_as_a_constant_of_the_next_trace(self, served, saved):
        with served["gpt2"].trace([4, 5, 6]):
            served["gpt2"].layers[1].output = saved
            after = served["gpt2"].layers[1].output.save()

        assert torch.equal(after.value, saved.value)
