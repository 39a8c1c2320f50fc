"""Values that a server keeps beyond the request: later blocks use them, and their bytes do not travel."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta

import grpc
import pytest
import torch

import patchwire
import tiny
from integration import messages
from integration.refusals import refused
from patchwire.status import error_from_call
from patchwire.v1 import graph_pb2, service_pb2
from serving import Server

PROMPT = tiny.prompt(6)
OTHER = tiny.prompt(6, seed=1)
LIMITS = {"kept_bytes": 100_000, "kept_seconds": 5000.0}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that keeps little."""
    with Server({"gpt2": tiny.save("gpt2", tmp_path_factory.mktemp("small") / "gpt2")}, limits=LIMITS) as server:
        yield server


@pytest.fixture
def little(small) -> Iterator[patchwire.Model]:
    """A model on the server that keeps little."""
    with patchwire.connect(small.address, progress=False) as client:
        yield client.model()


@pytest.fixture
def model(served):
    return served["gpt2"]


@pytest.fixture
def hidden(model) -> torch.Tensor:
    """What is kept in most tests."""
    with model.trace(PROMPT):
        hidden = model.layers[1].output.save()
    return hidden.value


@pytest.fixture
def kept(model) -> Iterator[patchwire.Kept]:
    with model.trace(PROMPT):
        kept = model.layers[1].output.keep(seconds=60)
    yield kept
    kept.forget()


def keep_and_fail(model) -> patchwire.Kept:
    """Keep a value in a request that does not end well."""
    block = model.trace(PROMPT)
    block.__enter__()
    kept = model.logits.new_ones(15_000).keep()
    torch.linalg.inv(model.logits.new_zeros(2, 2)).save()
    with pytest.raises(patchwire.ExecutionError):
        block.__exit__(None, None, None)
    return kept


def test_a_kept_value_is_described_when_its_block_has_ended(kept, hidden):
    assert kept.shape == hidden.shape
    assert kept.dtype == hidden.dtype
    assert len(kept) == 1
    assert timedelta(seconds=30) < kept.expires - datetime.now() <= timedelta(seconds=60)
    assert "[1, 6, 24] float32" in repr(kept)


def test_it_is_the_value_that_it_was(model, kept, hidden):
    with model.trace(OTHER):
        back = (kept * 1).save()

    assert torch.equal(back.value, hidden)


@pytest.mark.parametrize(
    "use",
    [
        lambda kept, value: kept + value,
        lambda kept, value: value + kept,
        lambda kept, value: 2 - kept,
        lambda kept, value: torch.relu(kept),
        lambda kept, value: torch.cat([value, kept], 1),
        lambda kept, value: torch.where(value > kept, value, kept),
        lambda kept, value: kept[:, -1] @ value[0].T,
        lambda kept, value: kept.sum(-1),
        lambda kept, value: -kept.mT,
        lambda kept, value: torch.stack(list(kept[0])) == value[0],
    ],
)
def test_it_is_computed_with_as_its_tensor_would_be(model, kept, hidden, use):
    with model.trace(OTHER):
        other = model.layers[1].output.save()
        found = use(kept, other).save()

    torch.testing.assert_close(found.value, use(hidden, other.value))


def test_it_is_written_to_sites(model, kept, hidden):
    with model.trace(OTHER):
        model.layers[1].output = kept
        whole = model.logits.save()
    with model.trace(OTHER):
        model.layers[1].output[:, -1] = kept[:, -1]
        part = model.logits.save()
    with model.trace(OTHER):
        model.layers[1].output = hidden
        whole_sent = model.logits.save()
    with model.trace(OTHER):
        model.layers[1].output[:, -1] = hidden[:, -1]
        part_sent = model.logits.save()

    assert torch.equal(whole.value, whole_sent.value)
    assert torch.equal(part.value, part_sent.value)


def test_modules_are_applied_to_it(model, kept, hidden):
    with model.trace(OTHER):
        lens = model.lm_head(model.norm(kept)).save()
        sent = model.lm_head(model.norm(hidden)).save()

    assert torch.equal(lens.value, sent.value)


def test_there_are_gradients_with_respect_to_it(model, kept, hidden):
    def gradient(start):
        with model.trace(OTHER):
            moved = start * 1
            model.layers[1].output = moved
            found = patchwire.grad(model.logits[0, -1, 5], moved).save()
        return found.value

    assert torch.equal(gradient(kept), gradient(hidden))


