"""Plans: what is said before a run is what its statistics say after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

import patchwire
import tiny
from integration.refusals import refused
from patchwire import GraphError, LimitError
from patchwire.plans import PlannedFork
from serving import Server

IDS = tiny.prompt(9)
Served = dict[str, patchwire.Model]


def read(served: Served) -> None:
    with served["gpt2"].trace(IDS):
        served["gpt2"].layers[1].output.save()


def read_early(served: Served) -> None:
    """What ends so early that nothing shares its pass."""
    with served["gpt2"].trace(IDS):
        served["gpt2"].embed.output.save()


def logits_of_one_position(served: Served) -> None:
    with served["llama"].trace(IDS):
        served["llama"].logits[:, -1].save()


def several_prompts(served: Served) -> None:
    model = served["gpt_neox"]
    with model.trace() as trace:
        for length in (8, 9):
            with trace.invoke(tiny.prompt(length)):
                model.layers[2].mlp.output.save()


def sweep(served: Served) -> None:
    model = served["gpt2"]
    for layer in range(model.num_layers):
        with model.trace(IDS):
            model.layers[layer].output[:, -1] = 0
            model.logits[:, -1].save()


def sweep_of_states(served: Served) -> None:
    model = served["mamba"]
    for layer in range(model.num_layers):
        with model.trace(IDS):
            model.layers[layer].mixer.output[:] = 0
            model.norm.output.save()


def one_after_the_other(served: Served) -> None:
    model = served["llama"]
    with model.trace(IDS):
        late = model.layers[2].output.mean()
    with model.trace(IDS):
        model.layers[0].output[:] = late
        model.layers[1].output.save()


def gradients(served: Served) -> None:
    model = served["gpt2"]
    with model.trace(IDS):
        hidden = model.layers[0].output
        patchwire.grad(model.logits[0, -1, 3], hidden).save()


def generation(served: Served) -> None:
    with served["llama"].generate(IDS, max_new_tokens=5, min_new_tokens=5) as gen:
        gen.output.save()


def generation_that_ends_early(served: Served) -> None:
    model = served["gpt2"]
    with model.generate(IDS, max_new_tokens=6, min_new_tokens=6) as gen:
        for _ in gen.iter[1:3]:
            model.layers[1].output.save()


def exact(served: Served) -> None:
    model = served["gpt2"]
    with model.trace(exact=True) as trace:
        for seed in range(3):
            with trace.invoke(tiny.prompt(5, seed=seed)):
                model.layers[0].output.save()


def two_models(served: Served) -> None:
    with served["gpt2"].trace(IDS):
        served["gpt2"].layers[0].output.save()
    with served["mamba2"].trace(IDS):
        served["mamba2"].logits.save()


def inside_a_forward(served: Served) -> None:
    with served["llama"].trace(IDS):
        served["llama"].layers[1].attn.pattern.save()


def nothing_of_the_model(served: Served) -> None:
    with served["llama"].trace(IDS):
        patchwire.save(served["llama"].lm_head.weight.sum())


def embeddings(served: Served) -> None:
    model = served["gpt2"]
    with model.trace({"inputs_embeds": torch.zeros(1, 4, tiny.WIDTH)}):
        model.layers[0].output.save()


SESSIONS = [
    read, logits_of_one_position, several_prompts, sweep, sweep_of_states, one_after_the_other, gradients, generation,
    generation_that_ends_early, exact, two_models, inside_a_forward, nothing_of_the_model, embeddings,
]  # fmt: skip


@pytest.mark.parametrize("recorded", SESSIONS, ids=lambda each: each.__name__)
def test_what_is_planned_is_what_runs(served: Served, recorded: Callable[[Served], None]):
    with served["gpt2"].session() as session:
        recorded(served)
        plan = session.plan()

    assert session.stats is not None
    for what, planned in (
        ("passes", plan.calls),
        ("rows", plan.rows),
        ("modules_skipped", plan.modules_skipped),
        ("forks", plan.forks),
    ):
        assert planned == getattr(session.stats, what), what
    assert session.plan() == plan
    assert all(each.flops > 0 and each.bytes > 0 for each in plan.passes)


@pytest.mark.parametrize("recorded", [read, sweep, sweep_of_states, gradients], ids=lambda each: each.__name__)
def test_all_saved_bytes_are_known_beforehand(served: Served, recorded: Callable[[Served], None]):
    with served["gpt2"].session() as session:
        recorded(served)
        plan = session.plan()
    assert plan.result_bytes == session.stats.result_bytes


def test_a_loop_is_planned_with_its_iterations(served: Served):
    model = served["gpt2"]
    with model.session() as session:
        with session.repeat(4) as loop:
            total = loop.carry(torch.zeros(()))
            with model.trace(IDS):
                loop.update(total, total + model.layers[0].output.sum())
        loop.result(total).save()
        plan = session.plan()

    (each,) = plan.passes
    assert (each.iterations, each.layers_computed, plan.calls) == (4, 1, session.stats.passes)
    assert plan.modules_skipped == session.stats.modules_skipped


def test_batches_of_other_lengths_are_planned_apart(served: Served):
    model = served["llama"]
    with model.session() as session:
        batches = session.over([tiny.prompt(length) for length in (5, 5, 7, 5)], batch_size=1)
        with batches, model.trace(batches.prompt):
            model.layers[0].output.mean().save()
        plan = session.plan()

    assert [(each.tokens, each.iterations) for each in plan.passes] == [(5, 3), (7, 1)]
    assert (plan.calls, plan.rows) == (session.stats.passes, session.stats.rows) == (4, 4)


def test_a_sweep_says_where_rows_fork(served: Served):
    with served["gpt2"].session() as session:
        sweep(served)
        (each,) = session.plan().passes

    # What is written at the output of a layer is apart from the next layer on.
    assert each.rows == 1
    assert each.forks[-1].rows == each.rows_at_end == 3
    assert all(isinstance(fork, PlannedFork) and fork.before.startswith("layers.") for fork in each.forks)
    assert each.rows_of_layers() == sorted(each.rows_of_layers())
    assert (each.stops_after, each.positions, each.invokes, each.traces) == ("", 3, 3, (0, 1, 2))


def test_rows_that_fork_late_cost_less_than_rows_apart(served: Served):
    costs = []
    for exact in (False, True):
        with served["gpt2"].session(exact=exact) as session:
            sweep(served)
            costs.append(session.plan())
    assert costs[0].flops < costs[1].flops
    assert len(costs[1].passes) == 3


def test_where_it_stops_is_said_in_the_short_name_of_what_is_inside_a_forward(served: Served):
    for name, read in (
        ("gpt2", lambda model: model.layers[1].attn.pattern),
        ("mamba", lambda model: model.layers[1].ssm.state[:, -1]),
    ):
        with served[name].trace(IDS) as trace:
            read(served[name]).save()
            (each,) = trace.plan().passes
        assert each.stops_after == {"gpt2": "layers.1.attn.pattern", "mamba": "layers.1.ssm.state"}[name]


def test_where_it_stops_is_said_in_names_that_sites_have(served: Served):
    model = served["gpt2"]
    with model.session() as session:
        with model.trace(IDS):
            model.layers[1].mlp.output.save()
        with model.trace(IDS):
            model.transformer.h[2].attn.c_attn.output.save()
        first, *_ = session.plan().passes
    for each in session.plan().passes:
        with model.trace(IDS):
            found: Any = model
            for part in each.stops_after.split("."):
                found = found[int(part)] if part.isdigit() else getattr(found, part)
            found.save()
    assert first.layers_computed in (2, 3)


def test_a_trace_of_its_own_has_a_plan_and_goes_on(served: Served):
    model = served["gpt2"]
    with model.trace(IDS) as trace:
        first = model.layers[0].output.save()
        before = trace.plan()
        second = model.layers[2].output.save()
        assert trace.plan().passes[0].layers_computed == 3
    plain = _read(model, 0)

    assert before.passes[0].layers_computed == 1
    assert torch.equal(first.value, plain)
    assert second.shape == first.shape
    assert trace.plan().passes[0].modules_skipped == trace.stats.modules_skipped


def _read(model: patchwire.Model, layer: int) -> torch.Tensor:
    with model.trace(IDS):
        value = model.layers[layer].output.save()
    return value.value


def test_edits_constants_and_caches_are_planned_too(served: Served):
    model, constant = served["gpt2"], torch.ones(24)
    with model.trace(IDS) as trace:
        hidden = model.layers[0].output.save()
        hidden[:, -1] += constant
        cache = trace.cache([model.layers[1]])
        plan = trace.plan()
        hidden[:, 0] *= 2

    assert plan.passes[0].layers_computed == 2
    assert plan.result_bytes == trace.stats.result_bytes
    assert torch.equal(hidden.value[:, 0], 2 * _read(model, 0)[:, 0])
    assert torch.equal(hidden.value[:, -1], _read(model, 0)[:, -1] + constant)
    assert set(cache) == {"layers.1.output"}


def test_streamed_tokens_are_planned(served: Served):
    tokens: list[list[int]] = []
    with served["gpt2"].generate(IDS, max_new_tokens=3, min_new_tokens=3, stream=tokens.append) as gen:
        plan = gen.plan()
    assert (plan.calls, plan.passes[0].generates, len(tokens)) == (3, 3, 3)


def test_a_scan_is_planned_instead_of_run(served: Served):
    with served["gpt2"].scan(IDS) as scan:
        served["gpt2"].layers[1].output.save()
    assert scan.plan().passes[0].layers_computed == 2
    assert scan.stats is None


def test_what_the_server_would_refuse_it_does_not_plan(strict_client: patchwire.Client):
    model = strict_client.model("chatty")
    with refused(LimitError, "tokens", line=False), model.trace([[1] * 30, [2] * 30]) as trace:
        model.logits.save()
        trace.plan()


class TestWhatCannotBePlanned:
    def test_before_the_block(self, served: Served):
        with refused(GraphError, "nothing to plan yet", hint="in the block or after it"):
            served["gpt2"].trace(IDS).plan()  # this line

    def test_in_the_body_of_a_loop(self, served: Served):
        model = served["gpt2"]
        with refused(GraphError, "no plan of its own", hint="after the loop"):  # noqa: SIM117
            with model.session() as session, session.repeat(2), model.trace(IDS):
                model.layers[0].output.save()
                session.plan()  # this line

    def test_a_block_that_has_raised(self, served: Served):
        session = served["gpt2"].session()
        with pytest.raises(ZeroDivisionError), session:
            raise ZeroDivisionError
        with refused(GraphError, "The session has ended"):
            session.plan()  # this line


def test_a_plan_is_shown_as_a_table_that_stays_the_same(served: Served):
    with served["gpt2"].session() as session:
        read_early(served)
        sweep(served)
        read_early(served)
        text = str(session.plan())

    assert text == repr(session.plan())
    *table, total = text.split("\n")
    assert table[0].split() == [
        "pass",
        "rows",
        "tokens",
        "forks",
        "before",
        "stops",
        "after",
        "logits",
        "computes",
        "holds",
    ]
    assert len({len(line) - len(line.lstrip()) for line in table}) == 1
    assert all(each in text for each in ("its end", "embed", "3 of 27"))
    assert total.startswith(f"{session.stats.passes} passes of {session.stats.rows} rows: ")


def test_columns_are_there_where_they_say_something(served: Served):
    with served["gpt2"].session() as session:
        two_models(served)
        generation(served)
        head = str(session.plan()).split("\n")[0]
    assert [each in head for each in ("model", "runs", "forks before")] == [True, True, False]


@pytest.mark.parametrize("count", [1, 20])
def test_a_plan_has_a_figure(served: Served, count: int, tmp_path):
    model = served["gpt2"]
    with model.session(exact=True) as session:
        for length in range(1, count + 1):
            with model.trace(tiny.prompt(length)):
                model.layers[1].output.save()
        sweep(served)
        figure = session.plan().plot()

    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "plan.png")
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["0", "1", "2"]
    assert len(figure.axes) <= 12


def test_a_plan_without_passes_has_a_text_and_a_figure(served: Served):
    with served["llama"].session() as session:
        nothing_of_the_model(served)
        plan = session.plan()
    assert str(plan).startswith("0 passes of 0 rows: 0 FLOP")
    assert isinstance(plan.plot(), Figure)


def test_a_plan_survives_another_connection(server: Server):
    with patchwire.connect(server.address, progress=False) as client:
        model = client.model("gpt2")
        with model.trace(IDS) as trace:
            model.logits.save()
    with refused(patchwire.ConnectionFailedError, "closed by this program", line=False):
        trace.plan()


@pytest.mark.parametrize("name", tiny.CORE)
@pytest.mark.parametrize("place", ["input", "output", "mixer.output", "norm.input"])
def test_every_layer_computes_as_many_rows_as_the_plan_says(name: str, place: str):
    module = tiny.build(name).requires_grad_(False)
    model = patchwire.local(module, progress=False)
    rows = [0] * model.num_layers
    with model.trace() as trace:
        with trace.invoke(tiny.prompt(9, seed=1)):
            model.logits[0, -1, 3].save()
        for layer in model.layers:
            for position in (0, 4):
                with trace.invoke(IDS):
                    at = model if place == "norm.input" else layer
                    for part in place.split("."):
                        if part in ("input", "output"):
                            getattr(at, part)[:, position] = 0
                        else:
                            at = getattr(at, part)
                    model.logits[0, -1, 3].save()
        plan = trace.plan()
        for index, path in enumerate(model.catalogue.layers):
            inside = module.get_submodule(path)

            def count(_: object, given: tuple[Any, ...], named: dict[str, Any], index: int = index) -> None:
                rows[index] += len(next(each for each in (*given, *named.values()) if torch.is_tensor(each)))

            # A part of the layer, which is called after the rows have forked that do so before it.
            next(inside.children()).register_forward_pre_hook(count, with_kwargs=True)

    assert rows == [sum(each) for each in zip(*(each.rows_of_layers() for each in plan.passes), strict=True)]
    assert (trace.stats.passes, trace.stats.rows) == (plan.calls, plan.rows)


def test_what_a_sweep_computes_is_what_its_layers_do(served: Served):
    """Counted by hand: a layer has 9 tokens, two operations for each weight, and four for each pair of its positions,
    which PyTorch's attention computes of the later ones too."""
    model, length = served["llama"], len(IDS)
    weights = sum(each.numel() for each in tiny.build("llama").model.layers[0].parameters() if each.ndim == 2)
    with model.trace() as trace:
        for at in model.layers:
            for position in (0, 4):
                with trace.invoke(IDS):
                    at.output[:, position] = 0
                    model.norm.input.save()
        [each] = trace.plan().passes

    # The unpatched row goes as far as there is somebody who shares it.
    rows = [1 + 2 * before for before in range(model.num_layers)]
    assert each.rows_of_layers() == rows
    assert each.positions == 0
    assert each.flops == pytest.approx(sum(rows) * (2 * length * weights + 4 * length**2 * tiny.WIDTH))
