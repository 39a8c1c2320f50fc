"""Loops that run on the server, against the same loops in plain PyTorch around the Hugging Face model."""

# ruff: noqa: SIM117  the blocks of a session and of a loop are what is tested
from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest
import torch
from torch import Tensor

import patchwire
import tiny
from conformance.hooks import assert_same
from integration import messages
from integration.refusals import refused
from patchwire.status import error_from_call
from patchwire.v1 import graph_pb2 as pb
from patchwire.v1 import service_pb2
from serving import Server

WIDTH = tiny.WIDTH
PROMPT = tiny.prompt(5)
DATA = [tiny.prompt(length, seed=length) for length in (3, 7, 5, 2, 9, 4, 4, 6, 1, 8)]
LAYERS = {"gpt2": "transformer.h.1", "llama": "model.layers.1", "mamba": "backbone.layers.1"}


@pytest.fixture
def model(served):
    return served["gpt2"]


def hidden_states(reference, ids: list[int], path: str) -> Tensor:
    """What a plain hook sees at a layer's output, `[seq, width]`."""
    found = []
    handle = reference.get_submodule(path).register_forward_hook(
        lambda module, args, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        reference(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    return found[0].reshape(-1, WIDTH)


@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_and_covariance_of_a_ragged_data_set(served, references, name):
    model = served[name]
    with model.session() as session:
        with session.over(DATA, batch_size=4) as batches:
            count = batches.carry(torch.tensor(0))
            total = batches.carry(torch.zeros(WIDTH))
            second = batches.carry(torch.zeros(WIDTH, WIDTH))
            with model.trace(batches.prompt) as trace:
                h = model.layers[1].output
            h = torch.where(trace.mask()[..., None], h, 0)
            count += trace.mask().sum()
            total += h.sum((0, 1))
            batches.update(second, second + torch.einsum("bsi,bsj->ij", h, h))
        n = batches.result(count).save()
        mean = (batches.result(total) / batches.result(count)).save()
        moment = (batches.result(second) / batches.result(count)).save()

    states = torch.cat([hidden_states(references[name], ids, LAYERS[name]) for ids in DATA])
    assert n.value == len(states)
    assert_same(mean.value, states.mean(0))
    assert_same(moment.value, states.T @ states / len(states))
    assert batches.count == batches.iterations == 3
    assert session.stats.passes == 3
    assert session.stats.rows == len(DATA)


def test_the_examples_that_most_excite_each_neuron(model, references):
    with model.session() as session:
        with session.over(DATA, batch_size=1) as batches:
            best = batches.carry(torch.full((3, WIDTH), -torch.inf))
            which = batches.carry(torch.full((3, WIDTH), -1))
            with model.trace(batches.prompt):
                top = model.layers[1].output.amax((0, 1))
            all_best = torch.cat([best, top[None]])
            all_which = torch.cat([which, batches.index.expand(1, WIDTH)])
            values, places = all_best.topk(3, dim=0)
            batches.update(best, values)
            batches.update(which, all_which.gather(0, places))
        found = patchwire.save([batches.result(best), batches.result(which)])

    states = torch.stack([hidden_states(references["gpt2"], ids, LAYERS["gpt2"]).amax(0) for ids in DATA])
    expected, _ = states.topk(3, dim=0)
    assert_same(found[0].value, expected)
    # Not the places themselves: examples that begin alike may be equal.
    assert_same(states.gather(0, found[1].value), expected)


def optimised_in_torch(reference, make, steps: int) -> tuple[Tensor, Tensor]:
    v = torch.zeros(WIDTH, requires_grad=True)
    optimiser, losses = make([v]), []

    def add(module, args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, -1] += v
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = reference.get_submodule(LAYERS["gpt2"]).register_forward_hook(add)
    for _ in range(steps):
        logits = reference(input_ids=torch.tensor([PROMPT]), use_cache=False).logits
        loss = -logits[0, -1].log_softmax(-1)[5]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    handle.remove()
    return v.detach(), torch.stack(losses)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (patchwire.optim.Adam(lr=0.05), lambda v: torch.optim.Adam(v, lr=0.05)),
        (
            patchwire.optim.Adam(lr=0.1, betas=(0.8, 0.95), eps=1e-4),
            lambda v: torch.optim.Adam(v, lr=0.1, betas=(0.8, 0.95), eps=1e-4),
        ),
        (patchwire.optim.SGD(lr=0.02), lambda v: torch.optim.SGD(v, lr=0.02)),
        (patchwire.optim.SGD(lr=0.01, momentum=0.9), lambda v: torch.optim.SGD(v, lr=0.01, momentum=0.9)),
    ],
)
def test_an_optimised_edit_vector(model, references, ours, theirs):
    with model.session() as session:
        with session.repeat(12) as loop:
            v = loop.carry(torch.zeros(WIDTH))
            with model.trace(PROMPT):
                model.layers[1].output[:, -1] += v
                loss = -model.logits[0, -1].log_softmax(-1)[5]
            losses = loss.save()
            loop.step(ours, loss, [v])
        final = loop.result(v).save()

    expected, expected_losses = optimised_in_torch(references["gpt2"], theirs, 12)
    assert losses.shape == (12,)
    torch.testing.assert_close(losses.value, expected_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final.value, expected, rtol=1e-5, atol=1e-6)
    assert losses[-1] < losses[0]
    assert session.stats.passes == 12


