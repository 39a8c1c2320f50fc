"""Sessions: what flows from trace to trace is what would flow through the laptop, in one request."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import patchwire
import tiny
from conformance import places
from conformance.hooks import Place, assert_same, changed_logits, forward, record
from conformance.test_several_prompts import PROMPTS
from integration.refusals import refused
from patchwire.errors import GraphError, OrderError, ShapeError, SiteError
from serving import Server

IDS = tiny.prompt(8)
OTHER = tiny.prompt(11, seed=1)


@pytest.fixture(params=tiny.CORE)
def name(request: pytest.FixtureRequest) -> str:
    """An architecture."""
    return str(request.param)


def layer(name: str, index: int = 1) -> Place:
    return (places.PARTS[name]["layer"].format(index), "output", ())


def with_last(given: Tensor) -> Any:
    """A change of the last token."""

    def change(value: Tensor) -> Tensor:
        value[:, -1] = given
        return value

    return change


# --- values --------------------------------------------------------------------------------------


def test_a_value_of_one_trace_is_written_into_later_ones(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]
    clean = record(reference, IDS)

    with model.session() as session:
        with model.trace(IDS):
            sources = [each.output[:, -1] for each in model.layers]
        found = []
        for index, source in enumerate(sources):
            with model.trace(OTHER):
                model.layers[index].output[:, -1] = source
                found.append(model.logits[:, -1].save())

    for index, logits in enumerate(found):
        site = layer(name, index)
        expected = changed_logits(reference, OTHER, {site: with_last(clean[site][:, -1])})
        assert_same(logits.value, expected[:, -1], index)
    assert session.stats.passes == 1, "a value of one trace is there in time for the next"
    assert session.stats.rows == 1 + len(found)


def test_a_late_value_is_written_early_in_a_later_trace(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]

    with model.session():
        with model.trace(IDS):
            late = model.layers[2].output[:, -1]
        with model.trace(OTHER):
            model.layers[0].output[:, -1] = late
            logits = model.logits.save()

    given = record(reference, IDS)[layer(name, 2)][:, -1]
    assert_same(logits.value, changed_logits(reference, OTHER, {layer(name, 0): with_last(given)}))


def test_values_go_through_a_chain_of_traces(name: str, served: Any, references: Any) -> None:
    """Iterated patching: what comes out of the last layer goes into the first of the next."""
    model, reference = served[name], references[name]

    with model.session():
        state = None
        for prompt in PROMPTS:
            with model.trace(prompt):
                if state is not None:
                    model.layers[0].output[:, -1] = state
                state = model.layers[2].output[:, -1] * 0.5
        result = None
        with model.trace(IDS):
            result = (state + 0).save()

    known = None
    for prompt in PROMPTS:
        changes = {} if known is None else {layer(name, 0): with_last(known)}
        known = record(reference, prompt, changes)[layer(name, 2)][:, -1] * 0.5
    assert_same(result.value, known)


def test_values_go_from_one_model_to_another_and_back(served: Any, references: Any) -> None:
    one, two = served["llama"], served["mamba"]

    with one.session() as session:
        with one.trace(IDS):
            first = one.layers[1].output[:, -1]
        with two.trace(OTHER):
            two.layers[1].output[:, -1] = first
            second = two.layers[2].output[:, -1]
            there = two.logits.save()
        with one.trace(OTHER):
            one.layers[0].output[:, -1] = second
            back = one.logits.save()

    given = record(references["llama"], IDS)[layer("llama")][:, -1]
    changes = {layer("mamba"): with_last(given)}
    assert_same(there.value, changed_logits(references["mamba"], OTHER, changes))
    given = record(references["mamba"], OTHER, changes)[layer("mamba", 2)][:, -1]
    assert_same(back.value, changed_logits(references["llama"], OTHER, {layer("llama", 0): with_last(given)}))
    assert session.stats.passes == 3


def test_tokens_that_were_generated_steer_a_later_trace(served: Any, references: Any) -> None:
    model, reference = served["gpt2"], references["gpt2"]
    with model.session():
        with model.generate(IDS, max_new_tokens=3, min_new_tokens=3) as gen:
            for _ in gen.iter[2]:
                late = model.layers[1].output[:, -1]
            tokens = gen.output.save()
        with model.trace(OTHER):
            model.layers[1].output[:, -1] = late
            logits = model.logits.save()
    given = record(reference, tokens.value[0, :-1].tolist())[layer("gpt2")][:, -1]
    assert_same(logits.value, changed_logits(reference, OTHER, {layer("gpt2"): with_last(given)}))


def test_traces_of_a_session_may_have_invokes_and_lists(name: str, served: Any, references: Any) -> None:
    model, reference = served[name], references[name]

    with model.session():
        with model.trace(PROMPTS):
            rows = model.layers[1].output[:, -1]
        found = []
        with model.trace() as trace:
            for index, prompt in enumerate(PROMPTS):
                with trace.invoke(prompt):
                    model.layers[1].output[:, -1] = rows[index - 1]
                    found.append(model.logits.save())

    sources = [record(reference, prompt)[layer(name)][:, -1] for prompt in PROMPTS]
    for index, (prompt, logits) in enumerate(zip(PROMPTS, found, strict=True)):
        expected = changed_logits(reference, prompt, {layer(name): with_last(sources[index - 1])})
        assert_same(logits.value, expected, index)


def test_only_the_traces_that_matter_are_run(served: Any, references: Any) -> None:
    model = served["gpt2"]
    with model.session() as session:
        with model.trace(IDS):
            model.layers[0].output[:] = 0
            model.logits  # noqa: B018  nobody saves it
        with model.trace(IDS):
            hidden = model.layers[0].output.save()
        with model.trace(OTHER):
            model.layers[1].output.mean()
    assert session.stats.passes == 1
    assert session.stats.modules_skipped > 0
    assert_same(hidden.value, record(references["gpt2"], IDS)[layer("gpt2", 0)])


def test_saved_values_are_ready_after_the_session_and_not_before(served: Any) -> None:
    model = served["gpt2"]
    with model.session() as session:
        with model.trace(IDS) as trace:
            hidden = model.layers[0].output.save()
            other = model.layers[1].output
        assert not hidden.ready
        assert trace.stats is None
        assert session.stats is None
        with model.trace(IDS):
            twice = (hidden * 2).save()
    assert_same(twice.value, hidden.value * 2)
    with pytest.raises(GraphError, match="not saved"):
        other.value  # noqa: B018
    with model.trace(IDS):  # a session that has ended is no longer in the way
        again = model.layers[0].output.save()
    assert torch.equal(again.value, hidden.value)


def test_a_trace_that_has_ended_is_not_changed_by_edits_of_its_values(name: str, served: Any, references: Any) -> None:
    """It has run, as far as whoever writes the session is concerned; a value is then a value."""
    model, reference = served[name], references[name]

    with model.session():
        with model.trace(IDS):
            hidden = model.layers[1].output
            before = model.logits.save()
        with model.trace(IDS):
            hidden *= 0.5
            hidden[:, 0] = model.layers[0].output[:, 1]
            model.layers[1].output = hidden
            after = model.logits.save()

    assert_same(before.value, forward(reference, IDS).logits)
    other = record(reference, IDS)[layer(name, 0)]

    def change(value: Tensor) -> Tensor:
        value = value * 0.5
        value[:, 0] = other[:, 1]
        return value

    assert_same(after.value, changed_logits(reference, IDS, {layer(name): change}))


# --- errors ----------------------------------------------------------------------------------------


def test_order_within_a_trace_of_a_session_still_counts(served: Any) -> None:
    model = served["gpt2"]
    with refused(OrderError, r"layers\[2\]\.output"), model.session():
        with model.trace(IDS):
            early = model.layers[0].output
        with model.trace(IDS):
            late = model.layers[2].output + early  # and this line
            model.layers[1].output = late  # this line


def test_an_error_of_a_later_trace_names_its_line(served: Any) -> None:
    model = served["gpt2"]
    with refused(ShapeError, r"\[1, 8, 24\]"), model.session():
        with model.trace(IDS):
            other = model.layers[0].output
        with model.trace(OTHER):
            model.layers[1].output = other  # this line


def test_an_error_while_it_runs_names_its_line_in_a_later_trace(served: Any) -> None:
    model = served["gpt2"]
    with refused(patchwire.ExecutionError, "index"), model.session():
        with model.trace(IDS):
            ids = model.embed.input
        with model.trace(IDS):
            model.layers[0].output.new_zeros(2)[ids + 100].save()  # this line


def test_a_session_is_over_when_one_of_its_traces_raised(served: Any) -> None:
    model = served["gpt2"]
    session = model.session().__enter__()
    with model.trace(IDS):
        first = model.layers[0].output.save()
    with pytest.raises(SiteError), model.trace(IDS):
        model.layers[77].output.save()
    with refused(GraphError, "session has ended", hint="Correct"):
        model.trace(IDS).__enter__()  # this line
    with pytest.raises(GraphError, match="session has ended"):
        session.__exit__(None, None, None)
    with pytest.raises(GraphError, match="did not end well"):
        first.value  # noqa: B018
    with model.trace(IDS):
        again = model.layers[0].output.save()
    assert again.value.isfinite().all()


def test_an_error_that_is_caught_in_a_block_ends_nothing(served: Any, references: Any) -> None:
    model = served["gpt2"]
    with model.session(), model.trace(IDS):
        with pytest.raises(ShapeError):
            model.layers[0].output = torch.zeros(3)
        with pytest.raises(SiteError):
            model.layers[77].output.save()
        logits = model.logits.save()
    assert_same(logits.value, forward(references["gpt2"], IDS).logits)


def test_an_error_of_python_gives_up_the_session(served: Any) -> None:
    model = served["gpt2"]
    with contextlib.suppress(ZeroDivisionError), model.session():
        with model.trace(IDS):
            value = model.logits.save()
        1 / 0  # noqa: B018
    with pytest.raises(GraphError, match="did not end well"):
        value.value  # noqa: B018


def test_sessions_in_sessions_traces_in_traces_and_empty_ones_are_refused(served: Any) -> None:
    model = served["gpt2"]
    with refused(GraphError, "inside another", hint="outer"), model.session(), model.session():  # this line
        pass
    with refused(GraphError, "inside another", hint="invoke"), model.session(), model.trace(IDS):  # noqa: SIM117
        with model.trace(IDS):  # this line
            pass
    with pytest.raises(GraphError, match="no trace"), model.session():
        pass
    with pytest.raises(GraphError, match="no prompt"), model.session(), model.trace():
        pass


def test_a_value_of_a_session_belongs_to_it(served: Any) -> None:
    model = served["gpt2"]
    with model.session(), model.trace(IDS):
        value = model.layers[0].output
        model.logits.save()
    with refused(GraphError, "belongs to another", hint="save"), model.trace(IDS):
        model.layers[0].output = value  # this line


def test_models_of_two_connections_do_not_share_a_session(served: Any, server: Server) -> None:
    with patchwire.connect(server.address, progress=False) as client:
        other = client.model("llama")
        with refused(GraphError, "another connection", hint="one client"), served["gpt2"].session():  # noqa: SIM117
            with other.trace(IDS):  # this line
                pass


# --- at the same time -------------------------------------------------------------------------------


def test_sessions_over_the_same_models_in_any_order_all_end(server: Server, references: Any) -> None:
    names = ["gpt2", "llama", "mamba"]

    def work(number: int) -> list[tuple[str, Tensor]]:
        found = []
        with patchwire.connect(server.address, progress=False) as client:
            models = [client.model(each) for each in names]
            for turn in range(4):
                order = [models[(number + turn + shift) % 3] for shift in (range(3) if number % 2 else (0, 2, 1))]
                with order[0].session():
                    value, kept = None, []
                    for model in order:
                        with model.trace(IDS):
                            if value is not None:
                                model.layers[0].output[:, -1] = value
                            value = model.layers[1].output[:, -1]
                            kept.append((model, model.logits.save()))
                found.append((kept[0][0].name, kept[0][1].value))
        return found

    with ThreadPoolExecutor(6) as pool:
        results = [each for found in pool.map(work, range(6)) for each in found]

    assert len(results) == 24
    for each, logits in results:
        assert_same(logits, forward(references[each], IDS).logits, each)