def test_an_edit_in_place_changes_the_copy_of_its_block_only(model, kept, hidden):
    with model.trace(OTHER):
        kept[:, 0] = 0
        edited = (kept * 1).save()
    with model.session(), model.trace(OTHER):
        later = (kept * 1).save()

    assert edited.value[:, 0].abs().max() == 0
    assert torch.equal(edited.value[:, 1:], hidden[:, 1:])
    assert torch.equal(later.value, hidden)


def test_its_own_session_uses_it_as_the_value(model, hidden):
    with model.session():
        with model.trace(PROMPT):
            kept = model.layers[1].output.keep(seconds=60)
        with model.trace(OTHER):
            twice = (kept * 2).save()
    kept.forget()

    assert torch.equal(twice.value, hidden * 2)


def test_what_was_edited_after_it_was_kept_shows_the_edit(model):
    with model.trace(PROMPT):
        value = model.layers[1].output * 1
        kept = value.keep(seconds=60)
        value[:] = 3.0
    with model.trace(OTHER):
        back = (kept * 1).save()

    assert torch.equal(back.value, torch.full((1, 6, 24), 3.0))
    kept.forget()


def test_it_can_be_kept_again_and_on_another_connection(server, kept, hidden):
    with patchwire.connect(server.address, progress=False) as client:
        other = client.model("llama")
        with other.trace(OTHER):
            half = (kept / 2).keep(seconds=30)
        with other.trace(OTHER):
            back = (half * 2).save()
        half.forget()

    assert torch.equal(back.value, hidden)


class TestIsRefused:
    def test_when_it_was_forgotten(self, model):
        with model.trace(PROMPT):
            kept = model.layers[1].output.keep(seconds=60)
        kept.forget()

        with refused(patchwire.GraphError, "not on this server", hint="again"), model.trace(PROMPT):
            (kept + 1).save()  # this line

    def test_when_its_time_is_over(self, model):
        with model.trace(PROMPT):
            kept = model.layers[1].output.keep(seconds=1e-6)

        with refused(patchwire.GraphError, "its time is over"), model.trace(PROMPT):
            model.layers[1].output[:] = kept  # this line

    def test_outside_of_blocks(self, kept):
        with refused(patchwire.GraphError, "in a block only", hint=r"\.save\(\)"):
            kept + 1  # this line

    def test_before_its_block_has_ended(self, model, served):
        with refused(patchwire.GraphError, "has not ended"), model.trace(PROMPT):
            kept = model.layers[1].output.keep()
            kept.forget()  # this line

    def test_when_the_run_failed(self, model):
        kept = keep_and_fail(model)

        with refused(patchwire.GraphError, "was not kept"), model.trace(PROMPT):
            (kept + 1).save()  # this line

    def test_after_its_block(self, model):
        with model.trace(PROMPT):
            logits = model.logits.save()
        with refused(patchwire.GraphError, "nothing can be kept any more", hint="inside"):
            logits.keep()  # this line

    def test_as_part_of_an_edit(self, model):
        with refused(patchwire.GraphError, "What stays with a model cannot keep", hint="edited model"), model.edit():
            model.logits.keep()  # this line

    def test_of_a_step_that_the_generation_did_not_reach(self, model):
        with (
            refused(patchwire.ExecutionError, "step that was not reached cannot be kept", hint="min_new_tokens"),
            model.generate(PROMPT, max_new_tokens=20) as gen,
        ):
            for _ in gen.all():
                late = model.layers[0].output
                model.lm_head.output[:, :, 0] = 1000  # the token that ends it
            late.keep()  # this line

    def test_when_it_turns_out_to_be_several_tensors(self, model):
        with refused(patchwire.ExecutionError, "cannot be kept: it is not a tensor", hint="items"), model.trace(PROMPT):
            hidden = model.layers[0].output
            torch.topk(hidden[hidden > hidden.min()], 2).keep()  # this line

    @pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "long", True])
    def test_for_no_time(self, model, seconds):
        with refused(patchwire.GraphError, "cannot be kept for"), model.trace(PROMPT):
            model.logits.keep(seconds=seconds)  # this line

    def test_for_longer_than_the_server_keeps_anything(self, little):
        with refused(patchwire.LimitError, "5001 seconds", "5000"), little.trace(PROMPT):
            little.logits.keep(seconds=5001)  # this line

    def test_when_the_server_is_full_and_others_stay(self, little):
        kept = []
        for _ in range(3):
            with little.trace(PROMPT):
                kept.append(little.logits.new_ones(8_000).keep())
        with refused(patchwire.LimitError, "32,000 bytes cannot be kept", hint=r"forget\(\)"), little.trace(PROMPT):
            little.logits.new_ones(8_000).keep()  # this line
        with little.trace(PROMPT):
            total = sum(each.sum() for each in kept).save()
        for each in kept:
            each.forget()

        assert total.value == 24_000

    def test_a_request_that_fails_leaves_nothing_behind(self, little):
        for _ in range(5):
            keep_and_fail(little)
        with little.trace(PROMPT):
            kept = little.logits.new_ones(15_000).keep()
        kept.forget()