def test_backward_and_a_step_written_by_hand(model, references):
    with model.session() as session:
        with session.repeat(6) as loop:
            v = loop.carry(torch.zeros(WIDTH))
            with model.trace(PROMPT):
                model.layers[1].output[:, -1] += v
                loss = -model.logits[0, -1].log_softmax(-1)[5]
            loss.backward()
            loop.update(v, v - 0.02 * v.grad)
        final = loop.result(v).save()

    expected, _ = optimised_in_torch(references["gpt2"], lambda v: torch.optim.SGD(v, lr=0.02), 6)
    torch.testing.assert_close(final.value, expected, rtol=1e-5, atol=1e-6)


def test_a_sparse_autoencoder_is_trained_next_to_the_model(model, references):
    torch.manual_seed(0)
    encoder, decoder = torch.randn(WIDTH, 40) * 0.1, torch.randn(40, WIDTH) * 0.1
    data = [tiny.prompt(6, seed=seed) for seed in range(8)]

    with model.session() as session:
        with session.over(data, batch_size=2) as batches:
            into, out = batches.carry(encoder), batches.carry(decoder)
            with model.trace(batches.prompt):
                x = model.layers[1].output.flatten(0, 1)
            features = torch.relu(x @ into)
            loss = ((features @ out - x) ** 2).mean() + 0.01 * features.abs().mean()
            losses = loss.save()
            batches.step(patchwire.optim.Adam(lr=0.01), loss, [into, out])
        trained = patchwire.save([batches.result(into), batches.result(out)])

    parameters = [encoder.clone().requires_grad_(), decoder.clone().requires_grad_()]
    optimiser, expected = torch.optim.Adam(parameters, lr=0.01), []
    for start in range(0, 8, 2):
        x = torch.cat([hidden_states(references["gpt2"], ids, LAYERS["gpt2"]) for ids in data[start : start + 2]])
        features = torch.relu(x @ parameters[0])
        loss = ((features @ parameters[1] - x) ** 2).mean() + 0.01 * features.abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        expected.append(loss.detach())
    torch.testing.assert_close(losses.value, torch.stack(expected), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(trained, parameters, strict=True):
        torch.testing.assert_close(ours.value, theirs.detach(), rtol=1e-4, atol=1e-5)


class TestValuesFromOutside:
    def test_are_used_in_the_body_and_after_it(self, model):
        with model.session() as session:
            with model.trace(PROMPT):
                clean = model.layers[0].output
                last = clean[:, -1]
                clean_saved = clean.save()
            with session.repeat(3) as loop:
                total = loop.carry(torch.zeros(1, WIDTH))
                with model.trace(tiny.prompt(5, seed=2)):
                    model.layers[0].output = clean * 1
                    logits = model.logits.save()
                total += last + clean[:, 0]
            result = (loop.result(total) - last).save()
        with model.trace(PROMPT):
            expected = model.logits.save()

        assert logits.shape == (3, *expected.shape)
        assert all(torch.equal(each, expected.value) for each in logits.value)
        torch.testing.assert_close(result.value, 2 * clean_saved[:, -1] + 3 * clean_saved[:, 0])

    def test_may_be_kept_ones_tensors_and_saved_ones(self, model):
        large = torch.arange(40_000.0)
        with model.trace(PROMPT):
            kept = model.layers[0].output.keep(seconds=60)
            saved = model.layers[0].output.save()
        with model.session() as session:
            with session.repeat(2) as loop:
                total = loop.carry(kept)
                total += saved + kept + large[-1]
                total += large.sum() * 0 + torch.relu(kept) * 0
            result = loop.result(total).save()
            again = loop.result(total).keep(seconds=60)
        with model.session(), model.trace(PROMPT):
            back = (again * 1).save()
        for each in (kept, again):
            each.forget()

        torch.testing.assert_close(result.value, 5 * saved.value + 2 * large[-1], rtol=1e-5, atol=1e-2)
        assert torch.equal(back.value, result.value)

    def test_are_written_to_sites(self, model):
        with model.trace(PROMPT):
            kept = model.layers[0].output.keep(seconds=60)
        with model.session() as session:
            with model.trace(PROMPT):
                clean = model.layers[0].output
            with session.repeat(2), model.trace(tiny.prompt(5, seed=2)):
                model.layers[0].output = clean
                one = model.logits.save()
            with session.repeat(2), model.trace(tiny.prompt(5, seed=2)):
                model.layers[0].output = kept
                other = model.logits.save()
        kept.forget()
        with model.trace(PROMPT):
            expected = model.logits.save()

        assert torch.equal(one.value, expected.value.expand(2, 1, -1, -1))
        assert torch.equal(other.value, one.value)

    def test_of_its_own_session_may_be_kept_before_the_loop(self, model):
        with model.session() as session:
            with model.trace(PROMPT):
                kept = model.layers[0].output.keep(seconds=60)
            with session.repeat(3) as loop:
                total = loop.carry(kept)
                total += kept
            result = loop.result(total).save()
        with model.trace(PROMPT):
            back = (kept * 4).save()
        kept.forget()

        torch.testing.assert_close(result.value, back.value)

    def test_of_a_shape_that_depends_on_values(self, model):
        with model.session() as session:
            with model.trace(PROMPT):
                positive = model.logits[model.logits > 0]
                expected = positive.save()
            with session.repeat(2) as loop:
                total = loop.carry(positive)
                total += positive
            result = loop.result(total).save()

        torch.testing.assert_close(result.value, 3 * expected.value)

    def test_have_gradients_in_the_body(self, model):
        with model.session() as session:
            with model.trace(PROMPT):
                start = model.layers[0].output
            with session.repeat(2) as loop:
                n = loop.carry(torch.tensor(1.0))
                with model.trace(PROMPT):
                    model.layers[0].output = start * n
                    loss = model.logits[0, -1, 3]
                gradients = patchwire.grad(loss, start).save()
                n += 1
        found = []
        for factor in (1.0, 2.0):
            with model.trace(PROMPT):
                inner = model.layers[0].output * 1
                model.layers[0].output = inner * factor
                found.append(patchwire.grad(model.logits[0, -1, 3], inner).save())

        torch.testing.assert_close(gradients.value, torch.stack([each.value for each in found]))


def test_a_soft_prompt_is_optimised(model):
    with model.session() as session:
        with session.repeat(8) as loop:
            soft = loop.carry(torch.zeros(4, WIDTH))
            with model.trace({"inputs_embeds": soft}):
                loss = -model.logits[0, -1].log_softmax(-1)[5]
            losses = loss.save()
            loop.step(patchwire.optim.SGD(lr=0.05), loss, [soft])
        result = loop.result(soft).save()
    with model.trace({"inputs_embeds": result.value}):
        after = (-model.logits[0, -1].log_softmax(-1)[5]).save()

    assert losses.value.diff().max() < 0
    assert after.value < losses.value[-1]


def test_gradients_before_and_after_a_loop_are_what_they_are_without_it(model):
    def gradients(*, loop: bool):
        with model.session() as session:
            with model.trace(PROMPT):
                h = model.layers[0].output
                first = model.logits[0, -1, 3]
            if loop:
                with session.repeat(2) as repeated:
                    n = repeated.carry(0.0)
                    with model.trace(PROMPT):
                        n += model.logits.sum()
                repeated.result(n).save()
            found = [patchwire.grad(first, h).save()]
            with model.trace(PROMPT):
                inner = model.layers[1].output
                found.append(patchwire.grad(model.logits[0, -1, 4], inner).save())
        return [each.value for each in found]

    for with_loop, without in zip(gradients(loop=True), gradients(loop=False), strict=True):
        assert torch.equal(with_loop, without)


def test_loops_and_traces_run_in_the_order_in_which_they_are_written(model):
    with model.session() as session:
        with session.repeat(3) as first:
            a = first.carry(1.0)
            a += first.index
        with session.over(DATA[:4], batch_size=3) as second:
            b = second.carry(first.result(a))
            with model.trace(second.prompt) as trace:
                pass
            second.update(b, b * 2 + trace.mask().sum())
        with model.trace(PROMPT):
            model.logits.save()
            result = second.result(b).save()

    assert result.value == (((1 + 3) * 2 + 15) * 2) + 2


def test_token_ids_are_those_of_each_iteration(model):
    with model.session() as session:
        with session.over(DATA, batch_size=4) as batches, model.trace(batches.prompt) as trace:
            ids = trace.token_ids().save()
            logits = model.logits[:, -1].save()
    with model.trace(DATA[8:]):
        expected = model.logits[:, -1].save()

    for start, found in zip(range(0, len(DATA), 4), ids.value, strict=True):
        rows = DATA[start : start + 4]
        assert found.tolist() == [[-1] * (max(map(len, rows)) - len(row)) + row for row in rows]
    assert_same(logits.value[2], expected.value)


def test_what_differs_in_shape_from_batch_to_batch_is_a_list(model):
    with model.session() as session:
        with session.over(DATA, batch_size=4) as batches, model.trace(batches.prompt):
            hidden = model.layers[0].output.save()
    for start, found in zip(range(0, len(DATA), 4), hidden.value, strict=True):
        with model.trace(DATA[start : start + 4]):
            expected = model.layers[0].output.save()
        assert_same(found, expected.value)

    with refused(patchwire.GraphError, "another shape for each iteration"), model.trace(PROMPT):
        model.layers[0].output = hidden  # this line


def test_a_batch_next_to_a_prompt_of_its_own(model):
    def patched(trace, prompt):
        with trace.invoke([1, 2, 3]):
            clean = model.layers[0].output[:, -1]
        with trace.invoke(prompt):
            model.layers[0].output[:, -1] = clean
            return model.logits[:, -1].save()

    with model.session() as session:
        with session.over(DATA) as batches, model.trace() as trace:
            found = patched(trace, batches.prompt)
    for ids, logits in zip(DATA, found.value, strict=True):
        with model.trace() as trace:
            expected = patched(trace, ids)
        assert_same(logits, expected.value)


def test_a_generation_in_a_loop(model):
    with model.session() as session, session.over([tiny.prompt(4, seed=seed) for seed in range(3)]) as batches:
        with model.generate(batches.prompt, max_new_tokens=3, min_new_tokens=3) as generation:
            output = generation.output.save()
    with model.generate(tiny.prompt(4, seed=1), max_new_tokens=3, min_new_tokens=3) as generation:
        expected = generation.output.save()

    assert output.shape == (3, 1, 7)
    assert torch.equal(output.value[1], expected.value)


# --- the end ----------------------------------------------------------------------------------------------------------

PROGRAM = """
import signal, sys, torch, patchwire
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background have it ignored
model = patchwire.connect(sys.argv[1], progress=False).model("gpt2")
with model.session() as session:
    with model.trace([1]) as trace:
        trace.log("running", model.logits[0, 0, 0])
    with session.repeat(100_000) as loop:
        n = loop.carry(torch.tensor(0))
        with model.trace([1, 2, 3]):
            model.logits[0, -1, 0].save()
        n += 1
    result = loop.result(n).save()
print("reached", int(result), loop.iterations)
"""


def test_ctrl_c_ends_the_loop_and_keeps_what_was_reached(server):
    program = subprocess.Popen(
        [sys.executable, "-u", "-c", PROGRAM, server.address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    assert "running" in program.stdout.readline()  # the server has it
    os.kill(program.pid, signal.SIGINT)
    said, errors = program.communicate(timeout=60)

    word, reached, iterations = said.split()
    assert (word, errors) == ("reached", "")
    assert 1 <= int(reached) == int(iterations) < 100_000


def test_interrupting_a_request_that_is_not_there_finds_none(client):
    assert not client.connection.interrupt(b"nobody")


# --- what is refused --------------------------------------------------------------------------------------------------


class TestIsRefused:
    def test_a_loop_in_a_loop(self, model):
        with refused(patchwire.GraphError, "in a loop"), model.session() as session, session.repeat(2):
            session.repeat(2).__enter__()  # this line

    def test_a_loop_in_a_trace(self, model):
        with refused(patchwire.GraphError, "in a trace"), model.session() as session, model.trace(PROMPT):
            session.repeat(2).__enter__()  # this line

    def test_a_loop_that_has_been_used(self, model):
        with refused(patchwire.GraphError, "used already", hint=r"session\.repeat"), model.session() as session:
            with session.repeat(2) as loop, model.trace(PROMPT):
                model.logits.sum().save()
            loop.__enter__()  # this line

    def test_a_loop_outside_of_its_session(self, model):
        with model.session() as session, model.trace(PROMPT):
            model.logits.sum().save()
        with refused(patchwire.GraphError, "in its session's block", hint=r"with model\.session"):
            session.repeat(2)  # this line

    def test_a_loop_of_no_model(self, client):
        with refused(patchwire.GraphError, "for which model", hint=r"model\.session"), client.session() as session:
            with session.repeat(2) as loop:  # this line
                x = loop.carry(torch.zeros(3))
                x += 1

    def test_carrying_what_is_made_in_the_body(self, model):
        with refused(patchwire.GraphError, "from outside of the loop", hint="before"), model.session() as session:
            with session.repeat(2) as loop, model.trace(PROMPT):
                loop.carry(model.logits)  # this line

    def test_carrying_what_turns_out_to_be_several_tensors(self, model):
        with refused(patchwire.ExecutionError, "A tuple cannot be given", hint="items"), model.session() as session:
            with model.trace(PROMPT):
                positive = model.logits[model.logits > 0]
                largest = torch.topk(positive, 2)
            with session.repeat(2):  # this line
                torch.neg(largest).save()

    def test_carrying_a_value_of_a_step_that_the_generation_did_not_reach(self, model):
        with refused(patchwire.ExecutionError, "step that was not reached", hint="min_new"), model.session() as session:
            with model.generate(PROMPT, max_new_tokens=20) as gen:
                for _ in gen.all():
                    late = model.layers[0].output
                    model.lm_head.output[:, :, 0] = 1000  # the token that ends it
            with session.repeat(2) as loop:  # this line
                x = loop.carry(late)
                x += 1
            loop.result(x).save()

    def test_streaming_tokens(self, model):
        with refused(patchwire.GraphError, "not streamed out of a loop", hint="output"), model.session() as session:
            with session.repeat(2), model.generate(PROMPT, max_new_tokens=2, stream=print):  # this line
                pass

    def test_more_values_than_the_server_sends(self, model):
        with refused(patchwire.LimitError, "1,100,000 values", hint="Carry"), model.session() as session:
            with session.repeat(100_000) as loop:  # this line
                for number in range(11):
                    (loop.index + number).save()

    @pytest.mark.parametrize("count", [0, -1, 2.5, "many", True, 2**32])
    def test_no_number_of_iterations(self, model, count):
        with refused(patchwire.GraphError, "times"), model.session() as session:
            session.repeat(count)  # this line

    @pytest.mark.parametrize(("data", "size"), [([], 1), ("text", 1), ([[1]], 0)])
    def test_no_data(self, model, data, size):
        with refused(patchwire.GraphError, "data set|batch"), model.session() as session:
            session.over(data, batch_size=size)  # this line

    def test_a_carried_value_that_never_changes(self, model):
        with refused(patchwire.GraphError, "never changes", hint="update"), model.session() as session:
            with session.repeat(2) as loop:
                total = loop.carry(torch.zeros(3))  # this line
                total = total + 1

    def test_an_edit_of_a_value_from_outside(self, model):
        with refused(patchwire.GraphError, "outside of the loop"), model.session() as session:
            with model.trace(PROMPT):
                total = model.logits * 0
            with session.repeat(2):
                total += 1  # this line

    def test_an_edit_of_a_kept_value(self, model):
        with model.trace(PROMPT):
            kept = model.logits.keep(seconds=60)
        with refused(patchwire.GraphError, "outside of the loop"), model.session() as session, session.repeat(2):
            kept[:] = 1  # this line

    def test_a_value_of_the_body_after_the_loop(self, model):
        with refused(patchwire.GraphError, "body of a loop", hint="result"), model.session() as session:
            with session.repeat(2) as loop:
                x = loop.carry(torch.zeros(3))
                x += 1
            (x + 1).save()  # this line

    def test_a_save_after_the_loop(self, model):
        with refused(patchwire.GraphError, "body of a loop", hint="result"), model.session() as session:
            with session.repeat(2) as loop:
                x = loop.carry(torch.zeros(3))
                x += 1
            x.save()  # this line

    def test_a_value_of_the_body_next_to_another_after_the_loop(self, model):
        with refused(patchwire.GraphError, "body of a loop", hint="result"), model.session() as session:
            with session.repeat(2) as loop:
                x = loop.carry(torch.zeros(3))
                x += 1
            with model.trace(PROMPT):
                torch.add(model.logits[0, 0, :3], x)  # this line

    def test_a_result_before_the_end(self, model):
        with refused(patchwire.GraphError, "has not ended"), model.session() as session, session.repeat(2) as loop:
            x = loop.carry(torch.zeros(3))
            loop.result(x)  # this line

    @pytest.mark.parametrize("value", [torch.zeros(4), torch.zeros(3, dtype=torch.float64), 1.0])
    def test_another_shape_or_dtype(self, model, value):
        with refused(patchwire.PatchwireError, "cannot become|not a value"), model.session() as session:
            with session.repeat(2) as loop:
                x = loop.carry(torch.zeros(3))
                loop.update(x, value)  # this line

    def test_a_second_update(self, model):
        with refused(patchwire.GraphError, "updated already"), model.session() as session, session.repeat(2) as loop:
            x = loop.carry(torch.zeros(3))
            loop.update(x, x + 1)
            loop.update(x, x + 1)  # this line

    def test_an_update_of_what_is_not_carried(self, model):
        with refused(patchwire.GraphError, "carries"), model.session() as session, session.repeat(2) as loop:
            x = loop.carry(torch.zeros(3))
            loop.update(x + 1, x)  # this line

    def test_keeping_in_the_body(self, model):
        with refused(patchwire.GraphError, "inside a loop", hint="result"), model.session() as session:
            with session.repeat(2), model.trace(PROMPT):
                model.logits.keep()  # this line

    @pytest.mark.parametrize(
        "use",
        [
            lambda h: h.sum() / h.shape[1],
            lambda h: h[:, : int(h.shape[1])],
            lambda h: h * (h.shape[1] > 3),
            lambda h: h.new_zeros(h.shape[0]),
            lambda h: list(h),
            lambda h: len(h),
            lambda h: h.numel(),
        ],
    )
    def test_a_length_that_differs_between_batches(self, model, use):
        with refused(patchwire.GraphError, "differs between", line=False), model.session() as session:
            with session.over(DATA, batch_size=4) as batches, model.trace(batches.prompt):
                use(model.layers[0].output)

    def test_a_number_of_values_that_differs_between_batches(self, model):
        with refused(patchwire.ShapeError, "4 values of one batch and 2 of another"), model.session() as session:
            with session.over(DATA, batch_size=4) as batches, model.trace(batches.prompt):
                model.layers[0].output.unbind(0)[0].sum().save()  # this line

    def test_a_shape_that_does_not_fit_another_batch(self, model):
        with refused(patchwire.ShapeError, "cannot be done"), model.session() as session:
            with session.over(DATA, batch_size=4) as batches, model.trace(batches.prompt):
                (model.layers[0].output + torch.zeros(4, 7, 1)).save()  # this line

    def test_tokens_that_change(self, model):
        with refused(patchwire.GraphError, "change", hint="token_ids"), model.session() as session:
            with session.over(DATA) as batches, model.trace(batches.prompt) as trace:
                trace.tokens  # noqa: B018  # this line

    def test_the_batch_of_another_loop(self, model):
        with refused(patchwire.GraphError, "in the loop's block"), model.session() as session:
            with session.over(DATA) as batches, model.trace(batches.prompt):
                model.logits.sum().save()
            with session.repeat(2):
                model.trace(batches.prompt).__enter__()  # this line

    def test_a_gradient_that_would_miss_a_way(self, model):
        with refused(patchwire.GraphError, "would miss"), model.session() as session:
            with model.trace(PROMPT):
                start = model.layers[0].output
                scaled = start * 2
            with session.repeat(2), model.trace(PROMPT):
                model.layers[0].output = start + scaled
                patchwire.grad(model.logits[0, -1, 3], start).save()  # this line

    def test_a_gradient_through_a_loop(self, model):
        with refused(patchwire.OperationError, "through a loop"), model.session() as session:
            with model.trace(PROMPT):
                start = model.layers[0].output
            with session.repeat(2) as loop:
                x = loop.carry(start)
                x *= 2
            with model.trace(PROMPT):
                model.layers[0].output = loop.result(x)
                patchwire.grad(model.logits[0, -1, 3], start).save()  # this line

    def test_what_fails_in_an_iteration(self, model):
        with refused(patchwire.ExecutionError, "failed"), model.session() as session, session.repeat(3) as loop:
            x = loop.carry(torch.eye(2))
            torch.linalg.inv(x).sum().save()  # this line
            x -= torch.eye(2)


# --- limits and hostile messages --------------------------------------------------------------------------------------

LIMITS = {
    "iterations": 50,
    "loop_tokens": 200,
    "result_bytes": 20_000,
    "seconds": 3.0,
    "nodes": 300,
    "tokens": 60,
}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes little."""
    directory = tiny.save("gpt2", tmp_path_factory.mktemp("strict") / "gpt2")
    with Server({"gpt2": directory}, limits=LIMITS) as server:
        yield server
        assert "in a way that it must not" not in server.log


@pytest.fixture
def little(strict) -> Iterator[patchwire.Model]:
    """A model on the server that takes little; after the test it serves the next request."""
    with patchwire.connect(strict.address, progress=False) as client:
        model = client.model()
        yield model
        with model.trace([1, 2]):
            logits = model.logits.save()
        assert logits.value.isfinite().all()


class TestBounds:
    def test_iterations(self, little):
        with refused(patchwire.LimitError, "51", "50", line=False), little.session() as session:
            with session.repeat(51) as loop:
                x = loop.carry(0.0)
                x += 1

    def test_tokens(self, little):
        with refused(patchwire.LimitError, "205 tokens", "200", line=False), little.session() as session:
            with session.repeat(41), little.trace(PROMPT):
                little.logits.sum().save()

    def test_bytes(self, little):
        with refused(patchwire.LimitError, "24,000", "20,000", line=False), little.session() as session:
            with session.repeat(6) as loop:
                x = loop.carry(torch.zeros(1000))
                x += 1
                x.save()

    def test_bytes_of_batches(self, little):
        with refused(patchwire.LimitError, "20,000", line=False), little.session() as session:
            with session.over(DATA) as batches, little.trace(batches.prompt):
                little.logits.expand(8, -1, -1).contiguous().save()

    def test_seconds(self, little):
        with refused(patchwire.TimeoutError, "3 seconds", line=False), little.session() as session:
            with session.repeat(50) as loop:
                carried = loop.carry(torch.eye(1500))
                product = carried
                for _ in range(100):
                    product = product @ carried
                loop.update(carried, product)
            loop.result(carried).sum().save()

    def test_nodes(self, little):
        with refused(patchwire.LimitError, "nodes", line=False), little.session() as session:
            with session.repeat(2) as loop:
                x = loop.carry(0.0)
                for _ in range(400):
                    x += 1


def in_loop(*nodes: pb.Node, count: int = 2, rows: object = ((1, 2, 3),), **body: object) -> pb.Graph:
    """A graph of one loop over one trace."""
    inner = messages.graph("gpt2", *nodes, rows=rows)
    trace = pb.Trace(model="gpt2", loop=pb.Loop(body=inner, count=count))
    run = pb.Node(loop=pb.RunLoop(trace=0))
    return pb.Graph(traces=[trace], nodes=[run])


def nested() -> pb.Graph:
    graph = in_loop(messages.read("logits"), messages.save(0))
    return pb.Graph(
        traces=[pb.Trace(model="gpt2", loop=pb.Loop(body=graph, count=2))], nodes=[pb.Node(loop=pb.RunLoop())]
    )


def changed(change) -> pb.Graph:
    graph = in_loop(messages.read("logits"), messages.save(0))
    change(graph)
    return graph


def with_batches(*batches: list[list[int]], count: int) -> pb.Graph:
    graph = in_loop(messages.read("logits"), messages.save(0), count=count)
    invoke = graph.traces[0].loop.body.traces[0].invokes[0]
    del invoke.rows[:]
    for batch in batches:
        invoke.batches.add(rows=[pb.TokenRow(ids=row) for row in batch])
    return graph


HOSTILE = {
    "nested": nested(),
    "no iterations": in_loop(messages.read("logits"), messages.save(0), count=0),
    "rows of its own": changed(lambda graph: graph.traces[0].invokes.add(rows=[pb.TokenRow(ids=[1])])),
    "a generation of its own": changed(lambda graph: graph.traces[0].generation.SetInParent()),
    "run twice": changed(lambda graph: graph.nodes.add(loop=pb.RunLoop(trace=0))),
    "of no loop": changed(lambda graph: graph.nodes.add(loop=pb.RunLoop(trace=7))),
    "a site of the loop": changed(lambda graph: graph.nodes.append(messages.read("logits"))),
    "tokens of the loop": changed(lambda graph: graph.nodes.add(token_ids=pb.TokenIds())),
    "outside of a loop": pb.Graph(traces=messages.graph("gpt2").traces, nodes=[pb.Node(outside=0), messages.save(0)]),
    "carried out of a loop": messages.graph(
        "gpt2", messages.read("logits"), pb.Node(carry=pb.Carry(outside=0, value=0))
    ),
    "no such input": in_loop(pb.Node(outside=0), messages.save(0)),
    "carried to no input": in_loop(messages.read("logits"), pb.Node(carry=pb.Carry(outside=3, value=0))),
    "kept in the body": in_loop(messages.read("logits"), pb.Node(keep=pb.Keep(value=0, seconds=1))),
    "fewer batches": with_batches([[1]], count=2),
    "an empty batch": with_batches([[1]], [], count=2),
    "an empty row": with_batches([[1]], [[]], count=2),
    "an id that is none": with_batches([[1]], [[61]], count=2),
    "many batches": with_batches(*[[[1]]] * 400, count=400),
    "a model that is none": changed(lambda graph: setattr(graph.traces[0].loop.body.traces[0], "model", "x")),
    "a loop on no model": changed(lambda graph: setattr(graph.traces[0], "model", "x")),
}


@pytest.mark.parametrize("method", ["Check", "Run"])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_loop_is_a_clear_error(strict, what, method):
    channel, stub = messages.stub(strict.address)
    request = getattr(service_pb2, f"{method}Request")(graph=HOSTILE[what])
    ask = getattr(stub, method)
    with channel, pytest.raises(grpc.RpcError) as caught:
        _ = [*ask(request)] if method == "Run" else ask(request)

    assert caught.value.code() not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), what
    assert isinstance(error_from_call(caught.value, "here"), patchwire.PatchwireError)


def given(value: pb.Node, *body: pb.Node, later: bool = False) -> pb.Graph:
    """A graph of a loop that is given what a node makes of the logits of a trace before or after it."""
    traces = [messages.graph("gpt2").traces[0], in_loop(*body).traces[0]]
    read = messages.read("logits")
    read.read.site.trace = int(later)
    run = pb.Node(loop=pb.RunLoop(trace=int(not later), inputs=[1]))
    return pb.Graph(traces=traces[::-1] if later else traces, nodes=[read, value, run])


NEGATIVE = messages.call("torch.neg", messages.node(0))
TOP = messages.call("torch.topk", messages.node(0), 2)


@pytest.mark.parametrize(
    ("graph", "kind", "says", "hint"),
    [
        (
            given(NEGATIVE, pb.Node(outside=0), messages.save(0), later=True),
            patchwire.OrderError,
            "comes later",
            "before the loop",
        ),
        (
            given(NEGATIVE, messages.read("logits"), TOP, pb.Node(carry=pb.Carry(outside=0, value=1))),
            patchwire.ShapeError,
            "A tuple cannot be carried",
            "value[0]",
        ),
        (
            given(NEGATIVE, messages.read("logits"), *[pb.Node(carry=pb.Carry(outside=0, value=0))] * 2),
            patchwire.GraphError,
            "Input 0 is carried twice",
            "one value",
        ),
        (
            given(TOP, pb.Node(outside=0), messages.save(0)),
            patchwire.GraphError,
            "A tuple cannot be given to a loop",
            "value[0]",
        ),
    ],
    ids=["later", "a tuple carried", "carried twice", "a tuple given"],
)
def test_what_does_not_fit_a_loop_is_said_at_its_line(strict, graph, kind, says, hint):
    channel, stub = messages.stub(strict.address)

    with channel, pytest.raises(grpc.RpcError) as caught:
        stub.Check(service_pb2.CheckRequest(graph=messages.at_a_line(graph)))
    error = error_from_call(caught.value, "here")

    assert type(error) is kind
    assert says in error.message
    assert hint in error.hint
    assert [(each.file, each.line) for each in error.lines] == [("user.py", 3)]


def test_a_name_that_is_too_long_is_refused(strict):
    channel, stub = messages.stub(strict.address)
    graph = in_loop(messages.read("logits"), messages.save(0))

    with channel, pytest.raises(grpc.RpcError) as caught:
        list(stub.Run(service_pb2.RunRequest(graph=graph, id=b"x" * 65)))

    assert type(error_from_call(caught.value, "here")) is patchwire.GraphError


class TestWithTheRestOfTheLanguage:
    def test_a_log_is_printed_in_every_iteration(self, model, capsys):
        with model.session() as session:
            with session.repeat(3) as loop:
                x = loop.carry(torch.tensor(1.0))
                with model.trace(PROMPT) as trace:
                    trace.log("x is", x)
                x += 1

        said = capsys.readouterr().out.splitlines()
        assert [each.split("  ", 1)[1] for each in said] == [f"x is {torch.tensor(each)!r}" for each in (1.0, 2.0, 3.0)]

    def test_a_weight_is_changed_with_what_is_carried(self, model, references):
        weight = references["gpt2"].transformer.h[1].mlp.c_proj.weight
        with model.session() as session:
            with session.repeat(3) as loop:
                scale = loop.carry(torch.tensor(1.0))
                with model.trace(PROMPT):
                    model.layers[1].mlp.c_proj.weight *= scale
                    logits = model.logits[0, -1].save()
                loop.update(scale, scale * 2)

        for scale, found in zip((1.0, 2.0, 4.0), logits.value, strict=True):
            before = weight.detach().clone()
            with torch.no_grad():
                weight.mul_(scale)
                expected = references["gpt2"](torch.tensor([PROMPT])).logits[0, -1]
                weight.copy_(before)
            assert_same(found, expected)

    def test_a_condition_on_what_is_carried_is_looked_at_in_every_iteration(self, model):
        limit = torch.tensor(2.0)
        with model.session() as session:
            with session.repeat(4) as loop:
                x = loop.carry(torch.tensor(1.0))
                y = patchwire.cond(x < limit, lambda each: each * 2, lambda each: each - 0.5, x)
                y.save()
                loop.update(x, y)

        assert y.value.tolist() == [2.0, 1.5, 3.0, 2.5]

    def test_the_losses_of_a_body_add_up_in_it(self, model):
        start = torch.tensor([1.0, 2.0])
        with model.session() as session:
            with session.repeat(2) as loop:
                x = loop.carry(start)
                (x * x).sum().backward()
                (3 * x).sum().backward()
                gradient = x.grad.save()
                loop.update(x, x + 1)

        assert gradient.value.tolist() == [[5.0, 7.0], [7.0, 9.0]]

    def test_what_an_edited_model_does_is_done_in_every_iteration(self, model, served):
        with model.trace(PROMPT):
            kept = (torch.ones(WIDTH) * model.embed.output[0, 0]).keep()
        with model.edit() as edited:
            model.layers[0].output[:, -1] = kept
        with edited.trace(PROMPT):
            expected = model.logits.save()
        with edited.session() as session:
            with session.repeat(2) as loop:
                loop.index  # noqa: B018
                with edited.trace(PROMPT):
                    logits = edited.logits.save()

        assert_same(logits.value[0], expected.value)
        assert_same(logits.value[1], expected.value)

    def test_an_error_in_the_body_ends_the_session_even_if_it_is_caught(self, model):
        def block() -> None:
            with model.session() as session:
                with pytest.raises(ZeroDivisionError):
                    with session.repeat(2):
                        raise ZeroDivisionError
                with model.trace(PROMPT):
                    model.logits.save()

        with pytest.raises(patchwire.GraphError, match="The session has ended"):
            block()


class TestADetachedJob:
    def test_does_not_loop(self, model):
        with pytest.raises(patchwire.GraphError, match="cannot loop") as caught:
            with model.session(blocking=False) as session:
                session.repeat(2)
        assert "session.repeat(2)" in str(caught.value)

    def test_does_not_keep_values(self, model):
        with pytest.raises(patchwire.GraphError, match="cannot keep values") as caught:
            with model.trace(PROMPT, blocking=False):
                model.logits.keep()
        assert "model.logits.keep()" in str(caught.value)