def test_a_block_that_only_keeps_does_not_warn(model, recwarn):
    with model.trace(PROMPT):
        kept = model.layers[1].output.keep(seconds=5)
    kept.forget()

    assert not recwarn.list


class TestOverTheWire:
    def test_a_handle_cannot_be_guessed_or_made_up(self, stub):
        for handle in (b"", b"\0" * 16, b"x" * 100_000):
            graph = messages.graph(
                "gpt2", graph_pb2.Node(constant=0), messages.save(0), messages.read("logits"), messages.save(2)
            )
            graph.constants.add(kept=handle)
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Run(service_pb2.RunRequest(graph=graph)))
            assert type(error_from_call(caught.value, "here")) is patchwire.GraphError

    def test_handles_are_long_and_differ(self, stub):
        keep = graph_pb2.Node(keep=graph_pb2.Keep(value=0, seconds=1.0))
        graph = messages.graph("gpt2", messages.read("logits"), keep, keep)

        kept = [
            each.kept
            for each in messages.events(stub.Run(service_pb2.RunRequest(graph=graph)))
            if each.HasField("kept")
        ]

        assert len({each.handle for each in kept}) == 2
        assert all(len(each.handle) >= 16 for each in kept)

    @pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), 1e300])
    def test_no_time_is_a_clear_error(self, stub, seconds):
        keep = graph_pb2.Node(keep=graph_pb2.Keep(value=0, seconds=seconds))
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(service_pb2.CheckRequest(graph=messages.graph("gpt2", messages.read("logits"), keep)))

        assert type(error_from_call(caught.value, "here")) is patchwire.LimitError

    def test_nothing_depends_on_a_keep(self, stub):
        keep = graph_pb2.Node(keep=graph_pb2.Keep(value=0, seconds=1.0))
        graph = messages.graph("gpt2", messages.read("logits"), keep, messages.save(1))
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(service_pb2.CheckRequest(graph=graph))

        assert "has no value" in error_from_call(caught.value, "here").message

    def test_forgetting_asks_for_the_token(self, strict_stub):
        with pytest.raises(grpc.RpcError) as caught:
            strict_stub.Forget(service_pb2.ForgetRequest(handles=[b"x"]))

        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_what_was_kept_for_a_request_that_was_cancelled_later_is_forgotten(server):
    large = messages.call("torch.Tensor.new_zeros", messages.node(0), [64 << 20])
    graph = messages.graph("gpt2", messages.read("logits"), large)
    graph.nodes.add().keep.MergeFrom(graph_pb2.Keep(value=0, seconds=1000))
    graph.nodes.append(messages.save(1))
    channel, stub = messages.stub(server.address)
    with channel:
        events = stub.Run(service_pb2.RunRequest(graph=graph))
        handle = next(each.kept.handle for each in messages.events(events) if each.HasField("kept"))
        events.cancel()
    channel, stub = messages.stub(server.address)
    with channel:
        use = messages.graph("gpt2", graph_pb2.Node(constant=0), messages.save(0))
        use.constants.add().kept = handle
        deadline = time.monotonic() + 60
        while _is_kept(stub, use):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def _is_kept(stub, graph: graph_pb2.Graph) -> bool:
    try:
        stub.Check(service_pb2.CheckRequest(graph=graph))
    except grpc.RpcError as error:
        if "is not on this server" not in error_from_call(error, "here").message:
            raise
        return False
    return True


def test_a_kept_value_is_saved_as_any_other_even_beside_nnsight(little: patchwire.Model) -> None:
    import nnsight  # noqa: F401 - it gives every object a `save`

    with little.trace(PROMPT):
        kept = little.layers[0].output.keep()
        expected = little.layers[0].output.save()
    with little.trace(OTHER):
        again = kept.save()
    torch.testing.assert_close(again.value, expected.value)
